"""What `optimizer` and `schedule` of a job name: classes of torch.optim over one flat vector."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, ExponentialLR, LRScheduler, StepLR

from ditherps.config import OptimizerConfig, ScheduleConfig
from ditherps.kernels.adaptive import ADAGRAD, ADAM, YOGI, adaptive_step

RULES = {"fedadagrad": ADAGRAD, "fedadam": ADAM, "fedyogi": YOGI}


class Adaptive(Optimizer):
    """FedAdagrad, FedAdam and FedYogi of one flat vector (float32, contiguous, on the CPU).

    Reddi et al., "Adaptive federated optimization", arXiv 2003.00295, algorithm 2: no bias correction, `eps` is the
    paper's tau, and v begins at tau^2, the least that it allows. The gradient is the negative of the paper's Delta.
    """

    def __init__(self, x: nn.Parameter, rule: str, *, lr: float, betas: tuple[float, float], eps: float) -> None:
        """`rule`: a name of `RULES`. Compiles what the first step needs."""
        super().__init__([x], {"lr": lr, "betas": betas, "eps": eps})
        self._rule = RULES[rule]
        self.state[x] = {"m": torch.zeros_like(x.data), "v": torch.full_like(x.data, eps * eps)}
        empty = x.data.new_empty(0)
        self._move(empty, empty, empty, empty, self.param_groups[0])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step along the parameter's gradient. There is no closure to evaluate."""
        for group in self.param_groups:
            for x in group["params"]:
                state = self.state[x]
                self._move(x.data, state["m"], state["v"], x.grad, group)

    def _move(self, x: Tensor, m: Tensor, v: Tensor, update: Tensor, group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        adaptive_step(
            x.numpy(), m.numpy(), v.numpy(), update.numpy(), self._rule,
            np.float32(beta1), np.float32(1 - beta1), np.float32(beta2), np.float32(1 - beta2),
            np.float32(group["lr"]), np.float32(group["eps"]),
        )  # fmt: skip


def make_optimizer(x: nn.Parameter, config: OptimizerConfig) -> Optimizer:
    """The optimizer of x (float32, flat, on the CPU); its steps change x in place."""
    if config.name in RULES:
        return Adaptive(x, config.name, lr=config.lr, betas=config.betas, eps=config.eps)
    fused = x.numel() > 0
    if config.name in ("sgd", "fedavgm"):
        return SGD(
            [x], lr=config.lr, momentum=config.momentum, nesterov=config.nesterov,
            weight_decay=config.weight_decay, fused=fused,
        )  # fmt: skip
    kind: type[Adam] = {"adam": Adam, "adamw": AdamW}[config.name]
    return kind([x], lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=fused)


def make_schedule(optimizer: Optimizer, config: ScheduleConfig, rounds: int) -> LRScheduler:
    """The schedule of the optimizer's learning rate over a run of `rounds`, to be stepped once a round."""
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
