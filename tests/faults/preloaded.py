"""What `forked` processes have imported and compiled before they begin: everything slow that either end needs."""

from __future__ import annotations

import ditherps
import ditherps.commands
from ditherps import kernels

for _name in ("dqsg", "ndqsg", "none"):
    kernels.warm(ditherps.codec(_name))
