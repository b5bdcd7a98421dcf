"""Options that several commands share, each declared once: flag, environment variable, help."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ditherps.config import assignments, merged
from ditherps.tags import TAGS

JOB, RUN = "Job", "This machine"


def _option(*flags: str, env: str | None, text: str, panel: str = JOB) -> typer.models.OptionInfo:
    envvar = f"DITHERPS_{env}" if env else None
    info = typer.Option(*flags, envvar=envvar, help=text, rich_help_panel=panel, show_default=False)
    assert isinstance(info, typer.models.OptionInfo)
    return info


Task = Annotated[
    str | None,
    _option(
        "--task",
        env="TASK",
        text="digits, mnist, fashion-mnist, cifar10, or your own module:attribute (default: digits).",
    ),
]
Model = Annotated[str | None, _option("--model", env="MODEL", text="One of the task's models (default: its first).")]
Workers = Annotated[int | None, _option("--workers", "-w", env="WORKERS", text="Workers that take part (default: 4).")]
Rounds = Annotated[
    int | None, _option("--rounds", "-r", env="ROUNDS", text="Rounds (default: as the task's recipe says).")
]
CodecName = Annotated[
    str | None, _option("--codec", "-c", env="CODEC", text=f"{', '.join(TAGS.values())} (default: ndqsg).")
]
CodecOptions = Annotated[
    list[str] | None,
    _option("--codec-option", "-o", env="CODEC_OPTION", text="NAME=VALUE, repeatable: levels, step, bucket, ..."),
]
DownlinkCodec = Annotated[
    str | None,
    _option(
        "--downlink-codec",
        env="DOWNLINK_CODEC",
        text="NAME or NAME:option=value,... of the way down; none: float32 (default: the uplink's kind).",
    ),
]
Mode = Annotated[
    str | None,
    _option(
        "--mode",
        env="MODE",
        text="gradient: one batch a round; local: several local steps a round; data: quantized samples instead of "
        "gradients; auto: data or gradient, whichever takes fewer bits (default: gradient).",
    ),
]
Seed = Annotated[
    int | None, _option("--seed", env="SEED", text="Seed of everything random, dither included (default: 1).")
]
Set = Annotated[
    list[str] | None,
    _option("--set", env=None, text="NAME=VALUE, repeatable: any option of the job file, as in optimizer.lr=0.1."),
]
Config = Annotated[
    Path | None, _option("--config", env="CONFIG", text="Job file (TOML); flags and environment beat it.")
]
DataDir = Annotated[
    Path | None, _option("--data-dir", env="DATA", text="Where datasets are, or are downloaded to.", panel=RUN)
]
RunDir = Annotated[
    Path | None, _option("--run-dir", env="RUN_DIR", text="Folder for records, model and plots (default: below runs/).",
                         panel=RUN)
]  # fmt: skip
Host = Annotated[
    str | None, _option("--host", env="HOST", text="Address to listen on (default: 127.0.0.1).", panel=RUN)
]
Port = Annotated[int | None, _option("--port", env="PORT", text="Port; 0: any free one (default: 50051).", panel=RUN)]
MetricsHost = Annotated[
    str | None,
    _option("--metrics-host", env="METRICS_HOST", text="Address of /metrics (default: 127.0.0.1).", panel=RUN),
]
MetricsPort = Annotated[
    int | None,
    _option(
        "--metrics-port",
        env="METRICS_PORT",
        text="Port of /metrics; 0: any, -1: none (default: server 9464, worker -1).",
        panel=RUN,
    ),
]
Resume = Annotated[
    bool | None,
    _option("--resume", env="RESUME", text="Go on from the checkpoint in the run folder, if any.", panel=RUN),
]
CheckpointEvery = Annotated[
    int | None,
    _option(
        "--checkpoint-every", env="CHECKPOINT_EVERY",
        text="Rounds between two checkpoints (default: about 20 in a run).", panel=RUN,
    ),
]  # fmt: skip
Durability = Annotated[
    str | None,
    _option(
        "--durability", env="DURABILITY",
        text="round: a killed server loses nothing that it acknowledged; none: the rounds since its checkpoint.",
        panel=RUN,
    ),
]  # fmt: skip
StateDir = Annotated[
    Path | None,
    _option(
        "--state-dir", env="STATE_DIR", text="Folder in which a worker that is started again finds what it needs.",
        panel=RUN,
    ),
]  # fmt: skip
OnEmpty = Annotated[
    str | None,
    _option(
        "--on-empty", env="ON_EMPTY",
        text="exit: end when too few workers are here for join_timeout_seconds; wait: without a limit (default: exit).",
        panel=RUN,
    ),
]  # fmt: skip
GraceSeconds = Annotated[
    float | None,
    _option(
        "--grace-seconds", env="GRACE_SECONDS",
        text="After SIGTERM, how long the open round may take to close; allow docker stop or Kubernetes 10 s more "
        "(default: 20).", panel=RUN,
    ),
]  # fmt: skip
Init = Annotated[Path | None, _option("--init", env="INIT", text="First parameters, as safetensors.", panel=RUN)]
Insecure = Annotated[
    bool | None,
    _option("--insecure", env="INSECURE", text="Allow plaintext beyond this machine.", panel=RUN),
]
Certs = Annotated[
    Path | None,
    _option(
        "--certs", env="CERTS", text="Folder of this end's certificates, as `ditherps certs init` makes it.", panel=RUN
    ),
]
TokenFile = Annotated[
    Path | None,
    _option("--token-file", env="TOKEN_FILE", text="Ask for tokens, whose hashes are in this file.", panel=RUN),
]
Token = Annotated[
    str | None, _option("--token", env="TOKEN", text="@FILE with this worker's token, or the token.", panel=RUN)
]
Tls13 = Annotated[
    bool | None, _option("--tls13", env="TLS13", text="Speak TLS 1.3 alone, no older version.", panel=RUN)
]
Reflection = Annotated[bool | None, _option("--reflection", env="REFLECTION", text="Serve gRPC reflection.", panel=RUN)]
HealthSocket = Annotated[
    Path | None,
    _option(
        "--health-socket", env="HEALTH_SOCKET",
        text="Unix socket for `ditherps health unix:PATH`, which needs no certificate there.", panel=RUN,
    ),
]  # fmt: skip
Server = Annotated[
    str | None,
    _option("--server", "-s", env="SERVER", text="HOST:PORT of the server (default: 127.0.0.1:50051).", panel=RUN),
]
Name = Annotated[
    str | None,
    _option(
        "--name", "-n", env="NAME", text="This worker's name, such as worker-0 (default: the lowest free).", panel=RUN
    ),
]
Device = Annotated[
    str | None,
    _option(
        "--device",
        env="DEVICE",
        text="auto (a GPU by the worker's index, if there is one), cpu, or cuda:N (default: auto).",
        panel=RUN,
    ),
]
ServerDevice = Annotated[
    str | None,
    _option(
        "--device", env="DEVICE", text="Where gradients are computed in mode data: auto, cpu, or cuda:N (default: "
        "auto).", panel=RUN,
    ),
]  # fmt: skip
AllowData = Annotated[
    bool | None,
    _option(
        "--allow-data", env="ALLOW_DATA",
        text="Let a server that trains in mode data see this worker's samples and labels, quantized.", panel=RUN,
    ),
]  # fmt: skip
MaxDataLevel = Annotated[
    int | None,
    _option(
        "--max-data-level", env="MAX_DATA_LEVEL",
        text="With --allow-data: most bits of a feature that may leave (default: what the job asks for).", panel=RUN,
    ),
]  # fmt: skip
CacheDir = Annotated[
    Path | None,
    _option(
        "--cache-dir", env="CACHE_DIR", text="Mode data: keep samples in this folder (default: in memory).", panel=RUN
    ),
]
KeepCache = Annotated[
    bool | None,
    _option(
        "--keep-cache", env="KEEP_CACHE",
        text="Mode data: leave the samples in the run folder for the next job; else they are wiped at the end.",
        panel=RUN,
    ),
]  # fmt: skip
Json = Annotated[
    bool, _option("--json", env="JSON", text="Print the result as one JSON object, the last line of output.", panel=RUN)
]
LogFormat = Annotated[
    str | None,
    _option(
        "--log-format", env="LOG_FORMAT",
        text="text, or json: an object a line, with a line for each round and worker (default: text).", panel=RUN,
    ),
]  # fmt: skip
TensorBoard = Annotated[
    Path | None, _option("--tensorboard", env="TENSORBOARD", text="Folder for TensorBoard's event files.", panel=RUN)
]
Verbose = Annotated[bool, _option("--verbose", "-v", env="VERBOSE", text="Log more.", panel=RUN)]


def job_flags(
    task: str | None,
    model: str | None,
    workers: int | None,
    rounds: int | None,
    codec: str | None,
    codec_option: list[str] | None,
    downlink_codec: str | None,
    mode: str | None,
    seed: int | None,
    set_: list[str] | None,
) -> dict[str, Any]:
    """The job as the command line gives it, nested as in a job file; None where nothing was said.

    Raises `OptionError` for what is not NAME=VALUE.
    """
    named = {
        "task": task, "model": model, "workers": workers, "rounds": rounds, "codec": codec, "mode": mode, "seed": seed,
        "codec_options": assignments(codec_option or [], "--codec-option") or None,
        "downlink": None if downlink_codec is None else {"codec": downlink_codec},
    }  # fmt: skip
    # `--set` has no environment variable, so it beats what the others may have from theirs.
    return merged({key: value for key, value in named.items() if value is not None}, assignments(set_ or [], "--set"))


def default_run_dir(task: str, codec: str) -> Path:
    """A new folder below `runs/`, named by what it holds and when."""
    stem = f"{task.replace(':', '.')}-{codec}-{time.strftime('%Y%m%d-%H%M%S')}"
    path, number = Path("runs") / stem, 2
    while path.exists():
        path, number = Path("runs") / f"{stem}-{number}", number + 1
    return path
