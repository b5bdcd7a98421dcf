"""Server optimizers and learning-rate schedules: classes of torch.optim over the flat vector."""

from __future__ import annotations

import torch
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, ExponentialLR, LRScheduler, StepLR

from ditherps.config import OptimizerConfig, ScheduleConfig


class ServerOptimizer:
    """Applies updates to the exact model x (float32, flat), in place, and moves the learning rate on, once a round."""

    def __init__(self, x: torch.Tensor, config: OptimizerConfig, schedule: ScheduleConfig, rounds: int) -> None:
        self._x = torch.nn.Parameter(x, requires_grad=True)
        self._optimizer = _optimizer(self._x, config)
        self._schedule = _schedule(self._optimizer, schedule, rounds)

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next update."""
        return float(self._optimizer.param_groups[0]["lr"])

    def apply(self, update: torch.Tensor) -> None:
        """One step along `update` (a gradient, or a model delta with its sign turned; float32, flat)."""
        self._x.grad = update
        self._optimizer.step()
        self._x.grad = None
        self._schedule.step()


def _optimizer(x: torch.nn.Parameter, config: OptimizerConfig) -> Optimizer:
    fused = x.numel() > 0
    if config.name == "sgd":
        return SGD(
            [x], lr=config.lr, momentum=config.momentum, nesterov=config.nesterov,
            weight_decay=config.weight_decay, fused=fused,
        )  # fmt: skip
    kind: type[Adam] = {"adam": Adam, "adamw": AdamW}[config.name]
    return kind([x], lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=fused)


def _schedule(optimizer: Optimizer, config: ScheduleConfig, rounds: int) -> LRScheduler:
    lr = optimizer.param_groups[0]["lr"]
    match config.name:
        case "cosine":
            return CosineAnnealingLR(optimizer, T_max=rounds, eta_min=config.final_fraction * lr)
        case "step":
            return StepLR(optimizer, step_size=config.step_rounds, gamma=config.gamma)
        case "exponential":
            return ExponentialLR(optimizer, gamma=config.gamma)
        case "constant":
            return ConstantLR(optimizer, factor=1.0, total_iters=0)
