"""What a worker computes: a function of job, index and round alone, equal to plain torch, on dithers of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ditherps import codec, dither, gradient, sampling
from ditherps.codecs import Role
from ditherps.config import JobConfig, LocalConfig, SplitConfig
from ditherps.dither import SERVER, Address, Domain, permutation, words_at
from ditherps.layout import FlatModel
from ditherps_server.rounds import assign_roles
from ditherps_worker import compute
from ditherps_worker.compute import Computer, Update
from tests.tiny import Tiny

CPU = torch.device("cpu")


def job(**options: Any) -> JobConfig:
    return JobConfig(task="tiny", **{"workers": 3, "model": "wide", "batch_size": 8, "seed": 21, **options})


def computer(settings: JobConfig, index: int = 1) -> Computer:
    return Computer(settings, index, Tiny(), None, CPU)


def computed(made: Computer, round_: int, start: Tensor, buffers: bytes) -> tuple[Tensor, Update]:
    """The update of a round from a given model, as a worker's loop makes it."""
    with torch.no_grad():
        made.model.flat.copy_(start)
    made.model.load_buffers(buffers)
    update = made.update(round_)
    return update.vector.clone(), update


MODES = {"gradient": {}, "local": {"mode": "local", "local": LocalConfig(steps=3, lr=0.1, momentum=0.9)}}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", ["wide", "norm"])
class TestFunctionOfTheRound:
    def test_what_was_computed_before_changes_no_bit(self, model: str, mode: str) -> None:
        settings = job(model=model, **MODES[mode])
        used, fresh = computer(settings), computer(settings)
        start, buffers = used.model.flat.clone(), used.model.buffers()
        first, _ = computed(used, 40, start, buffers)
        for round_ in (41, 7, 0, 300):
            torch.randn(3)  # whatever else draws from torch's generator
            computed(used, round_, start + 0.01, buffers)
        again, update = computed(used, 40, start, buffers)
        assert torch.equal(again, first)
        torch.manual_seed(99)
        elsewhere, other = computed(fresh, 40, start, buffers)
        assert torch.equal(elsewhere, first)
        assert (update.buffers, update.loss, update.samples) == (other.buffers, other.loss, other.samples)

    def test_round_worker_seed_and_model_all_count(self, model: str, mode: str) -> None:
        settings = job(model=model, **MODES[mode])
        base = computer(settings)
        start, buffers = base.model.flat.clone(), base.model.buffers()
        found = [
            computed(base, 3, start, buffers)[0],
            computed(base, 4, start, buffers)[0],
            computed(computer(settings, 2), 3, start, buffers)[0],
            computed(computer(settings.model_copy(update={"seed": 22})), 3, start, buffers)[0],
            computed(base, 3, start * 1.01, buffers)[0],
        ]
        for place, one in enumerate(found):
            assert float(one.abs().max()) > 0
            for other in found[:place]:
                assert not torch.equal(one, other)


def batch(settings: JobConfig, index: int, first: int) -> tuple[Tensor, Tensor]:
    """Input and labels of the batch at a position of a worker's walk, from the addresses alone."""
    samples = Tiny().load(None, train=True)
    shard = sampling.split(samples, settings.workers, settings.seed, settings.split.kind, settings.split.alpha)[index]
    rows, keys = [], []
    for position in range(first, first + settings.batch_size):
        epoch, offset = divmod(position, len(shard))
        order = permutation(Address(settings.seed, epoch, index, Domain.ORDER), len(shard))
        rows.append(int(shard[order[offset]]))
        keys.append(words_at(Address(settings.seed, epoch, SERVER, Domain.AUGMENTATION), rows[-1]))
    features = Tiny().inputs(settings.model, samples.features[rows], np.array(keys, np.uint64))
    return features, samples.labels[rows]


def torch_seed(settings: JobConfig, index: int, round_: int) -> int:
    word = dither.words(Address(settings.seed, round_, index, Domain.COMPUTE), 1)[0]
    return int(word) & (2**63 - 1)


def flat(module: nn.Module, of: Callable[[nn.Parameter], Tensor | None]) -> Tensor:
    values = [of(parameter) for parameter in module.parameters()]
    return torch.cat([value.detach().reshape(-1) for value in values if value is not None])


@pytest.mark.parametrize("model", ["wide", "norm", "linear"])
@pytest.mark.parametrize("round_", [0, 4, 5])
def test_a_gradient_is_plain_torchs(model: str, round_: int) -> None:
    """Rounds 4 and 5 take their batches from two epochs: a shard has 33 or 34 samples, a batch 8."""
    settings = job(model=model)
    module = Tiny().build(model, settings.seed)
    features, labels = batch(settings, 1, round_ * settings.batch_size)
    torch.manual_seed(torch_seed(settings, 1, round_))
    loss = nn.functional.cross_entropy(module.train()(features), labels)
    loss.backward()  # type: ignore[no-untyped-call]
    update = computer(settings).update(round_)
    assert torch.equal(update.vector, flat(module, lambda p: p.grad))
    assert update.loss == float(loss.detach())
    assert update.samples == settings.batch_size
    assert update.buffers == FlatModel(module).buffers()


@pytest.mark.parametrize("model", ["wide", "norm"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_local_mode_is_a_plain_loop_of_sgd(model: str, momentum: float) -> None:
    steps, round_ = 5, 2
    settings = job(model=model, mode="local", local=LocalConfig(steps=steps, lr=0.2, momentum=momentum))
    made = computer(settings)
    made.update(0)  # leaves no state behind
    module = Tiny().build(model, settings.seed)
    with torch.no_grad():
        made.model.flat.copy_(flat(module, lambda p: p))
    made.model.load_buffers(FlatModel(Tiny().build(model, settings.seed)).buffers())
    before = flat(module, lambda p: p).clone()
    torch.manual_seed(torch_seed(settings, 1, round_))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.2, momentum=momentum)
    losses = []
    for step in range(steps):
        features, labels = batch(settings, 1, (round_ * steps + step) * settings.batch_size)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(module.train()(features), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    update = made.update(round_)
    assert torch.equal(update.vector, before - flat(module, lambda p: p))
    assert update.loss == pytest.approx(sum(losses) / steps, rel=1e-6)
    assert update.samples == steps * settings.batch_size
    assert update.buffers == FlatModel(module).buffers()
    assert losses[-1] != losses[0]


@pytest.mark.parametrize("model", ["wide", "norm", "linear"])
@pytest.mark.parametrize("options", [*MODES.values(), {"mode": "local", "local": LocalConfig(steps=4, proximal_mu=3)}])
def test_w_is_as_before_bit_for_bit(model: str, options: dict[str, Any]) -> None:
    """Steps of w are taken where the last round began, so computing must leave no trace in it."""
    made = computer(job(model=model, **options))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        made.model.flat.copy_(torch.randn(made.model.flat.shape, generator=generator) * 0.3)
        made.model.flat[::9] = -0.0
    before, buffers = made.model.flat.numpy().tobytes(), made.model.buffers()
    for round_ in range(3):
        update = made.update(round_)
        assert update.vector is made.model.gradient
        assert float(update.vector.abs().max()) > 0
        assert made.model.flat.numpy().tobytes() == before
    assert (made.model.buffers() == buffers) == (model != "norm")


class TestProximal:
    def local(self, mu: float, model: str = "wide", **options: Any) -> Tensor:
        settings = LocalConfig.model_validate({"steps": 5, "lr": 0.2, "proximal_mu": mu, **options})
        return computer(job(model=model, mode="local", local=settings)).update(2).vector.clone()

    def test_without_mu_there_is_no_pull(self) -> None:
        plain = computer(job(mode="local", local=LocalConfig(steps=5, lr=0.2))).update(2).vector
        assert torch.equal(self.local(0.0), plain)
        assert not torch.equal(self.local(1e-3), plain)

    def test_the_first_step_feels_no_pull(self) -> None:
        assert torch.equal(self.local(4.0, steps=1), self.local(0.0, steps=1))

    def test_the_more_pull_the_nearer(self) -> None:
        moved = [float(self.local(mu, "linear", steps=30, lr=0.1).norm()) for mu in (0.0, 0.1, 0.5, 2.0)]
        assert moved == sorted(moved, reverse=True)
        assert moved[-1] < 0.5 * moved[0]

    def test_full_pull_leaves_only_the_last_gradient_step(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """At mu = 1 / lr a step forgets all before it: w - lr (g + (w - w_round) / lr) = w_round - lr g."""
        far = computer(job(model="linear", mode="local", local=LocalConfig(steps=6, lr=0.2, proximal_mu=5)))
        base = far.model.flat.clone()
        seen: list[Tensor] = []
        backward = far._backward

        def noted(*arguments: Any) -> Tensor:
            loss = backward(*arguments)
            seen.append(far.model.gradient.clone())
            return loss

        monkeypatch.setattr(far, "_backward", noted)
        vector = far.update(2).vector
        assert len(seen) == 6
        torch.testing.assert_close(vector, 0.2 * seen[-1], rtol=1e-4, atol=1e-6)
        assert torch.equal(far.model.flat, base)

    @pytest.mark.parametrize("momentum", [0.0, 0.9])
    def test_it_is_the_gradient_of_the_penalty(self, momentum: float) -> None:
        """Plain torch, with mu/2 ||w - w_round||^2 in the loss."""
        settings = job(mode="local", local=LocalConfig(steps=5, lr=0.2, momentum=momentum, proximal_mu=0.7))
        module = Tiny().build("wide", settings.seed)
        base = [parameter.detach().clone() for parameter in module.parameters()]
        before = flat(module, lambda p: p).clone()
        torch.manual_seed(torch_seed(settings, 1, 2))
        optimizer = torch.optim.SGD(module.parameters(), lr=0.2, momentum=momentum)
        for step in range(5):
            features, labels = batch(settings, 1, (2 * 5 + step) * settings.batch_size)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(module.train()(features), labels)
            for parameter, start in zip(module.parameters(), base, strict=True):
                loss = loss + 0.7 / 2 * (parameter - start).square().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        expected = before - flat(module, lambda p: p)
        torch.testing.assert_close(computer(settings).update(2).vector, expected, rtol=1e-4, atol=1e-6)


def test_evaluation_leaves_the_model_alone() -> None:
    made = computer(job(model="norm"))
    made.update(0)
    before, buffers = made.model.flat.clone(), made.model.buffers()
    (loss, accuracy), samples = made.evaluate()
    assert samples == 50
    assert accuracy * 50 == pytest.approx(round(accuracy * 50))
    assert loss > 0
    assert torch.equal(made.model.flat, before)
    assert made.model.buffers() == buffers
    assert made.model.module.training


Use = tuple[object, ...]


class Ledger:
    """Who has used which coordinate of which dither."""

    def __init__(self) -> None:
        self.current: Use = ()
        self.users: dict[tuple[int, ...], dict[int, Use]] = {}
        self.uses: set[Use] = set()

    def note(self, address: Address, coordinates: range | list[int]) -> None:
        assert self.current, f"{address} is used by nobody knows whom"
        key = (address.seed, address.round, address.sender, int(address.domain), address.attempt)
        taken = self.users.setdefault(key, {})
        self.uses.add(self.current)
        for coordinate in coordinates:
            other = taken.setdefault(address.start + coordinate, self.current)
            assert other == self.current, f"{self.current} and {other} share {address} at {coordinate}"


@pytest.fixture
def ledger(monkeypatch: pytest.MonkeyPatch) -> Ledger:
    """Everything that reads the dither stream, written down by what it is read for."""
    book = Ledger()
    stream, lanes_at = Address.stream, dither.lanes_at

    def noted_stream(self: Address, count: int) -> Any:
        book.note(self, range(count))
        return stream(self, count)

    def noted_lanes_at(address: Address, positions: Any) -> Any:
        book.note(address, np.asarray(positions).reshape(-1).tolist())
        with monkeypatch.context() as plain:
            plain.setattr(Address, "stream", stream)
            return lanes_at(address, positions)

    def named(where: Any, name: str, use: Callable[..., Use]) -> None:
        inner = getattr(where, name)

        def call(*arguments: Any, **options: Any) -> Any:
            before, book.current = book.current, use(*arguments)
            try:
                return inner(*arguments, **options)
            finally:
                book.current = before

        monkeypatch.setattr(where, name, call)

    monkeypatch.setattr(Address, "stream", noted_stream)
    monkeypatch.setattr(dither, "lanes_at", noted_lanes_at)
    named(gradient, "words", lambda address, _: (*book.current, "torch"))
    named(compute, "split", lambda *_: ("split",))
    named(sampling, "permutation", lambda *_: (*book.current, "permutation"))
    named(sampling, "uniforms", lambda *_: (*book.current, "proportions"))
    named(sampling.Walk, "_order", lambda walk, epoch: ("order", walk._worker, epoch))
    return book


@pytest.mark.parametrize("kind", ["iid", "dirichlet"])
def test_no_two_uses_of_a_run_share_a_dither(ledger: Ledger, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = job(workers=2, codec="ndqsg", model="norm", split=SplitConfig(kind=kind))
    chosen = codec("ndqsg")
    roles = assign_roles((0, 1), 0.5)
    assert set(roles.values()) == set(Role)
    keys = sampling.augmentation_keys

    def one_by_one(seed: int, epochs: Any, ids: Any) -> Any:
        """Each sample's key is a use of its own; a sample that another worker has too would be a second one."""
        worker = ledger.current[1]
        found = []
        for epoch, sample in zip(epochs.tolist(), ids.tolist(), strict=True):
            ledger.current = ("augmentation", worker, epoch, sample)
            found.append(keys(seed, np.array([epoch]), np.array([sample])))
        return np.concatenate(found)

    monkeypatch.setattr(compute, "augmentation_keys", one_by_one)
    rounds = 16
    for index, role in roles.items():
        made = computer(settings, index)
        for round_ in [*range(rounds), 3]:  # one of them twice, as after a lost connection
            ledger.current = ("update", index, round_)
            vector = made.update(round_).vector
            for attempt in (0, 1):
                address = Address(settings.seed, round_, index, Domain.UPDATE, attempt)
                ledger.current = ("encode", index, round_, attempt)
                chosen.for_role(role).encode(vector, address)
    kinds = [use[0] for use in ledger.uses]
    assert kinds.count("encode") == 2 * rounds * 2
    assert len({use for use in ledger.uses if use[-1] == "torch"}) == 2 * rounds
    assert kinds.count("order") >= 2 * 2
    assert kinds.count("augmentation") == 2 * rounds * settings.batch_size
    assert kinds.count("split") == (1 if kind == "iid" else 2)


def test_the_ledger_finds_a_dither_that_is_used_twice(ledger: Ledger) -> None:
    x = torch.randn(300, generator=torch.Generator().manual_seed(0))
    dqsg = codec("dqsg")
    ledger.current = ("first",)
    dqsg.encode(x, Address(1, 0, 0, Domain.UPDATE))
    ledger.current = ("second",)
    dqsg.encode(x, Address(1, 0, 0, Domain.UPDATE, start=300))
    with pytest.raises(AssertionError, match="share"):
        dqsg.encode(x, Address(1, 0, 0, Domain.UPDATE, start=299))
