"""What `forked` processes have imported and compiled before they begin: everything slow that either end needs."""

from __future__ import annotations

import importlib

import torch

import ditherps
from ditherps import kernels

for _module in (
    "ditherps.commands", "ditherps.job", "ditherps.plots", "ditherps_server.app", "ditherps_server.commands",
    "ditherps_server.run", "ditherps_worker.app", "ditherps_worker.commands", "tests.faults.points",
    "tests.faults.tasks",
):  # fmt: skip
    importlib.import_module(_module)
for _name in ("dqsg", "ndqsg", "none"):
    kernels.warm(ditherps.codec(_name))
torch.optim.SGD([torch.zeros(1)], lr=1.0)  # the first optimizer imports torch's compiler
