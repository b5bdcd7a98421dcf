"""Flags, job file and task recipe -> one checked job, before anything starts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditherps.codecs import Codec, parse
from ditherps.codecs import codec as make_codec
from ditherps.config import (
    DownlinkConfig,
    JobConfig,
    ServerConfig,
    WorkerConfig,
    assignments,
    merged,
    read_job_file,
    validated,
)
from ditherps.downlink import downlink_codec
from ditherps.errors import OptionError
from ditherps.feedback import require_contractive
from ditherps.samples.mode import check_mode, chosen, needs_model, update_codec
from ditherps.tasks import Recipe, Task, load_task


@dataclass(frozen=True, slots=True)
class ResolvedJob:
    """A job that has been checked, its task, and the job file's tables for the server and the worker."""

    config: JobConfig
    task: Task
    server: Mapping[str, Any]
    worker: Mapping[str, Any]
    choice: str = ""
    """What `mode = auto` chose, and why."""


def resolve_job(flags: Mapping[str, Any], path: Path | None = None) -> ResolvedJob:
    """The job of `flags` (nested; None means not given) over the job file at `path` over the task's recipe.

    Raises `OptionError` with the name of the first wrong option, `UserError` if the file or the task cannot be read.
    """
    file = read_job_file(path) if path is not None else {}
    server, worker = file.pop("server", {}), file.pop("worker", {})
    validated(ServerConfig, {"run_dir": Path(), **_table("server", server)}, prefix="server.")
    validated(WorkerConfig, _table("worker", worker), prefix="worker.")
    given = {key: value for key, value in flags.items() if value is not None}
    if "codec" in given and given["codec"] != file.get("codec", given["codec"]):
        file.pop("codec_options", None)  # they are another codec's
    asked = merged(file, given)
    task = load_task(str(asked.get("task", JobConfig.model_fields["task"].default)))
    recipe = task.recipe(asked.get("model") or None)
    job = validated(JobConfig, merged(_defaults(recipe, asked), asked))
    codec = make_codec(job.codec, **job.codec_options)
    if job.error_feedback:
        require_contractive(codec)
    choice = ""
    if job.mode == "auto":
        coordinates = sum(parameter.numel() for parameter in task.build(job.model or None, job.seed).parameters())
        found = chosen(job, task, coordinates)
        job, choice = job.model_copy(update={"mode": found.mode}), found.sentence
    if job.mode == "data":
        check_mode(job.data, task)
    # As a name, so that the job says what is sent, whatever a later version chooses.
    down = downlink_codec(job.downlink, _downlink_kind(job, codec))
    job = job.model_copy(update={"downlink": job.downlink.model_copy(update={"codec": down.spec if down else "none"})})
    return ResolvedJob(job, task, server, worker, choice)


def _downlink_kind(job: JobConfig, codec: Codec) -> Codec:
    """The codec of whose kind the way down is where the job does not say: that of the updates.

    In mode `data`, workers that send all their samples and no more do not need the model: encoding its steps would only
    take the gradients away from x. With a gate and no refinement it is the codec of gradients.
    """
    if job.mode != "data" or not needs_model(job.data) or job.data.refine:
        return update_codec(job)
    return codec


def _table(name: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise OptionError(name, value, f"a table: [{name}]")
    return value


def _defaults(recipe: Recipe, asked: Mapping[str, Any]) -> dict[str, Any]:
    """What the recipe says, for the mode that is asked for."""
    if asked.get("mode") != "local":
        return {
            "rounds": recipe.rounds, "batch_size": recipe.batch_size,
            "optimizer": dict(recipe.optimizer), "schedule": dict(recipe.schedule),
        }  # fmt: skip
    # Federated averaging: the recipe's steps are taken at the workers, the server takes the mean of what they reach.
    local = asked.get("local", {})
    steps = local.get("steps", 10) if isinstance(local, Mapping) else 10
    return {
        "rounds": max(1, recipe.rounds // steps) if isinstance(steps, int) and steps > 0 else recipe.rounds,
        "batch_size": recipe.batch_size,
        "optimizer": {"name": "sgd", "lr": 1.0},
        "schedule": {"name": "constant"},
        "local": {"lr": recipe.optimizer["lr"]},
    }


def directions(text: str) -> tuple[str, str]:
    """Both codecs of a run that is named `UP` or `UP/DOWN`; the second is empty where nothing is said of it.

    UP may be `data` (`job_options`). The slash stands outside parentheses: `dqsg:coder=rans/none`,
    `scaled:inner=(dqsg:levels=3)/dqsg`.

    Raises:
        OptionError: the text has another form, there is no such codec, or it cannot encode the way down.
    """
    depth, begin = 0, 0
    parts: list[str] = []
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if character == "/" and depth == 0:
            parts.append(text[begin:place])
            begin = place + 1
    parts.append(text[begin:])
    if not all(parts) or len(parts) > 2:
        raise OptionError("codec", text, "UP or UP/DOWN, each NAME or NAME:option=value,..., such as dqsg/none")
    up, down = parts[0], parts[1] if len(parts) == 2 else ""
    downlink_codec(DownlinkConfig(codec=down), parse("none" if _is_data(up) else up))
    return up, down


def job_options(text: str) -> dict[str, Any]:
    """What a job says of its codecs where they are named `UP` or `UP/DOWN`; of the downlink nothing in the first case.

    In the place of UP, `data` stands for samples: `data:level=2`, and with a refinement `data:level=2+CODEC`.

    Raises `OptionError` as `directions`, and where an option of `data` has another form than NAME=VALUE.
    """
    up, down = directions(text)
    options = _data_options(up) if _is_data(up) else _codec_options(up)
    return {**options, "downlink": {"codec": down}} if down else options


def _codec_options(text: str) -> dict[str, Any]:
    codec = parse(text)
    return {"codec": codec.name, "codec_options": codec.options.model_dump(mode="json", exclude_unset=True)}


def _is_data(text: str) -> bool:
    return re.match(r"data(?![a-z0-9-])", text) is not None


def _data_options(text: str) -> dict[str, Any]:
    samples, _, refine = text.partition("+")
    given = samples.removeprefix("data").removeprefix(":")
    options = assignments(given.split(",") if given else [], "data")
    return {"mode": "data", "data": {**options, **({"refine": refine} if refine else {})}}
