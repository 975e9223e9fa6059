"""What a round counts for: levels drafted inside the answer, levels accepted, tokens committed.

Owns: the one rule by which all figures count. What lies past the end of an answer is neither drafted, nor accepted,
nor committed, whether an end mark or the limit of tokens ends it; the prompt and the first token, which no draft
could have foreseen, are no part of a round. Must never import torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from speculator.bench.recording import Answer, Round


class Outcome(NamedTuple):
    """One round."""

    base: int  # committed tokens before it, prompt included
    drafted: int  # levels of the draft that lie inside the answer
    accepted: int  # of them
    tokens: int  # committed inside the answer


def count(base: int, end: int, levels: int, accepted: int) -> Outcome:
    """A round at `base` of an answer that ends at `end`, given its uncut draft."""
    room = end - base
    return Outcome(base, min(levels, room), min(accepted, room), min(accepted + 1, room))


def outcomes(answer: Answer) -> list[Outcome]:
    """The rounds of an answer as they were."""
    return [count(r.base, answer.end, levels(r.parents), len(r.accepted)) for r in answer.rounds]


def depths(parents: Sequence[int]) -> list[int]:
    """Depth of every node, 1 below the root."""
    found: list[int] = []
    for parent in parents:
        found.append(1 if parent < 0 else found[parent] + 1)
    return found


def levels(parents: Sequence[int]) -> int:
    return max(depths(parents), default=0)


class Judged(NamedTuple):
    """A drafted token whose predecessors were all accepted, inside the answer."""

    depth: int
    logq: float
    accepted: bool


def judged(answer: Answer, round_: Round) -> list[Judged]:
    """Drafted tokens of a round that the target had a say on; siblings in a tree are several."""
    if not round_.logq:
        return []
    path = {-1, *round_.accepted}
    room = answer.end - round_.base
    return [
        Judged(depth, logq, node in path)
        for node, (parent, depth, logq) in enumerate(
            zip(round_.parents, depths(round_.parents), round_.logq, strict=True)
        )
        if parent in path and depth <= room
    ]
