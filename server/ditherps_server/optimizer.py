"""The server's optimizer: steps of the exact model, and everything that the next step depends on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ditherps.config import OptimizerConfig, ScheduleConfig
from ditherps.errors import OptionError
from ditherps.optimizers import RULES, make_optimizer, make_schedule


class ServerOptimizer:
    """Applies updates to the exact model x (float32, flat), in place, and moves the learning rate on, once a round."""

    def __init__(self, x: Tensor, config: OptimizerConfig, schedule: ScheduleConfig, rounds: int) -> None:
        self._x = torch.nn.Parameter(x, requires_grad=True)
        self._config, self._schedule_name = config, schedule.name
        self._optimizer = make_optimizer(self._x, config)
        self._schedule = make_schedule(self._optimizer, schedule, rounds)
        self._updates = 0

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next update."""
        return float(self._optimizer.param_groups[0]["lr"])

    def apply(self, update: Tensor) -> None:
        """One step along `update` (a gradient, or a model delta with its sign turned; float32, flat)."""
        self._x.grad = update
        self._optimizer.step()
        self._x.grad = None
        self._schedule.step()
        self._updates += 1

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything besides x and the options that the next updates depend on.

        Returns:
            Tensors by name: float32, flat as x (`step`, where there is one, is a scalar). They are not copies: write or
            copy them before the next `apply`.
            Values, as JSON holds them exactly: the names of the optimizer and the schedule, the number of updates so
            far, and the learning rate of the next one.
        """
        values = {
            "optimizer": self._config.name,
            "schedule": self._schedule_name,
            "updates": self._updates,
            "learning_rate": self.learning_rate,
        }
        return dict(self._optimizer.state.get(self._x, {})), values

    def load_state_dict(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave, which is copied; x is to be set beside it.

        Raises:
            OptionError: something is missing, too much, of another shape or dtype, or of another optimizer or schedule;
                nothing has changed.
        """
        updates, learning_rate = self._checked(values)
        shapes = self._shapes(updates)
        for name in sorted(shapes.keys() | tensors.keys()):
            given, shape = tensors.get(name), shapes.get(name)
            if shape is None:
                allowed = ", ".join(sorted(shapes)) or "no tensors"
                raise OptionError("state", name, f"{allowed}, for {self._config.name} after {updates} updates")
            if not isinstance(given, Tensor) or given.dtype != torch.float32 or tuple(given.shape) != shape:
                found = f"{tuple(given.shape)} {given.dtype}" if isinstance(given, Tensor) else given
                raise OptionError(f"state.{name}", found, f"a float32 tensor of shape {shape}")
        state = {name: given.detach().to("cpu", copy=True).contiguous() for name, given in tensors.items()}
        if state:
            self._optimizer.state[self._x] = state
        else:
            self._optimizer.state.pop(self._x, None)
        self._optimizer.param_groups[0]["lr"] = learning_rate
        # Of all that a schedule of torch keeps, the rest are its options.
        self._schedule.load_state_dict({"last_epoch": updates, "_step_count": updates + 1, "_last_lr": [learning_rate]})
        self._updates = updates

    def _shapes(self, updates: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors after so many updates; torch's optimizers have none before the first."""
        flat = tuple(self._x.shape)
        if self._config.name in RULES:
            return {"m": flat, "v": flat}
        if updates == 0:
            return {}
        if self._config.name in ("adam", "adamw"):
            return {"step": (), "exp_avg": flat, "exp_avg_sq": flat}
        return {"momentum_buffer": flat} if self._config.momentum else {}

    def _checked(self, values: Mapping[str, Any]) -> tuple[int, float]:
        """Updates and learning rate of `values`, if they are this optimizer's."""
        expected = {"optimizer": self._config.name, "schedule": self._schedule_name}
        names = [*expected, "updates", "learning_rate"]
        for name in sorted(values.keys() - set(names)):
            raise OptionError("state", name, names)
        for name, own in expected.items():
            if values.get(name) != own:
                raise OptionError(f"state.{name}", values.get(name), f"{own}, as the job says")
        updates, learning_rate = values.get("updates"), values.get("learning_rate")
        if type(updates) is not int or updates < 0:
            raise OptionError("state.updates", updates, "a whole number, not negative")
        if type(learning_rate) is not float or not (math.isfinite(learning_rate) and learning_rate >= 0):
            raise OptionError("state.learning_rate", learning_rate, "a finite float, not negative")
        return updates, learning_rate
