"""The step of the adaptive server optimizers: the slow reference bit for bit, and what defines each rule."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from ditherps.kernels.adaptive import ADAGRAD, ADAM, YOGI, adaptive_step
from ditherps.optimizers import Adaptive

RULES = {"fedadagrad": ADAGRAD, "fedadam": ADAM, "fedyogi": YOGI}
Vector = NDArray[np.float32]


class State(NamedTuple):
    x: Vector
    m: Vector
    v: Vector


def made(n: int, seed: int = 0) -> tuple[State, Vector]:
    """A state and an update: of all sizes, with zeros, and with v on both sides of the square and equal to it."""
    rng = np.random.default_rng(seed)
    sizes = 10.0 ** rng.integers(-6, 3, (4, n))
    x, m, v, update = (rng.standard_normal((4, n)) * sizes).astype(np.float32)
    update[::7] = 0
    v = np.abs(v)
    v[::5] = (update * update)[::5]
    return State(x, m, v), update


def stepped(state: State, update: Vector, rule: str, betas: tuple[float, float], lr: float, tau: float) -> State:
    """One step of the kernel."""
    after = State(*(part.copy() for part in state))
    f = np.float32
    beta1, beta2 = betas
    adaptive_step(*after, update, RULES[rule], f(beta1), f(1 - beta1), f(beta2), f(1 - beta2), f(lr), f(tau))
    return after


def slow_step(state: State, update: Vector, rule: str, betas: tuple[float, float], lr: float, tau: float) -> State:
    """The formulas, one coordinate after another, each operation rounded to float32."""
    f = np.float32
    after = State(*(part.copy() for part in state))
    beta1, beta2, rest1, rest2 = f(betas[0]), f(betas[1]), f(1 - betas[0]), f(1 - betas[1])
    for i, u in enumerate(update):
        square, v = f(u * u), state.v[i]
        after.m[i] = f(f(beta1 * state.m[i]) + f(rest1 * u))
        if rule == "fedadagrad":
            after.v[i] = f(v + square)
        elif rule == "fedadam":
            after.v[i] = f(f(beta2 * v) + f(rest2 * square))
        else:
            after.v[i] = f(v - f(f(rest2 * square) * f(np.sign(v - square))))
        after.x[i] = f(state.x[i] - f(f(f(lr) * after.m[i]) / f(np.sqrt(after.v[i]) + f(tau))))
    return after


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("n", [0, 1, 7, 1000, 4097])
@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.0, 0.5)])
def test_the_kernel_is_the_reference_bit_for_bit(rule: str, n: int, betas: tuple[float, float]) -> None:
    state, update = made(n)
    for seed in (1, 2):
        given = update.copy()
        after = stepped(state, given, rule, betas, 0.03, 1e-3)
        assert given.tobytes() == update.tobytes()
        for fast, slow in zip(after, slow_step(state, update, rule, betas, 0.03, 1e-3), strict=True):
            assert fast.tobytes() == slow.tobytes()
        state, update = after, made(n, seed)[1]


@pytest.mark.parametrize(
    ("rule", "v"), [("fedadagrad", 4.25), ("fedadam", 0.5 * 0.25 + 0.5 * 4.0), ("fedyogi", 0.25 + 0.5 * 4.0)]
)
def test_one_coordinate_by_hand(rule: str, v: float) -> None:
    """beta1 = 3/4, beta2 = 1/2, m = 1, v = 1/4, update 2: m becomes 5/4."""
    state = State(*(np.array([value], np.float32) for value in (3.0, 1.0, 0.25)))
    after = stepped(state, np.array([2.0], np.float32), rule, (0.75, 0.5), 0.1, 0.5)
    assert after.m[0] == 0.75 * 1.0 + 0.25 * 2.0 == 1.25
    assert after.v[0] == v
    assert after.x[0] == pytest.approx(3.0 - 0.1 * 1.25 / (np.sqrt(v) + 0.5), rel=1e-7)


def test_adagrads_v_never_falls_and_the_others_forget() -> None:
    for rule in RULES:
        state, update = made(500)
        for seed in range(1, 20):
            after = stepped(state, update, rule, (0.9, 0.9), 0.01, 1e-3)
            fell = after.v < state.v
            assert np.any(fell) == (rule != "fedadagrad")
            assert np.all(after.v >= 0)
            state, update = after, made(500, seed)[1]


def test_yogis_v_moves_by_its_share_of_the_square_towards_it() -> None:
    state, update = made(2000)
    square = update * update
    after = stepped(state, update, "fedyogi", (0.9, 0.99), 0.01, 1e-3)
    part = np.float32(1 - 0.99) * square
    above, below = state.v > square, state.v < square
    assert min(above.sum(), below.sum(), (state.v == square).sum()) > 100
    np.testing.assert_array_equal(after.v[above], (state.v - part)[above])
    np.testing.assert_array_equal(after.v[below], (state.v + part)[below])
    np.testing.assert_array_equal(after.v[state.v == square], state.v[state.v == square])


def test_yogi_and_adam_agree_where_the_square_is_far_above() -> None:
    """Both raise v by (1 - beta2) of it; Adam lets go of (1 - beta2) of v besides."""
    n = 100
    state = State(np.zeros(n, np.float32), np.zeros(n, np.float32), np.full(n, 1e-8, np.float32))
    update = np.linspace(1, 2, n, dtype=np.float32)
    adam, yogi = (stepped(state, update, rule, (0.9, 0.99), 0.01, 1e-3) for rule in ("fedadam", "fedyogi"))
    np.testing.assert_allclose(adam.v, yogi.v, rtol=1e-6)
    far = stepped(state._replace(v=np.full(n, 100, np.float32)), update, "fedyogi", (0.9, 0.99), 0.01, 1e-3)
    assert np.all(100 - far.v <= 0.041)  # while Adam's falls by 1


@pytest.mark.parametrize("rule", RULES)
def test_as_an_optimizer_of_torch(rule: str) -> None:
    """v begins at tau^2, m at nothing, and the learning rate is the one that a scheduler has set."""
    state, update = made(100)
    x = torch.from_numpy(state.x.copy())
    optimizer = Adaptive(nn.Parameter(x), rule, lr=0.5, betas=(0.9, 0.99), eps=1e-3)
    optimizer.param_groups[0]["lr"] = 0.25
    optimizer.param_groups[0]["params"][0].grad = torch.from_numpy(update)
    tau2 = np.full(100, 1e-6, np.float32)
    expected = slow_step(State(state.x, np.zeros(100, np.float32), tau2), update, rule, (0.9, 0.99), 0.25, 1e-3)
    optimizer.step()
    assert x.numpy().tobytes() == expected.x.tobytes()


def test_many_small_updates_take_steps_of_the_learning_rate() -> None:
    """An update that is always the same, far above tau, moves each coordinate by lr, whatever its size."""
    x = np.zeros(3, np.float32)
    state = State(x, np.zeros(3, np.float32), np.full(3, 1e-12, np.float32))
    update = np.array([0.1, -1.0, 30.0], np.float32)
    for _ in range(2000):
        before, state = state, stepped(state, update, "fedadam", (0.9, 0.99), 0.01, 1e-6)
    np.testing.assert_allclose(before.x - state.x, 0.01 * np.sign(update), rtol=1e-3)
