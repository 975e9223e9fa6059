"""Programmatic dependent launch: whether a kernel may begin while the launch before it still ends.

Owns: the switch and the capability it needs. Must never know kernels or models; `target.kernels.dependent` has the
rules that make it sound. Results are the same bits either way.
"""

from __future__ import annotations

import os
from functools import lru_cache

import torch

from target.errors import PlanError

OVERRIDE = "SPECULATOR_PDL"  # on or off; on where it is not set
OLDEST = (9, 0)  # compute capability that has it


def pdl_on(device: torch.device) -> bool:
    """Whether launches on a device are made so: where SPECULATOR_PDL says so and the device can."""
    return pdl_wanted() and pdl_possible(device)


def pdl_wanted() -> bool:
    """What SPECULATOR_PDL says; PlanError when it is neither on nor off."""
    wanted = os.environ.get(OVERRIDE) or "on"
    if wanted not in ("on", "off"):
        raise PlanError(f"unknown {OVERRIDE} '{wanted}': on or off")
    return wanted == "on"


@lru_cache(maxsize=16)
def pdl_possible(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= OLDEST
