"""`ditherps bench gradients`: the update it saves is the one of a real run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

from ditherps.bench.commands import bench as commands
from ditherps.bench.gradients import save_gradient
from ditherps.bench.sources import source
from ditherps.errors import OptionError
from ditherps.gradient import make_deterministic
from ditherps.job import ResolvedJob, resolve_job
from ditherps_server.model import ServerModel
from ditherps_server.optimizer import ServerOptimizer
from ditherps_worker.compute import Computer


@pytest.fixture(autouse=True)
def _as_a_worker() -> Iterator[None]:
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    make_deterministic(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


def sent(resolved: ResolvedJob, round_: int) -> tuple[torch.Tensor, float]:
    """What worker 0 sends in a round of an uncompressed run, by the server's and the workers' own code."""
    job, task = resolved.config, resolved.task
    model = ServerModel(task.build(job.model or None, job.seed))
    computers = [Computer(job, index, task, None, torch.device("cpu")) for index in range(job.workers)]
    optimizer = ServerOptimizer(model.x, job.optimizer, job.schedule, job.rounds)
    for done in range(round_ + 1):
        updates = []
        for computer in computers:
            model.copy_into(computer.model)
            mine = computer.update(done)
            updates.append(mine.vector.clone())
            if done == round_:
                return mine.vector.clone(), mine.loss
        optimizer.apply(torch.stack(updates).mean(0))
    raise AssertionError


@pytest.mark.parametrize(
    "flags",
    [
        {"task": "digits", "workers": 3, "rounds": 40},
        {"task": "tests.tiny:Tiny", "model": "wide", "workers": 2, "optimizer": {"name": "adam", "lr": 0.01},
         "schedule": {"name": "step", "step_rounds": 2}},
        {"task": "tests.tiny:Tiny", "model": "norm", "workers": 2, "optimizer": {"name": "adamw", "lr": 0.01},
         "schedule": {"name": "exponential"}, "split": {"kind": "dirichlet"}},
    ],
    ids=["digits", "dropout and augmentation", "batch norm"],
)  # fmt: skip
def test_it_is_what_a_worker_sends(flags: dict[str, object], tmp_path: Path) -> None:
    resolved, path = resolve_job({**flags, "codec": "none"}), tmp_path / "gradient.safetensors"
    for round_ in (0, 5):
        expected, loss = sent(resolved, round_)
        before = torch.random.get_rng_state()
        metadata = save_gradient(resolved.config, resolved.task, None, round_, path)
        assert torch.equal(torch.random.get_rng_state(), before)
        found = source(str(path), 0).x
        # The mean over workers is summed in another order.
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        assert float(metadata["loss"]) == pytest.approx(loss, rel=1e-5)
    other, _ = sent(resolved, 4)
    assert not torch.allclose(found, other, rtol=1e-2)


def test_as_a_command(tmp_path: Path) -> None:
    path = tmp_path / "digits-3.safetensors"
    arguments = [
        "gradients",
        "--task",
        "digits",
        "--model",
        "mlp",
        "--rounds",
        "3",
        "--workers",
        "2",
        "--out",
        str(path),
    ]
    result = CliRunner().invoke(commands, arguments)
    assert result.exit_code == 0, result.output
    with safe_open(path, framework="pt") as file:
        assert list(file.keys()) == ["update"]
        assert file.get_tensor("update").dtype == torch.float32
        metadata = file.metadata()
    assert (metadata["task"], metadata["model"], metadata["round"]) == ("digits", "mlp", "3")
    assert 1 < float(metadata["loss"]) < 4
    assert "round 3" in result.stdout
    assert list(tmp_path.iterdir()) == [path]


def test_wrong_rounds_and_modes(tmp_path: Path) -> None:
    job = resolve_job({"task": "digits", "rounds": 10})
    with pytest.raises(OptionError, match="rounds = 10 is not allowed; allowed: 0 to 9"):
        save_gradient(job.config, job.task, None, 10, tmp_path / "x")
    job = resolve_job({"task": "digits", "rounds": 10, "mode": "local"})
    with pytest.raises(OptionError, match="mode = 'local'"):
        save_gradient(job.config, job.task, None, 1, tmp_path / "x")
