"""Error feedback: nothing is lost, it converges where compression alone does not, and a checkpoint changes nothing."""

from __future__ import annotations

import json
import math
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ditherps import Address, Domain
from ditherps.codecs import Codec, parse
from ditherps.errors import DitherpsError, EncodingError, NonFiniteError, OptionError, PayloadError
from ditherps.feedback import ErrorFeedback, require_contractive

COARSE = "scaled:inner=(dqsg:levels=0.5,bucket=0)"
"""One bit a coordinate; omega is 1/3 of the squared ratio of the largest value to the RMS: about 5 on a Gaussian."""
CONTRACTIVE = ["none", "bf16", "scaled:inner=(dqsg:levels=1)", COARSE]


def at(round_: int, attempt: int = 0) -> Address:
    return Address(seed=7, round=round_, sender=3, domain=Domain.UPDATE, attempt=attempt)


def vector(seed: int, n: int = 5000) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


class Unchecked(ErrorFeedback):
    """Error feedback with a codec that it would refuse."""

    def __init__(self, codec: Codec, coordinates: int) -> None:
        super().__init__(parse("none"), coordinates)
        self.codec = codec


@pytest.mark.parametrize("spec", CONTRACTIVE)
@pytest.mark.parametrize("n", [0, 1, 4097])
def test_what_was_decoded_and_the_error_add_up_to_the_updates(spec: str, n: int) -> None:
    codec = parse(spec)
    feedback = ErrorFeedback(codec, n)
    given, got = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    scale = torch.zeros(n)
    for round_ in range(30):
        x = vector(round_, n)
        encoded = feedback.encode(x, at(round_))
        scale = torch.maximum(scale, feedback.corrected.abs())
        given += x
        got += codec.decode(encoded, at(round_))
        feedback.commit(included=True)
        # Each round rounds the sum and the difference once.
        assert bool(((given - got - feedback.error).abs() <= 2.0**-22 * (round_ + 1) * (scale + 1)).all())
    assert bool(feedback.error.any()) == (n > 0 and spec != "none")


def test_the_error_of_one_round() -> None:
    codec, x = parse(COARSE), vector(1)
    feedback = ErrorFeedback(codec, 5000)
    encoded = feedback.encode(x, at(0))
    assert encoded.to_bytes() == codec.encode(x, at(0)).to_bytes()
    assert torch.equal(feedback.corrected, x)
    assert not feedback.error.any()
    feedback.commit(included=True)
    assert torch.equal(feedback.error, x - codec.decode(encoded, at(0)))
    again = feedback.encode(x, at(1))
    assert again.to_bytes() == codec.encode(x + feedback.error, at(1)).to_bytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_taken_as_float32(dtype: torch.dtype) -> None:
    x = vector(1).to(dtype)
    one, other = ErrorFeedback(parse(COARSE), 5000), ErrorFeedback(parse(COARSE), 5000)
    assert one.encode(x, at(0)).to_bytes() == other.encode(x.float(), at(0)).to_bytes()


def test_what_did_not_enter_leaves_no_trace() -> None:
    feedback, other = (ErrorFeedback(parse(COARSE), 5000) for _ in range(2))
    for used in (feedback, other):
        used.encode(vector(1), at(0))
        used.commit(included=True)
    before = feedback.error.clone()
    feedback.encode(vector(2), at(1))
    feedback.commit(included=False)
    assert torch.equal(feedback.error, before)
    assert bool(before.any())
    assert feedback.encode(vector(3), at(2)).to_bytes() == other.encode(vector(3), at(2)).to_bytes()


def test_a_retry_gives_the_same_bytes() -> None:
    feedback = ErrorFeedback(parse(COARSE), 5000)
    feedback.encode(vector(1), at(0))
    feedback.commit(included=True)
    first = feedback.encode(vector(2), at(1)).to_bytes()
    assert [feedback.pending] == [at(1)]
    assert feedback.encode(vector(2), at(1)).to_bytes() == first
    feedback.commit(included=False)
    assert feedback.pending is None
    assert feedback.encode(vector(2), at(1)).to_bytes() == first
    feedback.commit(included=True)
    assert feedback.encode(vector(2), at(1)).to_bytes() != first


def test_each_contribution_is_committed_once() -> None:
    feedback = ErrorFeedback(parse(COARSE), 5000)
    with pytest.raises(DitherpsError, match="no contribution"):
        feedback.commit(included=True)
    feedback.encode(vector(1), at(4))
    with pytest.raises(EncodingError, match="round 4 attempt 0 has not been committed"):
        feedback.encode(vector(1), at(4, attempt=1))
    feedback.commit(included=True)
    error = feedback.error.clone()
    with pytest.raises(DitherpsError, match="no contribution"):
        feedback.commit(included=True)
    assert torch.equal(feedback.error, error)


def test_a_vector_that_cannot_be_encoded_changes_nothing() -> None:
    feedback = ErrorFeedback(parse(COARSE), 5000)
    feedback.encode(vector(1), at(0))
    feedback.commit(included=True)
    error, bad = feedback.error.clone(), vector(2)
    bad[17] = math.inf
    with pytest.raises(NonFiniteError, match="layer: coordinate 17 is inf"):
        feedback.encode(bad, at(1), name="layer")
    wrong: list[Tensor] = [vector(1, 4999), vector(1).reshape(1, -1), torch.ones(5000, dtype=torch.int32)]
    for x in wrong:
        with pytest.raises(EncodingError, match="need 5000 floats"):
            feedback.encode(x, at(1))
    assert feedback.pending is None
    assert torch.equal(feedback.error, error)


def test_it_takes_two_vectors() -> None:
    """Encoding and committing make no third vector of the model's size in torch, numpy or a codec (a payload apart)."""
    n = 1 << 20
    feedback, x = ErrorFeedback(parse("scaled:inner=(dqsg:levels=1)"), n), vector(1, n)
    storages = {feedback.error.data_ptr(), feedback.corrected.data_ptr()}
    feedback.encode(x, at(0))  # kernels are compiled
    feedback.commit(included=True)
    tracemalloc.start()
    for round_ in range(1, 4):
        size = feedback.encode(x, at(round_)).nbytes
        feedback.commit(included=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * size + 100_000 < 4 * n  # inner and outer payload, of this round and the last
    assert {feedback.error.data_ptr(), feedback.corrected.data_ptr()} == storages


@pytest.mark.parametrize("spec", ["scaled:inner=(dqsg:levels=1,bucket=64)", COARSE])
def test_the_error_stays_within_its_bound(spec: str) -> None:
    """Karimireddy et al., lemma 3, with the delta that the codec had in these rounds."""
    feedback, n = ErrorFeedback(parse(spec), 4096), 4096
    squares, largest, delta = 0.0, 0.0, 1.0
    for round_ in range(100):
        x = vector(round_, n)
        encoded = feedback.encode(x, at(round_))
        energy = float((feedback.corrected.double() ** 2).sum())
        delta = min(delta, 1 - feedback.codec.expected_squared_error(encoded) / energy)
        feedback.commit(included=True)
        squares = max(squares, float((x.double() ** 2).sum()))
        largest = max(largest, float((feedback.error.double() ** 2).sum()))
    assert 0 < delta < 1
    assert largest < 4 * (1 - delta) / delta**2 * squares
    assert largest > 0.05 * squares


Step = Callable[[Tensor, int], Tensor]


def with_feedback(feedback: ErrorFeedback) -> Step:
    def step(gradient: Tensor, round_: int) -> Tensor:
        decoded = feedback.codec.decode(feedback.encode(gradient, at(round_)), at(round_))
        feedback.commit(included=True)
        return decoded

    return step


def alone(codec: Codec) -> Step:
    return lambda gradient, round_: codec.decode(codec.encode(gradient, at(round_)), at(round_))


def test_signs_converge_with_feedback_and_not_without() -> None:
    """Least squares on positive features, one sample a step: all signs of a gradient are equal (the counterexample of
    Karimireddy et al., section 3), so signs alone move along one direction only.
    """
    features, start = torch.rand(8, 4, generator=torch.Generator().manual_seed(1)), vector(1, 4)

    def distance(step: Step) -> float:
        w = start
        for round_ in range(2000):
            a = features[round_ % 8]
            w = w - 0.5 * step(a * (a @ w), round_)
        return float(w @ w / (start @ start))

    signs = parse("signsgd:bucket=0")
    assert distance(lambda gradient, round_: gradient) < 1e-6
    assert distance(alone(signs)) > 0.1
    assert distance(with_feedback(ErrorFeedback(signs, 4))) < 1e-6


def test_feedback_diverges_with_what_is_refused_and_converges_once_it_is_scaled() -> None:
    """One bit a coordinate on a quadratic of 64 coordinates, curvatures 1/10 to 1: omega is about 2."""
    inner = "dqsg:levels=0.5,bucket=0"
    curvature = torch.logspace(-1, 0, 64)

    def distance(step: Step, rounds: int) -> float:
        w = torch.ones(64)
        for round_ in range(rounds):
            w = w - 0.1 * step(curvature * w, round_)
        return float(w @ w) / 64

    with pytest.raises(OptionError):
        ErrorFeedback(parse(inner), 64)
    assert distance(with_feedback(Unchecked(parse(inner), 64)), 100) > 10
    assert distance(with_feedback(Unchecked(parse(inner), 64)), 200) > 10_000
    assert distance(with_feedback(ErrorFeedback(parse(f"scaled:inner=({inner})"), 64)), 1000) < 1e-9


class TestRefusal:
    @pytest.mark.parametrize("spec", CONTRACTIVE)
    def test_contractive_codecs_are_taken(self, spec: str) -> None:
        require_contractive(parse(spec))

    @pytest.mark.parametrize(
        ("spec", "advice"),
        [
            ("dqsg", "scaled:inner=(dqsg)"),
            ("dqsg:levels=0.5,bucket=64", "scaled:inner=(dqsg:levels=0.5,bucket=64)"),
            ("ndqsg", "scaled:inner=(dqsg)"),
        ],
    )
    def test_others_are_refused_in_one_line_that_says_what_to_use(self, spec: str, advice: str) -> None:
        with pytest.raises(OptionError) as refused:
            ErrorFeedback(parse(spec), 10)
        message = str(refused.value)
        assert message.endswith(f"such as {advice}")
        assert spec.partition(":")[0] in message
        assert "\n" not in message
        require_contractive(parse(advice))


def saved_and_loaded(feedback: ErrorFeedback, folder: Path) -> ErrorFeedback:
    """Through files: tensors as safetensors, the rest as JSON."""
    state = feedback.state_dict()
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    scalars = {key: value for key, value in state.items() if key not in tensors}
    save_file(tensors, folder / "state.safetensors")
    (folder / "state.json").write_text(json.dumps(scalars))
    other = ErrorFeedback(parse(COARSE), len(feedback.error))
    other.load_state_dict(load_file(folder / "state.safetensors") | json.loads((folder / "state.json").read_text()))
    return other


class TestState:
    @pytest.mark.parametrize("pending", [False, True])
    def test_a_checkpoint_in_the_middle_changes_no_byte(self, pending: bool, tmp_path: Path) -> None:
        """Between two rounds, and between a push and its result."""
        one = other = ErrorFeedback(parse(COARSE), 5000)

        def rounds(feedback: ErrorFeedback) -> list[bytes]:
            found = []
            for round_ in range(3, 8):
                found.append(feedback.encode(vector(round_), at(round_)).to_bytes())
                feedback.commit(included=round_ % 2 == 0)
            return found

        for round_ in range(3):
            one.encode(vector(round_), at(round_))
            one.commit(included=True)
        if pending:
            one.encode(vector(2), at(2, attempt=1))
        other = saved_and_loaded(one, tmp_path)
        assert other.pending == one.pending == (at(2, attempt=1) if pending else None)
        if pending:
            one.commit(included=True)
            other.commit(included=True)
        assert torch.equal(one.error, other.error)
        assert bool(one.error.any())
        assert rounds(one) == rounds(other)

    def test_a_state_is_taken_over_whole_or_not_at_all(self) -> None:
        feedback = ErrorFeedback(parse(COARSE), 500)
        for round_ in range(2):
            feedback.encode(vector(round_, 500), at(round_))
            feedback.commit(included=True)
        feedback.encode(vector(2, 500), at(2))
        state = {k: v.clone() if isinstance(v, Tensor) else v for k, v in feedback.state_dict().items()}
        payload = state["payload"]
        assert isinstance(payload, Tensor)
        damaged = payload.clone()
        damaged[-1] ^= 1
        wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
            ({"version": 2}, OptionError, "state.version = 2"),
            ({"codec": "none"}, OptionError, "state.codec = 'none'"),
            ({"options": 5}, OptionError, "state.options = 5"),
            ({"error": torch.zeros(499)}, OptionError, "state.error = "),
            ({"error": torch.zeros(500, dtype=torch.float64)}, OptionError, "state.error = "),
            ({"error": torch.full((500,), math.nan)}, OptionError, "state.error = 'NaN"),
            ({"error": None}, OptionError, "state.error = "),
            ({"corrected": torch.full((500,), math.inf)}, OptionError, "state.corrected = 'NaN"),
            ({"corrected": None}, OptionError, "state.corrected = "),
            ({"payload": None}, OptionError, "state.payload = "),
            ({"payload": damaged}, PayloadError, "checksum"),
            ({"payload": payload[:20]}, PayloadError, "shorter"),
            ({"address.round": None}, OptionError, "address.round = None"),
            ({"address.domain": 99}, OptionError, "address.domain = 99"),
        ]
        other = ErrorFeedback(parse(COARSE), 500)
        for changes, error, says in wrong:
            with pytest.raises(error, match=says):
                other.load_state_dict(state | changes)
            assert other.pending is None
            assert not other.error.any()
        other.load_state_dict(state)
        assert torch.equal(other.error, feedback.error)
        feedback.commit(included=True)
        other.commit(included=True)
        assert torch.equal(other.error, feedback.error)
        kept = state["error"]
        assert isinstance(kept, Tensor)
        assert bool(kept.any()), "a state that was taken over is not written to"
