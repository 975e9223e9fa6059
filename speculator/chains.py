"""Targets that take chains only: what a request may not ask of them, and why.

Owns: the sentence. A hybrid target keeps one recurrent state a session, and says so by a limit of one child a node.
Must never import torch, grpc or protobuf, nor look at a session.
"""

from __future__ import annotations

from collections.abc import Sequence

from speculator.errors import InvalidArgumentError, InvalidTreeError
from speculator.types import Draft, DraftShape, EngineInfo

WHY = (
    "this target has recurrent layers, whose state holds one past: it takes chains only, every branch of a tree would "
    "need a state of its own"
)


def chains_only(info: EngineInfo) -> bool:
    return info.max_branching <= 1


def is_tree(shape: DraftShape) -> bool:
    """Whether a draft of this shape can have two nodes below one."""
    return not shape.is_chain and not (shape.parents and _in_line(shape.parents))


def check_chain_shape(shape: DraftShape, info: EngineInfo) -> None:
    """Raises InvalidArgumentError for the shape of a tree where chains alone are taken."""
    if chains_only(info) and is_tree(shape):
        raise InvalidArgumentError(f"{WHY}; ask for draft.branching 1", field="draft.branching")


def check_chain(draft: Draft, info: EngineInfo) -> None:
    """Raises InvalidTreeError for a tree where chains alone are taken."""
    if chains_only(info) and not draft.is_chain:
        raise InvalidTreeError(WHY, field="tree.parent_indices")


def _in_line(parents: Sequence[int]) -> bool:
    return all(parent == i - 1 for i, parent in enumerate(parents))
