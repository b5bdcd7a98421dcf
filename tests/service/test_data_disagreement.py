"""A worker whose gradient at the same samples is another than the server's: its refinement would be a bias."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ditherps.errors import ExitCode, NonFiniteError, Reason, RunFailedError
from tests.service.inprocess import serving
from tests.service.simulation import simulated
from tests.service.test_hostile import rejected
from tests.tiny import Tiny
from tests.worker.conftest import _deterministic as _deterministic
from tests.worker.test_loop import worker

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(120)]

ROUNDS = 4


class Leaning(Tiny):
    """`Tiny` with a loss that is larger by a fraction."""

    def __init__(self, fraction: float) -> None:
        self._fraction = fraction

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The mean cross-entropy, and more."""
        return super().loss(outputs, labels) * (1 + self._fraction)


class Drifting(Tiny):
    """`Tiny` at a device that is not as exact as the server's."""

    def inputs(self, model: str | None, features: Tensor, keys: Any) -> Tensor:
        """To a few bits."""
        return super().inputs(model, features, keys).to(torch.bfloat16).float()


def options(**changes: Any) -> dict[str, Any]:
    data = {"refine": "dqsg", "probe_every": 2}
    return {"mode": "data", "model": "norm", "workers": 3, "rounds": ROUNDS, "data": data, **changes}


async def together(address: str, *tasks: Tiny) -> list[Any]:
    workers = [worker(address, f"worker-{index}", task, allow_data=True) for index, task in enumerate(tasks)]
    return await asyncio.gather(*workers, return_exceptions=True)


@pytest.mark.parametrize("other", [Leaning(0.02), Drifting()], ids=["loss", "precision"])
async def test_its_contributions_do_not_enter(tmp_path: Path, caplog: pytest.LogCaptureFixture, other: Tiny) -> None:
    """Those of the rounds in which it is asked; the others go on."""
    changes = {} if isinstance(other, Leaning) else {"data": {"refine": "dqsg", "probe_every": 2, "probe_limit": 1e-4}}
    async with serving(tmp_path, metrics=True, **options(quorum=0.6, **changes)) as served:
        ends = await together(served.address, Tiny(), other, Tiny())
        assert {end.reason for end in ends} == {Reason.FINISHED}
        result = await served.running
        rounds = served.records()
        assert [record["workers"] for record in rounds] == [[0, 2], [0, 1, 2]] * 2
        assert [record["absent"] for record in rounds] == [{"1": "disagreement"}, {}] * 2
        assert result.rounds == ROUNDS
        assert (
            "refused update worker=worker-1 reason=disagreement: its gradient differs from the server's" in caplog.text
        )


async def test_without_a_quorum_of_others_the_run_ends_by_that_name(tmp_path: Path) -> None:
    async with serving(tmp_path, metrics=True, **options()) as served:
        ends = asyncio.create_task(together(served.address, Tiny(), Leaning(-0.02), Tiny()))
        with pytest.raises(RunFailedError, match=r"other gradients than the server .*data\.probe_limit") as error:
            await served.running
        assert error.value.reason is Reason.DISAGREEMENT
        assert error.value.exit_code is ExitCode.ROUND_FAILED
        for end in await ends:
            assert isinstance(end, RunFailedError)
            assert end.reason is Reason.DISAGREEMENT
        assert (tmp_path / "checkpoint.safetensors").exists()


async def test_within_the_limit_nobody_is_refused(tmp_path: Path) -> None:
    async with serving(tmp_path, metrics=True, **options()) as served:
        ends = await together(served.address, Tiny(), Leaning(0.005), Tiny())
        assert {end.reason for end in ends} == {Reason.FINISHED}
        assert (await served.running).contributions == 3 * ROUNDS


async def test_where_all_agree_the_model_is_that_of_one_loop(tmp_path: Path) -> None:
    async with serving(tmp_path, metrics=True, **options()) as served:
        await together(served.address, Tiny(), Tiny(), Tiny())
        assert (await served.running).model_sha256 == simulated(served.job, Tiny())


async def test_without_a_refinement_there_is_nothing_to_disagree_about(tmp_path: Path) -> None:
    """What a worker computes does not matter then."""
    async with serving(tmp_path, metrics=True, **options(data={})) as served:
        await together(served.address, Tiny(), Leaning(7.0), Tiny())
        assert (await served.running).model_sha256 == simulated(served.job, Tiny())
        assert await served.metric(rejected(Reason.DISAGREEMENT)) == 0


@pytest.mark.parametrize("data", [{}, {"keep": 0.5}, {"refine": "dqsg"}], ids=str)
async def test_a_job_that_diverges_ends(tmp_path: Path, data: dict[str, Any]) -> None:
    """By the word of who computes: of workers that need no model, it is the server."""
    optimizer = {"name": "sgd", "lr": 1e38, "momentum": 0.9}
    changes = {"model": "linear", "rounds": 30, "optimizer": optimizer, "data": data}
    limits = {"join_timeout_seconds": 3, "round_deadline_seconds": 3, "idle_timeout_seconds": 3}
    async with serving(tmp_path, **options(**changes, **limits)) as served:
        ends = asyncio.create_task(together(served.address, Tiny(), Tiny(), Tiny()))
        with pytest.raises(RunFailedError) as error:
            await served.running
        if not data:
            assert error.value.reason is Reason.NON_FINITE
            assert "a lower optimizer.lr may help" in str(error.value)
        else:
            assert any(isinstance(end, NonFiniteError) for end in await ends)
        await ends
