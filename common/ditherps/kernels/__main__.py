"""`python -m ditherps.kernels CODEC...`: compile into numba's cache what these codecs, and their ways down, need."""

from __future__ import annotations

import sys

from ditherps import kernels
from ditherps.codecs import parse
from ditherps.config import DownlinkConfig
from ditherps.downlink import downlink_codec

for spec in sys.argv[1:]:
    codec = parse(spec)
    for used in {codec, downlink_codec(DownlinkConfig(), codec) or codec}:
        kernels.warm(used)
    print(f"warm: {spec}", flush=True)
