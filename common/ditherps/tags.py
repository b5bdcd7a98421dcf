"""The codecs by the number that stands in their payloads; imports nothing, so that the command line may name them."""

from __future__ import annotations

from typing import Final

TAGS: Final[dict[int, str]] = {
    1: "none",
    2: "bf16",
    3: "dqsg",
    4: "ndqsg",
    5: "qsgd",
    6: "terngrad",
    7: "maxnorm",
    8: "maxnorm-multiscale",
    9: "signsgd",
    10: "topk",
    11: "randk",
    12: "globalrandk",
    13: "natural",
    14: "eden",
    15: "rotated",
    16: "scaled",
    17: "tensors",
}
