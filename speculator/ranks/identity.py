"""What must be the same on all ranks, or they compute other bits and record other graphs; compared before they meet.

Owns: these facts, and the sentence that names both values of the first that differs. Must never need a collective.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from speculator.config import Config
from speculator.errors import ConfigError
from speculator.load import fingerprint
from speculator.ranks.launch import Place
from target import fused, pdl
from target.attention import choose

KEY = "speculator/identity/"
SWITCHES = {fused.OVERRIDE: "on", pdl.OVERRIDE: "on", choose.OVERRIDE: "auto"}  # and what they are where nobody says
Identity = Mapping[str, str]


def identity(config: Config, device: torch.device) -> dict[str, str]:
    """Of this rank, by what a reader calls it; wherever its files lie."""
    sections = {name: getattr(config, name) for name in ("engine", "graphs", "draft", "parallel")}
    found: dict[str, Any] = {
        f"{name}.{field}": value for name, part in sections.items() for field, value in asdict(part).items()
    }
    overrides = sorted(config.model.head_overrides.items())
    found |= {"model.dtype": config.model.dtype, "model.head_overrides": dict(overrides)}
    found |= {"device": device_kind(device), "torch": torch.__version__}
    found |= {name: os.environ.get(name) or default for name, default in SWITCHES.items()}
    folders = {"target": config.model.target, "draft head": "" if config.model.head == "mtp" else config.model.head}
    found |= {f"the {what}'s revision": fingerprint(Path(path)) for what, path in folders.items() if path}
    return {name: str(value) for name, value in found.items()}


def device_kind(device: torch.device) -> str:
    """What decides on kernels and on the order of sums."""
    if device.type != "cuda":
        return f"{device.type} ({torch.backends.cpu.get_cpu_capability()})"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} ({major}.{minor})"


def exchanged(store: Any, place: Place, own: Identity) -> list[Identity]:
    """All ranks' identities, by rank; waits for them."""
    store.set(f"{KEY}{place.rank}", json.dumps(own))
    return [json.loads(store.get(f"{KEY}{rank}")) for rank in range(place.size)]


def check_same(found: Sequence[Identity]) -> None:
    """ConfigError, the same on all ranks, for the first fact in which one is not as rank 0 is."""
    first = found[0]
    for rank, other in enumerate(found):
        for name in {**first, **other}:
            mine, theirs = first.get(name, "nothing"), other.get(name, "nothing")
            if mine != theirs:
                raise ConfigError(f"rank {rank} has {name} = {theirs} where rank 0 has {mine}: give all ranks the same")
