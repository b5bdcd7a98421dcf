"""Error feedback: what compression loses of one update is added to the next.

Seide, Fu, Droppo, Li, Yu: "1-bit stochastic gradient descent and its application to data-parallel distributed training
of speech DNNs" (Interspeech 2014); Stich, Cordonnier, Jaggi: "Sparsified SGD with memory" (arXiv 1809.07599);
Karimireddy, Rebjock, Stich, Jaggi: "Error feedback fixes SignSGD and other gradient compression schemes" (arXiv
1901.09847).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ditherps.codecs import Codec, Encoded
from ditherps.codecs import codec as make_codec
from ditherps.dither import Address
from ditherps.errors import DitherpsError, EncodingError, OptionError
from ditherps.kernels.cpu import INFINITY_BITS, accumulate_float32, largest_bits

StateDict: TypeAlias = dict[str, Tensor | int | str]

_STATE_VERSION = 1
_ADDRESS = ("seed", "round", "sender", "domain", "attempt", "start")


def require_contractive(codec: Codec) -> None:
    """Raise OptionError unless error feedback converges with this codec.

    With E||C(x) - x||^2 <= (1 - delta) ||x||^2 the squared error that is carried stays within 4 (1 - delta) / delta^2
    squared updates (Karimireddy et al., lemma 3). With a factor above 1, as an unbiased codec may have it, it grows
    from round to round without bound.
    """
    if codec.contractive:
        return
    inner = codec.spec
    try:
        make_codec("scaled", inner=inner)
    except OptionError:
        inner = "dqsg"
    raise OptionError("codec", codec.spec, f"with error feedback a contractive one, such as scaled:inner=({inner})")


@dataclass(frozen=True, slots=True)
class _Pending:
    address: Address
    encoded: Encoded


class ErrorFeedback:
    """One sender's codec with memory: e, what the model has not yet got of all updates that entered it.

    `encode` sends C(x + e). When the result of the round is known, `commit` follows: if the contribution entered, then
    e <- (x + e) - C(x + e). So after any number of rounds the decoded contributions and e add up to the updates, to the
    accuracy of float32.

    If it did not enter (late, or its round was abandoned), e stays what it was and x is dropped, as a late update is
    without error feedback. Thereby e is a function of the rounds that the sender's updates entered, and so a run is a
    function of who took part in which round: whether an absent worker had computed something makes no difference. The
    alternative, e <- x + e, loses nothing; but then updates computed for old models enter all at once after a long
    absence, e is bounded by no multiple of one update any more, and a run depends on what was lost on the way.

    Memory: two float32 vectors on the CPU, e and the pending x + e, and the pending payload. Not thread-safe.
    """

    def __init__(self, codec: Codec, coordinates: int) -> None:
        """e = 0.

        Args:
            codec: contractive, see `Codec.contractive`.
            coordinates: length of the vectors.

        Raises:
            OptionError: the codec is not contractive; it says what to use instead.
        """
        require_contractive(codec)
        self.codec = codec
        self._error = torch.zeros(coordinates, dtype=torch.float32)
        self._corrected = torch.zeros(coordinates, dtype=torch.float32)
        self._pending: _Pending | None = None

    @property
    def error(self) -> Tensor:
        """e, float32; not a copy."""
        return self._error

    @property
    def corrected(self) -> Tensor:
        """x + e of the last `encode`, float32, until its commit; not a copy."""
        return self._corrected

    @property
    def pending(self) -> Address | None:
        """The address of the contribution whose result is not known yet."""
        return self._pending.address if self._pending else None

    @property
    def encoded(self) -> Encoded | None:
        """The payload of the contribution whose result is not known yet."""
        return self._pending.encoded if self._pending else None

    def encode(self, x: Tensor, address: Address, *, name: str | Callable[[int], str] = "update") -> Encoded:
        """Encode x + e. The same vector at the same address gives the same bytes until the commit.

        Args:
            x: 1-D float16, bfloat16, float32 or float64 tensor on any device.
            address: of x[0]'s dither.
            name: as in `Codec.encode`.

        Raises:
            NonFiniteError, EncodingError: as `Codec.encode`; e is unchanged, and nothing is pending.
            EncodingError: a contribution with another address is pending, or x has another length.
        """
        if self._pending is not None and self._pending.address != address:
            there = self._pending.address
            raise EncodingError(f"the result of round {there.round} attempt {there.attempt} has not been committed")
        if x.shape != self._error.shape or not x.is_floating_point():
            raise EncodingError(f"need {len(self._error)} floats, got {tuple(x.shape)} {x.dtype}")
        self._pending = None
        self._corrected.copy_(x.detach())
        # Read-only, as payloads are: the kernel is compiled for each type.
        error = self._error.numpy().view()
        error.flags.writeable = False
        accumulate_float32(error, self._corrected.numpy(), np.float32(1))
        encoded = self.codec.encode(self._corrected, address, name=name)
        self._pending = _Pending(address, encoded)
        return encoded

    def commit(self, included: bool) -> None:
        """The result of the pending contribution: whether it entered its round. Once for each contribution.

        Raises:
            DitherpsError: nothing is pending.
        """
        pending = self._pending
        if pending is None:
            raise DitherpsError("error feedback has no contribution to commit")
        if included:
            self.codec.accumulate(pending.encoded, pending.address, self._corrected, -1.0)
            self._error, self._corrected = self._corrected, self._error
        self._pending = None

    def state_dict(self) -> StateDict:
        """Everything that the next bytes depend on: tensors (for safetensors), integers and strings (for JSON).

        A pending contribution is part of it, so that a worker which ends between its push and the round's result can go
        on. The tensors are not copies: write or copy them before the next `encode` or `commit`.
        """
        state: StateDict = {
            "version": _STATE_VERSION,
            "codec": self.codec.name,
            "options": self.codec.digest,
            "error": self._error,
        }
        if self._pending is not None:
            state["corrected"] = self._corrected
            # torch takes no read-only memory without a warning, and a payload is small.
            state["payload"] = torch.from_numpy(self._pending.encoded.data.copy())
            address = asdict(self._pending.address)
            state |= {f"address.{key}": int(address[key]) for key in _ADDRESS}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state, which is copied; nothing changes where it is refused.

        Raises:
            OptionError: it is another version's, another codec's, of another length, or damaged.
            PayloadError: the pending contribution is damaged.
        """
        self._check(state, "version", _STATE_VERSION)
        self._check(state, "codec", self.codec.name)
        self._check(state, "options", self.codec.digest)
        error, pending, corrected = self._vector(state, "error"), None, None
        if "payload" in state:
            corrected = self._vector(state, "corrected")
            payload = state["payload"]
            if not isinstance(payload, Tensor) or payload.dtype != torch.uint8 or payload.dim() != 1:
                raise OptionError("state.payload", type(payload).__name__, "a 1-D uint8 tensor")
            encoded = Encoded.from_bytes(payload.detach().cpu().numpy().tobytes())
            self.codec.validate(encoded, len(error))
            address: dict[str, Any] = {key: state.get(f"address.{key}") for key in _ADDRESS}
            pending = _Pending(Address(**address), encoded)
        self._error.copy_(error)
        if corrected is not None:
            self._corrected.copy_(corrected)
        self._pending = pending

    def _check(self, state: Mapping[str, Any], key: str, expected: int | str) -> None:
        if state.get(key) != expected:
            raise OptionError(f"state.{key}", state.get(key), f"{expected}, as this codec's")

    def _vector(self, state: Mapping[str, Any], key: str) -> Tensor:
        found, n = state.get(key), len(self._error)
        if not isinstance(found, Tensor) or found.dtype != torch.float32 or found.shape != (n,):
            got = f"{tuple(found.shape)} {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
            raise OptionError(f"state.{key}", got, f"a float32 tensor of {n} coordinates")
        here = found.detach().cpu().contiguous()
        if largest_bits(here.numpy().view(np.int32), 0, n) >= INFINITY_BITS:
            raise OptionError(f"state.{key}", "NaN or infinity", "finite values")
        return here
