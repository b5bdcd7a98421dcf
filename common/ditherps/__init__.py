"""ditherps: what both ends of the federated parameter server share, and what a user imports.

The names below load on first use, so that `import ditherps` stays light (no torch, no numba).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ditherps.codecs import Context, Encoded, codec
    from ditherps.dither import Address, Domain

__all__ = ["Address", "Context", "Domain", "Encoded", "__version__", "codec"]

__version__ = "0.1.0"

_HOME = {
    "Address": "ditherps.dither",
    "Domain": "ditherps.dither",
    "Context": "ditherps.codecs",
    "Encoded": "ditherps.codecs",
    "codec": "ditherps.codecs",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
