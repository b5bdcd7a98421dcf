"""Server optimizers: the same as torch.optim on a plain parameter, schedule included."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LRScheduler, StepLR

from ditherps.config import JobConfig, OptimizerConfig, ScheduleConfig
from ditherps.tasks import load_task, task_names
from ditherps_server.optimizer import ServerOptimizer

ROUNDS = 12
SCHEDULES: dict[str, dict[str, Any]] = {
    "constant": {},
    "cosine": {"final_fraction": 0.1},
    "step": {"step_rounds": 4, "gamma": 0.5},
    "exponential": {"gamma": 0.8},
}
OPTIMIZERS: list[dict[str, Any]] = [
    {"name": "sgd", "lr": 0.3},
    {"name": "sgd", "lr": 0.3, "momentum": 0.9, "weight_decay": 0.01},
    {"name": "sgd", "lr": 0.3, "momentum": 0.9, "nesterov": True},
    {"name": "adam", "lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1},
    {"name": "adamw", "lr": 0.01, "eps": 1e-3, "weight_decay": 0.1},
]


def torchs(parameter: nn.Parameter, options: dict[str, Any]) -> Optimizer:
    kinds: dict[str, Any] = {"sgd": SGD, "adam": Adam, "adamw": AdamW}
    made = kinds[options["name"]]([parameter], **{key: value for key, value in options.items() if key != "name"})
    assert isinstance(made, Optimizer)
    return made


def torchs_schedule(optimizer: Optimizer, name: str, lr: float) -> LRScheduler | None:
    match name:
        case "cosine":
            return CosineAnnealingLR(optimizer, ROUNDS, eta_min=0.1 * lr)
        case "step":
            return StepLR(optimizer, 4, 0.5)
        case "exponential":
            return ExponentialLR(optimizer, 0.8)
    return None


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("options", OPTIMIZERS, ids=lambda o: "-".join(map(str, o.values())))
def test_it_steps_as_torch_does(options: dict[str, Any], schedule: str) -> None:
    generator = torch.Generator().manual_seed(2)
    start = torch.randn(1000, generator=generator)
    x, parameter = start.clone(), nn.Parameter(start.clone())
    ours = ServerOptimizer(
        x, OptimizerConfig(**options), ScheduleConfig.model_validate({"name": schedule, **SCHEDULES[schedule]}), ROUNDS
    )
    theirs = torchs(parameter, options)
    decay = torchs_schedule(theirs, schedule, options["lr"])
    for _ in range(ROUNDS):
        assert ours.learning_rate == theirs.param_groups[0]["lr"]
        update = torch.randn(1000, generator=generator)
        given = update.clone()
        ours.apply(update)
        parameter.grad = given.clone()
        theirs.step()
        if decay is not None:
            decay.step()
        assert torch.equal(update, given)  # the update is read, never written
    # torch's own kernels for one tensor and the fused one may round differently.
    torch.testing.assert_close(x, parameter.detach(), rtol=2e-5, atol=1e-6)
    assert not torch.equal(x, start)


def test_threads_change_no_bit() -> None:
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            x = torch.linspace(-1, 1, 100_001)
            optimizer = ServerOptimizer(x, OptimizerConfig(name="adam", lr=0.1), ScheduleConfig(), 5)
            for seed in range(5):
                optimizer.apply(torch.randn(100_001, generator=torch.Generator().manual_seed(seed)))
            results.append(x)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_x_is_changed_in_place() -> None:
    x = torch.zeros(3)
    ServerOptimizer(x, OptimizerConfig(lr=0.5), ScheduleConfig(), 1).apply(torch.tensor([1.0, -2.0, 0.0]))
    assert x.tolist() == [-0.5, 1.0, 0.0]


def test_the_cosine_ends_at_its_fraction() -> None:
    optimizer = ServerOptimizer(
        torch.zeros(1), OptimizerConfig(lr=0.4), ScheduleConfig(name="cosine", final_fraction=0.25), 10
    )
    rates = []
    for _ in range(10):
        rates.append(optimizer.learning_rate)
        optimizer.apply(torch.zeros(1))
    assert rates[0] == 0.4
    assert all(later < earlier for earlier, later in pairwise(rates))
    assert math.isclose(optimizer.learning_rate, 0.1)


def test_fedavg_is_the_mean_of_the_local_models() -> None:
    """SGD at learning rate 1 along `before - mean of after` gives the mean."""
    before = torch.randn(50, generator=torch.Generator().manual_seed(1))
    after = torch.randn(50, generator=torch.Generator().manual_seed(2))
    x = before.clone()
    ServerOptimizer(x, OptimizerConfig(lr=1.0), ScheduleConfig(), 3).apply(before - after)
    torch.testing.assert_close(x, after, rtol=0, atol=1e-6)


def test_a_model_without_parameters() -> None:
    for name in ("sgd", "adam", "adamw"):
        options = OptimizerConfig.model_validate({"name": name})
        ServerOptimizer(torch.empty(0), options, ScheduleConfig(), 1).apply(torch.empty(0))


@pytest.mark.parametrize("task", task_names())
def test_every_recipe_makes_an_optimizer(task: str) -> None:
    for model in load_task(task).models:
        recipe = load_task(task).recipe(model)
        job = JobConfig.model_validate({"optimizer": dict(recipe.optimizer), "schedule": dict(recipe.schedule)})
        made = ServerOptimizer(torch.zeros(2), job.optimizer, job.schedule, recipe.rounds)
        assert made.learning_rate == recipe.optimizer["lr"]
