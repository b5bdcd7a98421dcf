"""Everything that loops over coordinates: numba kernels for the CPU, and the slow readable `reference`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ditherps.codecs import Codec


def warm(codec: Codec) -> None:
    """Compile or load from the cache what `codec` needs, by encoding and accumulating one coordinate in each role."""
    import torch

    from ditherps.dither import Address, Domain

    address = Address(seed=0, round=0, sender=0, domain=Domain.UPDATE)
    one = torch.ones(1)
    for role in codec.roles:
        used = codec.for_role(role)
        side = one if used.needs_side_information else None
        used.accumulate(used.encode(one, address), address, one.clone(), 1.0, side_information=side)
