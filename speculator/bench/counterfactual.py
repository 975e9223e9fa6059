"""What drafts of other shapes would have had accepted on a recorded answer.

Owns: the walk of another drafter along a known text. Must never run a model. Sound for greedy and coupled sampling
only: there the text does not depend on the drafts, and a draft depends on the text before it alone, so a run with
another shape commits the same tokens and starts its rounds wherever its own acceptances put it. That is why a draft is
needed at every position, not only where the recorded rounds began. Under rejection sampling another draft is another
text, and nothing here applies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from speculator.bench.outcomes import Outcome, count, depths, levels
from speculator.bench.recording import Answer
from speculator.types import Draft, DraftShape

Drafts = Mapping[int, Draft]  # by the number of committed tokens before them


def walk(answer: Answer, draft_at: Callable[[int], Draft]) -> list[Outcome]:
    """The rounds that a drafter would have had along `answer`."""
    text, base, found = answer.whole, len(answer.prompt) + 1, list[Outcome]()
    while base < answer.end:
        draft = draft_at(base)
        found.append(count(base, answer.end, levels(draft.parents), matching(draft, text[base:])))
        base += found[-1].accepted + 1
    return found


def matching(draft: Draft, text: Sequence[int]) -> int:
    """Depth of the deepest node whose whole path is a prefix of `text`."""
    deep = depths(draft.parents)
    taken: set[int] = {-1}
    for node, (token, parent) in enumerate(zip(draft.tokens, draft.parents, strict=True)):
        if parent in taken and deep[node] <= len(text) and text[deep[node] - 1] == token:
            taken.add(node)
    return max((deep[node] for node in taken if node >= 0), default=0)


def recorded(answer: Answer) -> dict[int, Draft]:
    """The drafts of the recorded rounds."""
    return {r.base: Draft(r.tokens, r.parents, r.logq) for r in answer.rounds}


def cut(draft: Draft, whole: DraftShape, part: DraftShape) -> Draft | None:
    """The draft of shape `part` inside one of shape `whole`; None when it cannot be told from it.

    A chain holds every shorter chain. A dynamic tree of greedy drafts holds those of the same branching whose nodes
    it kept: nodes of at most `part.depth` levels that have the best sums of log q, equal ones in the order of drafting.
    """
    if part.is_chain and whole.is_chain and part.depth <= whole.depth:
        return _keep(draft, range(min(part.depth, len(draft.tokens))))
    if part.parents or whole.parents or part.branching != whole.branching or part.depth > whole.depth:
        return None
    return _cut_tree(draft, whole, part)


def _cut_tree(draft: Draft, whole: DraftShape, part: DraftShape) -> Draft | None:
    inside = [node for node, depth in enumerate(depths(draft.parents)) if depth <= part.depth]
    complete = len(draft.tokens) < whole.nodes  # every candidate was kept
    if len(inside) < part.nodes and not complete and part.depth < whole.depth:
        return None
    sums = _path_sums(draft)
    best = sorted(inside, key=lambda node: -sums[node])[: part.nodes]  # stable
    return _keep(draft, sorted(best))


def _path_sums(draft: Draft) -> list[np.float32]:
    """Sums of log q along the paths, in the arithmetic of the engine."""
    sums: list[np.float32] = []
    for parent, logq in zip(draft.parents, draft.logprobs, strict=True):
        sums.append(np.float32(logq) if parent < 0 else sums[parent] + np.float32(logq))
    return sums


def _keep(draft: Draft, nodes: Sequence[int]) -> Draft:
    place = {-1: -1} | {node: i for i, node in enumerate(nodes)}
    logq = tuple(draft.logprobs[n] for n in nodes) if draft.logprobs else ()
    return Draft(tuple(draft.tokens[n] for n in nodes), tuple(place[draft.parents[n]] for n in nodes), logq)


def cut_all(drafts: Drafts, whole: DraftShape, part: DraftShape) -> dict[int, Draft] | None:
    """`cut` of every draft; None when one of them cannot be told."""
    found: dict[int, Draft] = {}
    for base, draft in drafts.items():
        smaller = cut(draft, whole, part)
        if smaller is None:
            return None
        found[base] = smaller
    return found
