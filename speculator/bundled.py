"""Where the small pairs lie that come with the project.

Owns: the layout deploy/models/<name>/{target,<head>}. Must never read a model.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

HEADS = ("eagle3", "eagle", "mtp")


class Pair(NamedTuple):
    """A target's folder and that of a head made for it."""

    name: str
    target: Path
    head: Path


def find_pairs(root: Path | None = None) -> list[Pair]:
    """The pairs below `root`, by name; by default below deploy/models of the working directory or the source tree."""
    roots = [root] if root else [Path("deploy/models"), Path(__file__).resolve().parent.parent / "deploy" / "models"]
    for place in roots:
        pairs = [pair for folder in sorted(place.glob("*")) if (pair := _pair(folder)) is not None]
        if pairs:
            return sorted(pairs, key=lambda pair: HEADS.index(pair.head.name))
    return []


def _pair(folder: Path) -> Pair | None:
    target = folder / "target"
    head = next((folder / name for name in HEADS if (folder / name / "config.json").is_file()), None)
    if head is None or not (target / "config.json").is_file():
        return None
    return Pair(folder.name, target, head)
