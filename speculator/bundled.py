"""Where the small pairs lie that come with the project.

Owns: the layout deploy/models/<name>/{target,<head>}, where an MTP head is part of the target. Must never read a model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from speculator.errors import ConfigError

HEADS = ("eagle3", "eagle")  # folders of heads beside their target
MTP = "num_nextn_predict_layers"  # in the config of a target that holds its head


class Pair(NamedTuple):
    """A target's folder and that of a head made for it."""

    name: str
    target: Path
    head: Path


def find_pairs(root: Path | None = None) -> list[Pair]:
    """The pairs below `root`, those with a head beside the target first, then by name.

    By default below deploy/models of the working directory or the source tree.
    """
    roots = [root] if root else [Path("deploy/models"), Path(__file__).resolve().parent.parent / "deploy" / "models"]
    for place in roots:
        pairs = [pair for folder in sorted(place.glob("*")) if (pair := _pair(folder)) is not None]
        if pairs:
            return sorted(pairs, key=lambda pair: pair.head == pair.target)
    return []


def find_pair(name: str | None = None) -> Pair:
    """The pair of this name, or the first one; ConfigError when there is none, and which there are."""
    pairs = find_pairs()
    if not pairs:
        raise ConfigError("No target is named and no bundled pair is here: give --target PATH and --head PATH.")
    for pair in pairs:
        if name in (None, pair.name):
            return pair
    raise ConfigError(f"There is no bundled pair {name!r}; known: {', '.join(pair.name for pair in pairs)}.")


def _pair(folder: Path) -> Pair | None:
    target = folder / "target"
    if not (target / "config.json").is_file():
        return None
    beside = (folder / name for name in HEADS if (folder / name / "config.json").is_file())
    head = next(beside, target if _holds_head(target / "config.json") else None)
    return None if head is None else Pair(folder.name, target, head)


def _holds_head(config: Path) -> bool:
    try:
        raw = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # whoever loads it says what is wrong
    return isinstance(raw, dict) and bool(raw.get(MTP))
