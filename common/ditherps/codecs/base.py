"""The codec interface (design, contract 2): what every scheme takes, gives and declares.

A codec is stateless and its instances are interchangeable: same name and options, same bytes. The byte layouts are in
proto/FORMAT.md.
"""

from __future__ import annotations

import enum
import json
import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeAlias

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from ditherps.dither import MAX_COORDINATES, TILE, Address
from ditherps.errors import ContextMismatchError, EncodingError, NonFiniteError, OptionError, PayloadError, Reason
from ditherps.layout import Layout
from ditherps.tags import TAGS

Span: TypeAlias = tuple[int, int]
Bytes: TypeAlias = NDArray[np.uint8]

FORMAT_VERSION = 2


class Role(enum.StrEnum):
    """What a worker's message is to the server in a round: side information for others, or decoded with it."""

    SOURCE = "source"
    NESTED = "nested"


@dataclass(frozen=True)
class Context:
    """What both ends were given or derive beside the message: nothing yet but its identity.

    Attributes:
        version: 0 for the empty context.
        digest: of the contents.
    """

    version: int = 0
    digest: bytes = b""

    @property
    def check(self) -> int:
        """32 bits that stand in each payload: 0 for the empty context."""
        return zlib.crc32(self.digest, self.version) if self != _EMPTY else 0


_EMPTY = Context()


@dataclass(frozen=True)
class DecodeReport:
    """What decoding met: coordinates and tiles seen, and tiles whose recovered indices do not match their check."""

    coordinates: int = 0
    tiles: int = 0
    failed_tiles: int = 0

    def __add__(self, other: DecodeReport) -> DecodeReport:
        return DecodeReport(
            self.coordinates + other.coordinates, self.tiles + other.tiles, self.failed_tiles + other.failed_tiles
        )


class Header(NamedTuple):
    """The fixed beginning of every payload; little-endian, `HEADER.size` bytes."""

    format: int
    tag: int
    flags: int
    options: int
    context: int
    tail_bytes: int
    coordinates: int
    check: int


HEADER = struct.Struct("<BBHIIQQI")
_CHECK_AT = HEADER.size - 4


def checksum(data: Bytes) -> int:
    """The low 32 bits of XXH3-64, which guards every part of a payload against accidents."""
    return xxhash.xxh3_64_intdigest(data.data) & 0xFFFFFFFF


def header_check(data: Bytes, sealed: int) -> int:
    """The header's `check`: of the first `sealed` bytes of a payload, without itself."""
    state = xxhash.xxh3_64(data[:_CHECK_AT].data)
    state.update(data[HEADER.size : sealed].data)
    return state.intdigest() & 0xFFFFFFFF


class Encoded:
    """An encoded vector: its bytes, with the header read and nothing copied.

    Attributes:
        header: the fields of the header.
        data: the whole payload, read-only uint8.
    """

    __slots__ = ("data", "header", "index")

    def __init__(self, data: Bytes, header: Header) -> None:
        self.data = data.view()
        self.data.flags.writeable = False
        self.header = header
        self.index: tuple[Codec, Any] | None = None  # what a codec found out when it checked these bytes

    @property
    def codec(self) -> str:
        """Name of the codec that wrote it."""
        return TAGS[self.header.tag]

    @property
    def coordinates(self) -> int:
        """Length of the vector."""
        return self.header.coordinates

    @property
    def nbytes(self) -> int:
        """Bytes of the payload, header included."""
        return self.data.size

    @property
    def bits_per_coordinate(self) -> float:
        """All bits of the payload over its coordinates (0 where there are none)."""
        return 8 * self.data.size / self.header.coordinates if self.header.coordinates else 0.0

    def to_bytes(self) -> bytes:
        """A copy of the payload."""
        return self.data.tobytes()

    @classmethod
    def from_bytes(cls, buffer: bytes | bytearray | memoryview | Bytes) -> Encoded:
        """Read a payload without copying it (unless it lies at an odd address) and check its header.

        The sections behind the header can only be checked by the codec with the right options: `Codec.validate`, which
        also every decoding does once.

        Raises:
            PayloadError: too short, another format version, unknown codec or flags, sizes that contradict each other.
        """
        data = np.frombuffer(buffer, np.uint8)
        if data.ctypes.data % 4:
            data = data.copy()
        if data.size < HEADER.size:
            raise PayloadError(f"payload of {data.size} bytes is shorter than its header of {HEADER.size}", Reason.SIZE)
        header = Header(*HEADER.unpack_from(data.data))
        if header.format != FORMAT_VERSION:
            raise PayloadError(f"payload has format version {header.format}, this is version {FORMAT_VERSION}")
        if header.tag not in TAGS:
            raise PayloadError(f"payload has unknown codec tag {header.tag}")
        if header.flags:
            raise PayloadError(f"payload has unknown flags {header.flags:#x}")
        if header.coordinates > MAX_COORDINATES:
            raise PayloadError(f"payload announces {header.coordinates} coordinates, beyond 2^35", Reason.SIZE)
        if header.tail_bytes > data.size - HEADER.size:
            raise PayloadError(
                f"payload announces {header.tail_bytes} bytes of its last section, more than it has", Reason.SIZE
            )
        return cls(data, header)


class Options(BaseModel):
    """Base of all option models; each field's description says what is allowed."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


def parse_options(model: type[Options], codec: str, values: dict[str, Any]) -> Options:
    """Validate; OptionError names the option, its value and what is allowed."""
    try:
        return model(**values)
    except ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][0]) if first["loc"] else "options"
        field = model.model_fields.get(option)
        allowed = (
            (field.description or str(first["msg"]))
            if field is not None
            else f"the options of {codec}: {', '.join(model.model_fields) or 'none'}"
        )
        raise OptionError(f"{codec}.{option}", first["input"], allowed) from None


class Codec(ABC):
    """One scheme with its options. Subclasses are registered in `ditherps.codecs`.

    Attributes:
        name: in job files and `ditherps.codec`.
        tag: in payloads.
        unbiased: decoding gives the vector in expectation over the dither.
        contractive: E||C(x) - x||^2 <= (1 - delta) ||x||^2 for every x and some delta > 0, which error feedback needs.
        needs_side_information: decoding needs a vector near the encoded one.
        summable: indices of several workers can be added before decoding, where these agree on the norm.
        roles: what workers that use it can be.
        chunk_coordinates: unit of `span`, a multiple of the tile.
    """

    name: ClassVar[str]
    tag: ClassVar[int]
    Options: ClassVar[type[Options]]
    unbiased: bool = True
    contractive: bool = False
    needs_side_information: ClassVar[bool] = False
    summable: ClassVar[bool] = False
    roles: ClassVar[tuple[Role, ...]] = (Role.SOURCE,)
    chunk_coordinates: int = TILE

    def __init__(self, **options: Any) -> None:
        self.options = parse_options(self.Options, self.name, options)
        canonical = json.dumps([self.name, self.format_options()], sort_keys=True, separators=(",", ":"))
        self.digest = zlib.crc32(canonical.encode())

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={v!r}' for k, v in self.options.model_dump().items())})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Codec) and self.name == other.name and self.options == other.options

    def __hash__(self) -> int:
        return hash((self.name, self.digest))

    @property
    def spec(self) -> str:
        """The codec as `ditherps.codecs.parse` reads it: its name, and the options that were given."""
        given = self.options.model_dump(mode="json", exclude_unset=True)
        texts = {key: f"{value:.0f}" if _is_whole(value) else str(value) for key, value in given.items()}
        values = (f"{key}=({text})" if set(",=:") & set(text) else f"{key}={text}" for key, text in texts.items())
        return self.name + ":" * bool(given) + ",".join(values)

    def format_options(self) -> dict[str, Any]:
        """The options on which the bytes or their meaning depend; their digest stands in the header."""
        return self.options.model_dump()

    def for_role(self, role: Role) -> Codec:
        """The codec that a worker of this role encodes with.

        Raises:
            OptionError: the codec has no such role.
        """
        if role not in self.roles:
            raise OptionError("role", str(role), [str(r) for r in self.roles])
        return self

    def for_model(self) -> Codec:
        """The same scheme for the steps of the model, where an error does not average out over workers, but lags."""
        return self

    def for_layout(self, layout: Layout) -> Codec:
        """The codec for vectors of this layout; another one only where it encodes tensor by tensor.

        Raises:
            OptionError: the options say otherwise than the layout.
        """
        return self

    @abstractmethod
    def max_nbytes(self, coordinates: int) -> int:
        """Upper bound of `Encoded.nbytes` for a vector of this length."""

    @abstractmethod
    def expected_squared_error(self, encoded: Encoded) -> float:
        """Sum over the coordinates of the expected squared error over the dither; NaN where the payload does not say.

        For nested indices: where decoding succeeds.
        """

    @abstractmethod
    def _encode(self, x: NDArray[np.float32], address: Address, context: Context) -> Encoded:
        """Encode; raises `BadInput` where the vector cannot be encoded."""

    def _encode_on(self, pool: Executor | None, x: NDArray[np.float32], address: Address, context: Context) -> Encoded:
        """`_encode` with threads, where a codec has use for them."""
        return self._encode(x, address, context)

    @abstractmethod
    def _index(self, encoded: Encoded) -> Any:
        """Check all sections of a payload whose header is right; return what decoding needs, or raise PayloadError."""

    @abstractmethod
    def _accumulate(
        self,
        encoded: Encoded,
        index: Any,
        address: Address,
        into: NDArray[np.float32],
        weight: np.float32,
        span: Span,
        side: NDArray[np.float32] | None,
    ) -> int:
        """into += weight * decoded; return the number of failed tiles."""

    def encode(
        self,
        x: Tensor,
        address: Address,
        context: Context | None = None,
        *,
        name: str | Callable[[int], str] = "update",
        pool: Executor | None = None,
    ) -> Encoded:
        """Encode a vector.

        Args:
            x: 1-D float16, bfloat16, float32 or float64 tensor on any device; may be empty.
            address: of x[0]'s dither.
            context: what both ends know beside the message.
            name: of the tensor in error messages, or a function from x's coordinate to that name.
            pool: threads that encode chunks of a codec whose chunks stand alone; the bytes are the same.

        Raises:
            NonFiniteError: x holds NaN or infinity.
            EncodingError: another dtype or shape, or values beyond what the format holds.
        """
        if x.dim() != 1 or x.dtype not in _DTYPES:
            title = name if isinstance(name, str) else "update"
            raise EncodingError(f"{title}: need a 1-D float tensor, got {x.dim()}-D {x.dtype}")
        values = x.detach().to("cpu", torch.float32).contiguous().numpy()
        try:
            return self._encode_on(pool, values, address, context or _EMPTY)
        except BadInput as bad:
            raise _explained(bad, x.detach(), values, name) from None

    def validate(self, encoded: Encoded, coordinates: int | None = None, context: Context | None = None) -> None:
        """Check a payload wholly: sizes, steps, escapes, finiteness; takes memory in proportion to its bytes.

        Args:
            encoded: as received.
            coordinates: the length that the vector must have.
            context: that this end holds.

        Raises:
            PayloadError: it is not a payload of this codec with these options, of this length, or is malformed.
            ContextMismatchError: it was encoded with another context.
        """
        if coordinates is not None and encoded.coordinates != coordinates:
            raise PayloadError(f"payload has {encoded.coordinates} coordinates, expected {coordinates}", Reason.SIZE)
        self._indexed(encoded, context)

    def decode(
        self,
        encoded: Encoded,
        address: Address,
        span: Span | None = None,
        side_information: Tensor | None = None,
        context: Context | None = None,
    ) -> Tensor:
        """Decode all coordinates, or those of `span`: float32 of that length. Parameters and errors as `accumulate`."""
        self._indexed(encoded, context)
        lo, hi = self._checked_span(encoded, span)
        into = torch.zeros(hi - lo, dtype=torch.float32)
        self.accumulate(encoded, address, into, 1.0, span, side_information, context)
        return into

    def accumulate(
        self,
        encoded: Encoded,
        address: Address,
        into: Tensor,
        weight: float,
        span: Span | None = None,
        side_information: Tensor | None = None,
        context: Context | None = None,
    ) -> DecodeReport:
        """into += weight * decoded: multiply, then add, in float32; no temporary of the model's size.

        Args:
            encoded: checked at its first use.
            address: the one it was encoded with.
            into: contiguous float32 CPU tensor of the span's length; into[0] is coordinate span[0].
            weight: rounded to float32 first.
            span: (lo, hi), lo a multiple of `chunk_coordinates`, hi one too or the end; default all.
            side_information: where the codec needs it, float32 of the span's length.
            context: that this end holds.

        Raises:
            PayloadError, ContextMismatchError: as `validate`.
            OptionError: a wrong span, or tensors that do not fit it.
        """
        index = self._indexed(encoded, context)
        lo, hi = self._checked_span(encoded, span)
        side = None
        if self.needs_side_information:
            if side_information is None:
                raise OptionError("side_information", None, f"a tensor: {self.name} cannot be decoded without")
            side = _vector(side_information, hi - lo, "side_information")
        target = _vector(into, hi - lo, "into")
        failed = self._accumulate(encoded, index, address, target, np.float32(weight), (lo, hi), side)
        return DecodeReport(hi - lo, -(-(hi - lo) // TILE), failed)

    def _finished(
        self, data: Bytes, coordinates: int, context: Context, tail_bytes: int = 0, sealed: int | None = None
    ) -> Encoded:
        """The payload whose sections are in `data` behind room for the header, which is written here, checksum last.

        Args:
            data: writable, not needed by the caller any more.
            coordinates: of the vector.
            context: that it was encoded with.
            tail_bytes: length of its last section, where no other field tells.
            sealed: bytes from the beginning that the header's checksum covers; default all. See `_sealed_bytes`.
        """
        fields = (FORMAT_VERSION, self.tag, 0, self.digest, context.check, tail_bytes, coordinates)
        HEADER.pack_into(data.data, 0, *fields, 0)
        header = Header(*fields, header_check(data, data.size if sealed is None else sealed))
        HEADER.pack_into(data.data, 0, *header)
        return Encoded(data, header)

    def _sealed_bytes(self, encoded: Encoded) -> int:
        """Bytes from the beginning that the header's checksum covers; at least the header, and no more than there are.

        Overridden where parts of a payload have checksums of their own.
        """
        return encoded.nbytes

    def _indexed(self, encoded: Encoded, context: Context | None) -> Any:
        """The index of a payload, made once; see `validate` for the errors."""
        header = encoded.header
        if header.context != (context or _EMPTY).check:
            raise ContextMismatchError("payload was encoded with another codec context")
        known = encoded.index
        if known is not None and (known[0] is self or known[0] == self):
            return known[1]
        if header.tag != self.tag:
            raise PayloadError(f"payload was encoded by {encoded.codec}, not {self.name}")
        if header.options != self.digest:
            raise PayloadError(f"payload was encoded by {self.name} with other options than {self!r}")
        if header_check(encoded.data, self._sealed_bytes(encoded)) != header.check:
            raise PayloadError("payload does not match its checksum", Reason.DIGEST_MISMATCH)
        index = self._index(encoded)
        encoded.index = (self, index)
        return index

    def _checked_span(self, encoded: Encoded, span: Span | None) -> Span:
        n = encoded.coordinates
        if span is None:
            return 0, n
        lo, hi = span
        unit = self.chunk_coordinates
        if not 0 <= lo <= hi <= n or lo % unit or (hi % unit and hi != n):
            raise OptionError("span", span, f"multiples of {unit} from 0 to {n}, or {n} as end")
        return lo, hi


def _is_whole(value: object) -> bool:
    """Whether it is a float that is better written without a point."""
    return isinstance(value, float) and value.is_integer() and abs(value) < 1e6


class BadInput(Exception):  # noqa: N818 (never leaves this package)
    """A kernel refused a vector: where the offending coordinates are, and what is wrong with them."""

    def __init__(self, lo: int, hi: int, problem: str) -> None:
        self.lo, self.hi, self.problem = lo, hi, problem
        super().__init__(problem)


_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _explained(
    bad: BadInput, x: Tensor, values: NDArray[np.float32], name: str | Callable[[int], str]
) -> EncodingError:
    """The error to raise, naming the tensor that holds the first bad coordinate."""
    part = values[bad.lo : bad.hi]
    worst = np.flatnonzero(~np.isfinite(part))
    where = bad.lo + int(worst[0] if worst.size else np.argmax(np.abs(part)))
    title = name if isinstance(name, str) else name(where)
    value = float(x[where])
    if not np.isfinite(value):
        return NonFiniteError(f"{title}: coordinate {where} is {value}")
    if worst.size:
        return EncodingError(f"{title}: coordinate {where} is {value}, beyond the range of float32")
    return EncodingError(f"{title}: coordinate {where} is {value}, {bad.problem}")


def _vector(tensor: Tensor, length: int, what: str) -> NDArray[np.float32]:
    """The tensor's memory, checked to be contiguous float32 of that length on the CPU."""
    if tensor.dtype != torch.float32 or tensor.shape != (length,) or tensor.device.type != "cpu":
        got = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
        raise OptionError(what, got, f"a float32 CPU tensor of {length} coordinates")
    if not tensor.is_contiguous():
        raise OptionError(what, "strided", "a contiguous tensor")
    return tensor.detach().numpy()
