"""Server optimizers: the same as torch.optim on a plain parameter, schedule included."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LRScheduler, StepLR

from ditherps.config import JobConfig, OptimizerConfig, ScheduleConfig
from ditherps.errors import OptionError
from ditherps.optimizers import Adaptive
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
    {"name": "fedavgm", "lr": 0.5, "momentum": 0.8},
    {"name": "fedadagrad", "lr": 0.3, "betas": (0.5, 0.9), "eps": 1e-2},
    {"name": "fedadam", "lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-2},
    {"name": "fedyogi", "lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-2},
]
NAMES = ["sgd", "adam", "adamw", "fedavgm", "fedadagrad", "fedadam", "fedyogi"]


def schedule_config(name: str) -> ScheduleConfig:
    return ScheduleConfig.model_validate({"name": name, **SCHEDULES[name]})


def torchs(parameter: nn.Parameter, options: dict[str, Any]) -> Optimizer:
    rest, name = {key: value for key, value in options.items() if key != "name"}, options["name"]
    kinds: dict[str, Any] = {"sgd": SGD, "adam": Adam, "adamw": AdamW, "fedavgm": SGD}
    # The step of the adaptive ones has a reference of its own, beside its kernel's tests.
    made = kinds[name]([parameter], **rest) if name in kinds else Adaptive(parameter, name, **rest)
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
    ours = ServerOptimizer(x, OptimizerConfig(**options), schedule_config(schedule), ROUNDS)
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
    for name in NAMES:
        options = OptimizerConfig.model_validate({"name": name})
        optimizer = ServerOptimizer(torch.empty(0), options, ScheduleConfig(), 2)
        optimizer.apply(torch.empty(0))
        again = ServerOptimizer(torch.empty(0), options, ScheduleConfig(), 2)
        again.load_state_dict(*optimizer.state_dict())
        again.apply(torch.empty(0))


@pytest.mark.parametrize("task", task_names())
def test_every_recipe_makes_an_optimizer(task: str) -> None:
    for model in load_task(task).models:
        recipe = load_task(task).recipe(model)
        job = JobConfig.model_validate({"optimizer": dict(recipe.optimizer), "schedule": dict(recipe.schedule)})
        made = ServerOptimizer(torch.zeros(2), job.optimizer, job.schedule, recipe.rounds)
        assert made.learning_rate == recipe.optimizer["lr"]


def test_fedavgm_is_momentum_over_deltas() -> None:
    """Hsu, Qi, Brown: v <- 0.9 v + (before - after), x <- x - v."""
    optimizer = ServerOptimizer(x := torch.zeros(1), OptimizerConfig(name="fedavgm"), ScheduleConfig(), 3)
    found = []
    for update in (1.0, 1.0, -2.0):
        optimizer.apply(torch.tensor([update]))
        found.append(float(x))
    assert found == pytest.approx([-1.0, -1.0 - 1.9, -2.9 - (0.9 * 1.9 - 2.0)])


def updates(count: int, seed: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(100, generator=generator) for _ in range(count)]


def option_id(options: dict[str, Any]) -> str:
    return "-".join(map(str, options.values()))


class TestState:
    @pytest.mark.parametrize("schedule", SCHEDULES)
    @pytest.mark.parametrize("options", [*OPTIMIZERS, *({"name": name} for name in NAMES)], ids=option_id)
    @pytest.mark.parametrize("at", [0, 1, 7, ROUNDS])
    def test_a_new_optimizer_goes_on_bit_for_bit(self, options: dict[str, Any], schedule: str, at: int) -> None:
        config, given = OptimizerConfig.model_validate(options), updates(ROUNDS + 5)
        x = torch.linspace(-1, 1, 100)
        first = ServerOptimizer(x, config, schedule_config(schedule), ROUNDS)
        for update in given[:at]:
            first.apply(update)
        tensors, values = first.state_dict()
        kept = {name: tensor.clone() for name, tensor in tensors.items()}
        text, y = json.dumps(values), x.clone()
        second = ServerOptimizer(y, config, schedule_config(schedule), ROUNDS)
        second.load_state_dict(kept, json.loads(text))
        rates = []
        for update in given[at:]:
            rates.append(first.learning_rate)
            assert second.learning_rate == rates[-1]
            first.apply(update)
            second.apply(update)
            assert torch.equal(x, y)
        assert second.state_dict()[1] == first.state_dict()[1]
        assert (len(set(rates)) > 1) == (schedule != "constant")
        # What was loaded was copied: it still is what it was saved as, and may be loaded again.
        third = ServerOptimizer(z := torch.linspace(-1, 1, 100), config, schedule_config(schedule), ROUNDS)
        for update in given[: ROUNDS + 1]:
            third.apply(update)  # a used optimizer forgets what it had
        z.copy_(torch.linspace(-1, 1, 100))
        third.load_state_dict(kept, json.loads(text))
        fourth = ServerOptimizer(u := z.clone(), config, schedule_config(schedule), ROUNDS)
        fourth.load_state_dict(kept, json.loads(text))
        for update in given[at:]:
            third.apply(update)
            fourth.apply(update)
        assert torch.equal(z, u)

    def test_it_is_memory_that_matters(self) -> None:
        """Without its state an optimizer would go on elsewhere: the test above can fail."""
        for name in NAMES:
            config, given = OptimizerConfig.model_validate({"name": name}), updates(6)
            x = torch.zeros(100)
            first = ServerOptimizer(x, config, ScheduleConfig(), 9)
            for update in given[:5]:
                first.apply(update)
            second = ServerOptimizer(y := x.clone(), config, ScheduleConfig(), 9)
            first.apply(given[5])
            second.apply(given[5])
            assert torch.equal(x, y) == (name == "sgd")

    def test_the_tensors_are_those_that_it_works_on(self) -> None:
        optimizer = ServerOptimizer(torch.zeros(100), OptimizerConfig(name="fedyogi"), ScheduleConfig(), 9)
        (tensors, values), (update,) = optimizer.state_dict(), updates(1)
        assert set(tensors) == {"m", "v"}
        assert values == {"optimizer": "fedyogi", "schedule": "constant", "updates": 0, "learning_rate": 0.03}
        optimizer.apply(update)
        assert torch.equal(tensors["m"], torch.tensor(1 - 0.9) * update)

    @pytest.mark.parametrize("options", OPTIMIZERS, ids=option_id)
    def test_what_does_not_fit_is_named_and_changes_nothing(self, options: dict[str, Any]) -> None:
        config, given = OptimizerConfig.model_validate(options), updates(8)
        x = torch.zeros(100)
        source = ServerOptimizer(x, config, schedule_config("step"), ROUNDS)
        for update in given[:5]:
            source.apply(update)
        tensors, values = source.state_dict()
        wrong: list[tuple[dict[str, Any], dict[str, Any], str]] = [
            (tensors | {"extra": x}, values, "state = 'extra'"),
            (tensors, values | {"extra": 1}, "state = 'extra'"),
            (tensors, values | {"optimizer": "lion"}, "state.optimizer = 'lion'"),
            (tensors, values | {"schedule": "cosine"}, "state.schedule = 'cosine'"),
            (tensors, values | {"updates": 5.0}, "state.updates = 5.0"),
            (tensors, values | {"updates": -1}, "state.updates = -1"),
            (tensors, values | {"updates": True}, "state.updates = True"),
            (tensors, values | {"learning_rate": math.nan}, "state.learning_rate = nan"),
            (tensors, values | {"learning_rate": "0.1"}, "state.learning_rate = '0.1'"),
        ]
        wrong += [
            (tensors, {key: value for key, value in values.items() if key != name}, f"state.{name} = None")
            for name in values
        ]
        for name, tensor in tensors.items():
            less = {key: value for key, value in tensors.items() if key != name}
            wrong += [
                (less, values, f"state.{name} = None"),
                (less | {name: torch.zeros(99)}, values, f"state.{name} = '(99,)"),
                (less | {name: tensor.double()}, values, f"state.{name} = '{tuple(tensor.shape)} torch.float64'"),
            ]
        if "step" in tensors or "momentum_buffer" in tensors:
            wrong.append((tensors, values | {"updates": 0}, "no tensors"))
        target = ServerOptimizer(y := torch.zeros(100), config, schedule_config("step"), ROUNDS)
        untouched = ServerOptimizer(z := torch.zeros(100), config, schedule_config("step"), ROUNDS)
        for update in given[5:7]:
            target.apply(update)
            untouched.apply(update)
        for bad_tensors, bad_values, named in wrong:
            with pytest.raises(OptionError) as refused:
                target.load_state_dict(bad_tensors, bad_values)
            assert named in str(refused.value)
            assert "\n" not in str(refused.value)
        for update in given:
            target.apply(update)
            untouched.apply(update)
            assert target.learning_rate == untouched.learning_rate
            assert torch.equal(y, z)
