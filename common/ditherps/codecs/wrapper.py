"""What codecs share that carry another codec's whole payload in theirs: the `inner` option and the nested parsing."""

from __future__ import annotations

import functools
from typing import Any, ClassVar, NamedTuple

import numpy as np
from pydantic import Field

from ditherps.codecs.base import HEADER, Bytes, Codec, Context, Encoded, Options, Role
from ditherps.errors import OptionError, PayloadError, Reason


class WrapperOptions(Options):
    """The wrapped codec, as a command line names it."""

    inner: str = Field("dqsg", description="name or name:option=value,option=value of a codec that wraps no other")


class Nested(NamedTuple):
    """What decoding needs of a checked payload.

    Attributes:
        own: the wrapper's own section, `own_nbytes` bytes.
        payload: the inner codec's, read in place.
        index: what the inner codec found out about it; None until it has been checked.
    """

    own: Bytes
    payload: Encoded
    index: Any


class WrapperCodec(Codec):
    """Header, an own section of `own_nbytes` bytes, then the whole payload of `inner`, its header included.

    Subclasses encode with `self.inner._encode` and end with `_wrapped`; `_accumulate` gets a `Nested` as index, and
    calls `self.inner._accumulate(index.payload, index.index, ...)`. An own section that needs checking is checked in an
    overridden `_index`. The header's checksum covers the header and the own section: the inner payload has its own.

    Attributes:
        own_nbytes: length of the own section, a multiple of 4 so that the inner payload is aligned.
    """

    options: WrapperOptions
    own_nbytes: ClassVar[int] = 0

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.unbiased = self.inner.unbiased
        self.chunk_coordinates = self.inner.chunk_coordinates

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Codec) and self.name == other.name and self.format_options() == other.format_options()

    __hash__ = Codec.__hash__

    @functools.cached_property
    def inner(self) -> Codec:
        """The wrapped codec.

        Raises:
            OptionError: there is none of this name or with these options, or it cannot be wrapped.
        """
        from ditherps.codecs import parse  # the registry imports this module's subclasses

        found = parse(self.options.inner)
        if found.needs_side_information or found.roles != (Role.SOURCE,) or isinstance(found, WrapperCodec):
            allowed = "a codec without side information, without roles, and that wraps no other"
            raise OptionError(f"{self.name}.inner", self.options.inner, allowed)
        return found

    def for_model(self) -> Codec:
        """With the inner codec for the steps of the model."""
        inner = self.inner.for_model()
        if inner == self.inner:
            return self
        given = self.options.model_dump(exclude_unset=True, exclude={"inner"})
        return type(self)(**given, inner=inner.spec)

    def format_options(self) -> dict[str, Any]:
        """The inner codec's name and options stand for the text that describes them: spellings do not matter."""
        return super().format_options() | {"inner": [self.inner.name, self.inner.format_options()]}

    def max_nbytes(self, coordinates: int) -> int:
        """Header, own section, and what the inner codec takes at most."""
        return HEADER.size + self.own_nbytes + self.inner.max_nbytes(coordinates)

    def _wrapped(self, own: bytes, inner: Encoded, context: Context) -> Encoded:
        """The payload that holds `own`, of `own_nbytes` bytes, and `inner`."""
        begin = HEADER.size + self.own_nbytes
        data = np.empty(begin + inner.nbytes, np.uint8)
        data[HEADER.size : begin] = np.frombuffer(own, np.uint8)
        data[begin:] = inner.data
        return self._finished(data, inner.coordinates, context, sealed=begin)

    def _sealed_bytes(self, encoded: Encoded) -> int:
        return min(HEADER.size + self.own_nbytes, encoded.nbytes)

    def _index(self, encoded: Encoded) -> Nested:
        begin = HEADER.size + self.own_nbytes
        if encoded.header.tail_bytes or encoded.nbytes < begin:
            raise PayloadError(f"payload of {encoded.nbytes} bytes has no room for its sections", Reason.SIZE)
        return Nested(encoded.data[HEADER.size : begin], Encoded.from_bytes(encoded.data[begin:]), None)

    def _indexed(self, encoded: Encoded, context: Context | None) -> Nested:
        nested: Nested = super()._indexed(encoded, context)
        # Checked at its first use only: the inner payload remembers.
        self.inner.validate(nested.payload, encoded.coordinates, context)
        return nested._replace(index=self.inner._indexed(nested.payload, context))

    def expected_squared_error(self, encoded: Encoded) -> float:
        """The inner codec's."""
        return self.inner.expected_squared_error(self._index(encoded).payload)
