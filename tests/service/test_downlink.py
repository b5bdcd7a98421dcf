"""The way down, end to end in one thread: what the server broadcasts, a worker takes, and both hold the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import ditherps
from ditherps import downlink, wire
from ditherps.codecs import Codec, codec_names, parse
from ditherps.codecs.omega import relative_error
from ditherps.config import DownlinkConfig
from ditherps.dither import SERVER, Domain
from ditherps.errors import NonFiniteError, OptionError, PayloadError, Reason, RefusedError
from ditherps.layout import FlatModel
from ditherps.v1 import parameter_server_pb2 as pb
from ditherps_server.broadcast import Answer, Broadcast, StepReport
from ditherps_server.model import ServerModel
from ditherps_worker.held import HeldModel
from tests.tiny import Tiny

SEED = 7
CODECS = (
    "dqsg", "dqsg:coder=rans,resolution=3", "dqsg:coder=rans,resolution=3,reconstruct=matched", "bf16",
    "topk", "signsgd", "eden:bits=1", "randk", "scaled:inner=(dqsg:levels=0.5,bucket=64)", "rotated", "tensors",
)  # fmt: skip


OTHER_KIND = {
    "ndqsg": "dqsg", "randk": "topk", "globalrandk": "topk", "terngrad": "qsgd", "maxnorm": "qsgd",
    "maxnorm-multiscale": "qsgd",
}  # fmt: skip


class Link:
    """A server's model and broadcast, and what a message of it is to a worker."""

    def __init__(self, spec: str = "dqsg", model: str = "wide", **config: Any) -> None:
        self.config = DownlinkConfig(codec=spec, **config)
        self.task, self.name = Tiny(), model
        self.model = ServerModel(self.task.build(model, 1))
        self.codec = self._codec()
        self.broadcast = Broadcast(self.config, SEED, self.model, self.codec)
        self.initial_digest = self.model.digest
        self._scratch = torch.empty_like(self.model.x)
        self._generator = torch.Generator().manual_seed(3)

    def _codec(self) -> Codec | None:
        found = downlink.downlink_codec(self.config, ditherps.codec("dqsg"))
        return found and found.for_layout(self.model.layout)

    def advance(self, move: Tensor | None = None) -> StepReport | None:
        """x moves, w follows, the version grows."""
        with torch.no_grad():
            self.model.x.add_(torch.randn(len(self.model.x), generator=self._generator) if move is None else move)
        report = self.broadcast.step(self._scratch)
        buffers = bytes((self.model.version + n) % 251 for n in range(len(self.model.buffers)))
        self.model.advance(buffers)
        return report

    def worker(self, seed: int = 1) -> HeldModel:
        """A worker whose task builds its model from `seed`; the server's is built from 1."""
        model = FlatModel(self.task.build(self.name, seed))
        return HeldModel(self.config, SEED, self._codec(), model, self.initial_digest)

    def pull(self, held: HeldModel) -> Answer:
        """Bring a worker to the present version, as the wire would."""
        answer = self.broadcast.answer(held.version, self.model.version, held.digest_due(), moving=False)
        receive(held, answer)
        return answer

    def same(self, held: HeldModel) -> bool:
        """Whether a worker holds the present version, bit for bit."""
        w, buffers = holdings(held)
        return held.version == self.model.version and torch.equal(w, self.model.w) and buffers == self.model.buffers


def holdings(held: HeldModel) -> tuple[Tensor, bytes]:
    held.restore_buffers()
    return held._model.flat, held._model.buffers()


def receive(held: HeldModel, answer: Answer, corrupt: int | None = None) -> pb.PullHeader:
    """Take an answer; `corrupt`: flip a bit of this byte of the content."""
    first, *chunks = answer.messages
    header = pb.PullResponse.FromString(first).header
    content = bytearray(b"".join(pb.PullResponse.FromString(message).chunk for message in chunks))
    assert wire.digest_of(content) == header.digest
    assert len(content) == answer.payload_bytes
    if corrupt is not None:
        content[corrupt] ^= 1
    at = 0
    for part in held.room(header):
        part[:] = content[at : at + len(part)]
        at += len(part)
    assert at == len(content)
    held.take(header)
    return header


@pytest.mark.parametrize("spec", CODECS)
@pytest.mark.parametrize("model", ["wide", "norm"])
def test_everybody_holds_the_same_bits(spec: str, model: str) -> None:
    """In every version, by steps one at a time, by several at once, and by a snapshot."""
    link = Link(spec, model, digest_every=1)
    always, sometimes, stranger = link.worker(), link.worker(), link.worker(seed=2)
    assert (always.version, stranger.version) == (0, None)
    for round_ in range(6):
        link.advance()
        answers = [link.pull(always)]
        if round_ % 3 == 2:
            answers += [link.pull(sometimes), link.pull(stranger)]
            assert link.same(sometimes)
            assert link.same(stranger)
        assert link.same(always)
        assert not any(answer.mismatch for answer in answers)
    assert not torch.equal(link.model.w, link.model.x)


def test_without_a_codec_w_is_x_and_travels_whole() -> None:
    link = Link("none")
    held = link.worker()
    assert link.same(held)
    assert link.advance() is None
    assert link.model.w is link.model.x
    answer = link.pull(held)
    assert (answer.snapshot, answer.steps, answer.snapshot_bytes) == ("none", 0, 4 * len(link.model.x))
    assert link.same(held)
    link.advance()
    assert not link.broadcast.answer(1, 2, link.broadcast._model.digest, moving=False).mismatch  # of 1 nothing is known
    again = link.broadcast.answer(2, 2, link.model.digest, moving=False)
    assert (again.snapshot, again.steps, again.payload_bytes) == ("", 0, len(link.model.buffers))


@pytest.mark.parametrize("absent", [1, 5, 500])
def test_an_absent_worker_gets_what_is_cheaper_and_the_bytes_are_the_predicted_ones(absent: int) -> None:
    link = Link("dqsg")
    held = link.worker()
    assert link.codec is not None
    link.advance()
    link.pull(held)
    sizes = [report.nbytes for report in (link.advance() for _ in range(absent)) if report]
    # Fixed width: header, a float32 step a bucket of 4096, five ternary indices a byte.
    n = len(link.model.x)
    buckets = -(-n // 4096)
    assert all(abs(size - (32 + 4 * buckets + n / 5)) < 16 for size in sizes)
    assert link.codec.max_nbytes(n) >= max(sizes)
    answer = link.pull(held)
    assert link.same(held)
    if absent <= 5:
        assert (answer.snapshot, answer.steps, answer.step_bytes) == ("", absent, sum(sizes))
    else:
        assert (answer.snapshot, answer.steps, answer.snapshot_bytes) == ("none", 0, 4 * n)
        assert answer.snapshot_bytes < sum(sizes)
    again = link.broadcast.answer(1, link.model.version, b"", moving=False)
    framing = sum(map(len, again.messages)) - again.payload_bytes
    assert framing <= 60 + 30 * (answer.steps + 1)


def test_steps_that_were_forgotten_are_replaced_by_a_snapshot() -> None:
    link = Link("dqsg", history_steps=2)
    held = link.worker()
    for _ in range(3):
        link.advance()
    assert link.pull(held).snapshot == "none"
    assert link.same(held)


class TestRoundedSnapshots:
    def test_w_is_rounded_everywhere_and_goes_whole_at_half_of_the_bytes(self) -> None:
        link = Link("dqsg", snapshot="bf16", snapshot_every=4)
        held, n = link.worker(), len(link.model.x)
        for version in range(1, 11):
            link.advance()
            link.pull(held)
            assert link.same(held)
            rounded = torch.equal(link.model.w.to(torch.bfloat16).float(), link.model.w)
            assert rounded == (version % 4 == 0)
            stranger = link.worker(seed=2)
            answer = link.pull(stranger)
            assert link.same(stranger)
            if version < 4:
                assert (answer.snapshot, answer.steps) == ("none", 0)
            else:
                assert (answer.snapshot, answer.snapshot_bytes, answer.steps) == ("bf16", 2 * n, version % 4)

    def test_what_rounding_lost_comes_with_the_next_steps(self) -> None:
        link = Link("dqsg:coder=rans,resolution=0.5", snapshot="bf16", snapshot_every=4)
        still = torch.zeros_like(link.model.x)
        errors = [float((link.model.x - link.model.w).norm()) for _ in range(12) if link.advance(still)]
        assert errors[3] > 10 * errors[2]  # version 4 is rounded
        assert errors[6] < 0.1 * errors[3]


class TestDigest:
    def test_what_is_not_the_servers_is_answered_with_a_snapshot(self) -> None:
        link = Link("dqsg", digest_every=2)
        held = link.worker()
        for _ in range(2):
            link.advance()
            link.pull(held)
        with torch.no_grad():
            held._w[5] += 1e-3  # a bit flipped in memory, say
        link.advance()
        answer = link.pull(held)
        assert answer.mismatch
        assert answer.snapshot == "none"
        assert link.same(held)
        link.advance()
        assert not link.pull(held).mismatch

    def test_it_is_shown_at_every_kth_version_and_where_there_is_doubt(self) -> None:
        link = Link("dqsg", digest_every=3)
        held, shown = link.worker(), []
        for _ in range(7):
            link.advance()
            shown.append(bool(held.digest_due()))
            link.pull(held)
        assert shown == [False, False, False, True, False, False, True]
        held.doubted = True
        assert held.digest_due() == link.model.digest
        link.pull(held)
        assert not held.doubted
        held.forget()
        assert held.digest_due() == b""

    def test_another_history_of_the_same_version_is_found_out(self) -> None:
        """As after a server that was started again from an older version, and went on with other workers."""
        link, other = Link("dqsg"), Link("dqsg")
        held = link.worker()
        for _ in range(2):
            link.advance()
            link.pull(held)
        other.advance()
        other.advance(torch.ones_like(other.model.x))
        held.doubted = True
        answer = other.pull(held)
        assert answer.mismatch
        assert other.same(held)

    def test_two_histories_that_agree_need_nothing_whole(self) -> None:
        link = Link("dqsg")
        held = link.worker()
        for _ in range(2):
            link.advance()
            link.pull(held)
        held.doubted = True
        answer = link.pull(held)
        assert (answer.mismatch, answer.payload_bytes) == (False, len(link.model.buffers))
        assert link.same(held)


class TestWhileTheModelMoves:
    def test_only_a_snapshot_that_was_made_before_is_sent(self) -> None:
        link = Link("dqsg")
        link.advance()
        for held, digest in ((None, b""), (0, b""), (0, bytes(16))):
            with pytest.raises(RefusedError) as caught:
                link.broadcast.answer(held, 1, digest, moving=True)
            assert caught.value.reason is Reason.VERSION_UNAVAILABLE
        first = link.broadcast.answer(None, 1, b"", moving=False)
        assert list(link.broadcast.answer(None, 1, b"", moving=True).messages) == list(first.messages)

    def test_answers_take_no_memory_but_for_one_snapshot(self) -> None:
        link = Link("dqsg")
        for _ in range(4):
            link.advance()
        answers = [
            link.broadcast.answer(held, 4, b"", moving=False) for held in (None, 0, 1, 2, 3, 4) for _ in range(3)
        ]
        assert [isinstance(answer.messages, list) for answer in answers] == [True] * 3 + [False] * 15
        assert len({id(answer.messages) for answer in answers[:3]}) == 1

    @pytest.mark.parametrize("version", [0, 2])
    def test_only_the_present_version_is_there(self, version: int) -> None:
        link = Link("dqsg")
        link.advance()
        with pytest.raises(RefusedError) as caught:
            link.broadcast.answer(None, version, b"", moving=False)
        assert caught.value.reason is Reason.VERSION_UNAVAILABLE


class TestStep:
    @pytest.mark.parametrize("spec", CODECS)
    def test_the_bound_that_the_rate_is_chosen_for(self, spec: str) -> None:
        """E||w' - x||^2 is at most omega / (1 + omega) of ||w - x||^2 (unbiased), omega of it (contractive)."""
        link, ratios, bounds = Link(spec), [], []
        assert link.codec is not None
        for _ in range(30):
            with torch.no_grad():
                link.model.w.copy_(link.model.x)
            move = torch.randn(len(link.model.x), generator=link._generator)
            report = link.advance(move)
            assert report is not None
            ratios.append(float(((link.model.x - link.model.w).norm() / move.norm()) ** 2))
            omega = report.nmse
            assert report.rate == pytest.approx(1.0 if link.codec.contractive else 1 / (1 + omega), rel=1e-6)
            bounds.append(omega if link.codec.contractive else omega / (1 + omega))
        found, bound = torch.tensor(ratios), float(torch.tensor(bounds).mean())
        assert float(found.mean()) < bound + 4 * float(found.std()) / len(found) ** 0.5 + 1e-6
        assert float(found.mean()) < 1

    @pytest.mark.parametrize("spec", ["dqsg", "randk:fraction=0.1", "topk:fraction=0.1"])
    def test_w_catches_up_with_an_x_that_stands_still(self, spec: str) -> None:
        link = Link(spec)
        link.advance()
        first = float((link.model.x - link.model.w).norm())
        for _ in range(200):
            link.advance(torch.zeros_like(link.model.x))
        assert float((link.model.x - link.model.w).norm()) < 0.05 * first

    def test_its_dither_is_the_servers_own(self) -> None:
        address = downlink.step_address(SEED, 12)
        assert (address.seed, address.round, address.sender, address.domain) == (SEED, 12, SERVER, Domain.DOWNLINK)

    def test_threads_change_no_bit(self) -> None:
        from concurrent.futures import ThreadPoolExecutor

        link = Link("dqsg:coder=rans,resolution=1")
        n = 700_001
        x = torch.randn(n, generator=torch.Generator().manual_seed(1))
        assert link.codec is not None
        address = downlink.step_address(SEED, 3)
        encoded, found = link.codec.encode(x, address), []
        with ThreadPoolExecutor(3) as pool:
            for threads in (None, pool):
                w = torch.ones(n)
                downlink.take_step(link.codec, encoded, address, 0.3, w, threads)
                found.append(w)
        assert torch.equal(*found)
        assert not torch.equal(found[0], torch.ones(n))

    @pytest.mark.parametrize("spec", ["dqsg", "none"])
    def test_a_model_that_has_diverged_is_named_and_w_stays(self, spec: str) -> None:
        link = Link(spec)
        link.model.part_w()
        before, name = link.model.w.clone(), link.model.layout.parameters[1].name
        with torch.no_grad():
            link.model.x[link.model.layout.starts[1]] = float("inf")
        with pytest.raises(NonFiniteError, match=name):
            link.broadcast.step(torch.empty_like(link.model.x))
        assert torch.equal(link.model.w, before)
        assert len(link.broadcast.history) == 0


class TestHostilePulls:
    """A worker checks what a server announces before it takes memory, and keeps what it holds."""

    @pytest.mark.parametrize(
        "changes",
        [
            {"encoding": pb.PULL_ENCODING_UNSPECIFIED},
            {"encoding": pb.PULL_ENCODING_SNAPSHOT},  # without parameters
            {"encoding": 77},
            {"from_version": 1},
            {"from_version": 2},  # no step left for two versions
            {"parameter_bytes": 1 << 60},
            {"parameter_bytes": 4},
            {"buffer_bytes": 1 << 60},
            {"to_version": 1},
            {"to_version": 1 << 60},
            {"steps": [pb.PullStep(bytes=1 << 60, rate=1), pb.PullStep(bytes=1, rate=1)]},
            {"steps": [pb.PullStep(bytes=40, rate=1)]},
            *({"steps": [pb.PullStep(bytes=40, rate=rate)] * 2} for rate in (0.0, -1.0, 1.5, float("nan"))),
        ],
        ids=str,
    )
    def test_a_header(self, changes: dict[str, Any]) -> None:
        link = Link("dqsg")
        held = link.worker()
        link.advance()
        link.advance()
        first = next(iter(link.broadcast.answer(0, 2, b"", moving=False).messages))
        header = pb.PullResponse.FromString(first).header
        for key, value in changes.items():
            if key == "steps":
                del header.steps[:]
                header.steps.extend(value)
            else:
                setattr(header, key, value)
        before = holdings(held)[0].clone()
        with pytest.raises(PayloadError):
            held.room(header)
        assert (held.version, torch.equal(holdings(held)[0], before)) == (0, True)
        link.pull(held)
        assert link.same(held)

    def test_a_malformed_step_changes_nothing(self) -> None:
        link = Link("dqsg")
        held = link.worker()
        link.advance()
        link.advance()
        before = holdings(held)[0].clone()
        size = link.broadcast.answer(0, 2, b"", moving=False).step_bytes
        for at in (0, 40, size // 2 + 3, size - 1):
            with pytest.raises(PayloadError):
                receive(held, link.broadcast.answer(0, 2, b"", moving=False), corrupt=at)
            assert (held.version, torch.equal(holdings(held)[0], before)) == (0, True)
        link.pull(held)
        assert link.same(held)

    def test_steps_where_there_is_no_codec_for_them(self) -> None:
        link, plain = Link("dqsg"), Link("none")
        link.advance()
        held = plain.worker()
        with pytest.raises(PayloadError):
            receive(held, link.broadcast.answer(0, 1, b"", moving=False))


class TestChoiceOfCodec:
    @pytest.mark.parametrize("name", codec_names())
    def test_the_default_is_the_uplinks_own_kind(self, name: str) -> None:
        uplink = ditherps.codec(name)
        found = downlink.downlink_codec(DownlinkConfig(), uplink)
        if name == "none":
            assert found is None
        else:
            assert found is not None
            assert found.name == OTHER_KIND.get(name, name)
            assert parse(found.spec) == found

    @pytest.mark.parametrize("name", sorted(set(codec_names()) - {"none", "topk", "randk", "globalrandk", "signsgd"}))
    def test_w_is_at_most_a_round_behind(self, name: str) -> None:
        """With values as heavy-tailed as differences of models are."""
        found = downlink.downlink_codec(DownlinkConfig(), ditherps.codec(name))
        assert found is not None
        generator = torch.Generator().manual_seed(4)
        x = torch.randn(50_000, generator=generator) * torch.exp(torch.randn(50_000, generator=generator))
        address = downlink.step_address(SEED, 1)
        omega = relative_error(found, x.numpy(), found.encode(x, address), address)
        assert downlink.lag_rounds(omega, downlink.memory_rate(found, omega)) < downlink.LAG_LIMIT

    @pytest.mark.parametrize(
        ("uplink", "expected"),
        [
            ("dqsg", "dqsg:step=rms,resolution=2"),
            ("dqsg:levels=7,bucket=512", "dqsg:step=rms,resolution=2,bucket=512"),
            ("dqsg:coder=rans", "dqsg:coder=rans"),
            ("dqsg:nmse=0.3", "dqsg:nmse=0.3"),
            ("dqsg:nmse=0.4", "dqsg:step=rms,resolution=2"),
            ("dqsg:bits=3", "dqsg:step=rms,resolution=2"),
            ("dqsg:coder=rans,resolution=3,reconstruct=matched", "dqsg:coder=rans,resolution=2,reconstruct=matched"),
            ("ndqsg:levels=5", "dqsg:step=rms,resolution=2,bucket=0"),
            ("qsgd", f"qsgd:step=rms,resolution={2**0.5}"),
            ("eden:bits=1", "eden:bits=1"),
            ("rotated:inner=(dqsg:levels=1),block=4096", "rotated:inner=(dqsg:step=rms,resolution=2),block=4096"),
            ("scaled:inner=(dqsg:levels=0.5)", "scaled:inner=(dqsg:step=rms,resolution=2)"),
            ("tensors", "tensors"),
            ("tensors:inner=(dqsg:nmse=2,bucket=0)", f"tensors:inner=(dqsg:nmse={1 / 3},bucket=0)"),
            ("terngrad:coder=rans", "qsgd:coder=rans"),
            ("maxnorm:bits=2", f"qsgd:step=rms,resolution={2**0.5},bucket=0"),
            ("topk:fraction=0.1", "topk:fraction=0.1"),
            ("randk:fraction=0.1,values=bf16", "topk:fraction=0.1,values=bf16"),
            ("globalrandk:fraction=0.1,bits=4", "topk:fraction=0.1"),
        ],
    )
    def test_its_step_is_fine_enough_for_w_to_keep_up(self, uplink: str, expected: str) -> None:
        found = downlink.downlink_codec(DownlinkConfig(), parse(uplink))
        assert found is not None
        assert (found.name, found.format_options()) == (parse(expected).name, parse(expected).format_options())
        if found.name == "dqsg":
            x = torch.randn(20_000, generator=torch.Generator().manual_seed(4)) ** 3
            address = downlink.step_address(SEED, 1)
            assert relative_error(found, x.numpy(), found.encode(x, address), address) < 0.34

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("ndqsg", "downlink.codec = 'ndqsg' is not allowed; allowed: a codec without side information, such as"),
            ("zip", "downlink.codec = 'zip'"),
            ("dqsg:levels=0", "downlink.levels = 0"),
            ("none", "downlink.snapshot = 'bf16' is not allowed"),
        ],
    )
    def test_what_cannot_be_is_refused_by_name(self, spec: str, message: str) -> None:
        with pytest.raises(OptionError) as caught:
            downlink.downlink_codec(DownlinkConfig(codec=spec, snapshot="bf16"), ditherps.codec("dqsg"))
        assert message in str(caught.value)

    def test_any_codec_can_be_given(self) -> None:
        for spec in CODECS:
            assert downlink.downlink_codec(DownlinkConfig(codec=spec), ditherps.codec("none")) == parse(spec)


@pytest.mark.parametrize("spec", ["dqsg", "dqsg:coder=rans,resolution=2,reconstruct=matched", "topk"])
def test_the_relative_error_is_that_of_this_vector(spec: str) -> None:
    codec, generator = parse(spec), torch.Generator().manual_seed(2)
    x = torch.randn(20_000, generator=generator)
    found, made = [], []
    for round_ in range(20):
        address = downlink.step_address(SEED, round_)
        encoded = codec.encode(x, address)
        found.append(relative_error(codec, x.numpy(), encoded, address))
        made.append(float(((codec.decode(encoded, address) - x).norm() / x.norm()) ** 2))
    error = torch.tensor(made)
    spread = 4 * float(error.std()) / len(made) ** 0.5
    assert float(torch.tensor(found).mean()) == pytest.approx(float(error.mean()), abs=spread + 1e-6)
    zero = torch.zeros(100)
    assert relative_error(codec, zero.numpy(), codec.encode(zero, address), address) == 0
