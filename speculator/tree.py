"""Draft trees on the device: laying them out, growing them, and where the surviving nodes move.

Owns the layout of a tree: nodes, parents, depths and 64-bit ancestor masks.
Must never know a model, a cache or how acceptance is decided; drafts from outside are checked before they get here.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from speculator.readout import Ranking, Reading
from speculator.sampling import upload
from speculator.types import MASK_BITS, Draft
from target.fused import fused_wanted
from target.products import kernels_need


class Tree(NamedTuple):
    """R draft trees of up to T <= 64 nodes, root included, parents before children.

    Node 0 is the root (the last committed token), node i + 1 is drafted node i. Padding nodes come last; their
    ancestors are themselves alone, so nothing attends to them and nothing accepts them.
    """

    tokens: Tensor  # [R, T] int64
    parents: Tensor  # [R, T] int64 node index; the root and padding have 0
    depths: Tensor  # [R, T] int64; the root has 0
    ancestors: Tensor  # [R, T] int64; bit j is set iff node j is an ancestor of the node or the node itself
    counts: Tensor  # [R] int64, valid nodes, root included
    max_depth: int  # host-known bound on depths
    chain: bool  # host-known: in every row each node's parent is the node before it

    def valid(self) -> Tensor:
        """[R, T] bool: not padding."""
        return torch.arange(self.tokens.shape[1], device=self.counts.device) < self.counts[:, None]

    def select(self, index: Tensor, chain: bool) -> Tree:
        """The trees of the rows `index` [S] int64; `chain` says whether the host knows all of these to be chains."""
        return Tree(
            tokens=self.tokens[index],
            parents=self.parents[index],
            depths=self.depths[index],
            ancestors=self.ancestors[index],
            counts=self.counts[index],
            max_depth=self.max_depth,
            chain=chain,
        )


# Laying trees out on the device


def pack(
    drafts: Sequence[Draft | None],
    roots: Sequence[int],
    device: torch.device | str,
    *,
    width: int = 1,
    max_depth: int = 0,
) -> Tree:
    """Lay out R validated drafts below their last committed tokens `roots`, in one copy to `device`.

    None is an empty draft. T is the largest tree, at least `width`; `max_depth` is a least value of the result's, so
    that the shapes of a step can be fixed beforehand.
    """
    rows = [draft or Draft() for draft in drafts]
    width = max(width, *(len(draft.tokens) + 1 for draft in rows), 1)
    tokens = [_padded([root, *draft.tokens], width) for root, draft in zip(roots, rows, strict=True)]
    counts = [len(draft.tokens) + 1 for draft in rows]
    if all(draft.is_chain for draft in rows):
        packed = upload(torch.tensor([[*row, count] for row, count in zip(tokens, counts, strict=True)]), device)
        return chain(packed[:, :width], packed[:, width], max(max_depth, max(counts) - 1))
    shapes = [_host_shape(draft.parents) for draft in rows]
    values = [
        [*row, *_padded(parents, width), *_padded(depths, width), *_own_bits(ancestors, width), count]
        for row, count, (parents, depths, ancestors) in zip(tokens, counts, shapes, strict=True)
    ]
    packed = upload(torch.tensor(values), device)
    return Tree(
        tokens=packed[:, :width],
        parents=packed[:, width : 2 * width],
        depths=packed[:, 2 * width : 3 * width],
        ancestors=packed[:, 3 * width : -1],
        counts=packed[:, -1],
        max_depth=max(max_depth, *(max(depths) for _, depths, _ in shapes)),
        chain=False,
    )


def chain(tokens: Tensor, counts: Tensor, max_depth: int) -> Tree:
    """Chains from `tokens` [R, T] int64, roots first, of which `counts` [R] int64 <= `max_depth` + 1 are valid."""
    index = torch.arange(tokens.shape[1], device=tokens.device)
    own = torch.ones_like(index) << index
    valid = index < counts[:, None]
    depths = torch.where(valid, index, 0)
    # own * 2 - 1 has all bits up to the node's own; bit 63 wraps to the right value.
    ancestors = torch.where(valid, own * 2 - 1, own)
    return Tree(tokens, (depths - 1).clamp(min=0), depths, ancestors, counts, max_depth, chain=True)


def below(root: Tensor, tokens: Tensor, parents: Tensor, counts: Tensor, max_depth: int) -> Tree:
    """Drafted `tokens` [R, N] with `parents` [R, N] (-1 is the root) below `root` [R], all int64 and on the device.

    Of each row `counts` [R] <= N + 1 nodes are valid, root included; `max_depth` bounds their depths.
    """
    tokens = torch.cat((root[:, None], tokens), 1)
    index = torch.arange(tokens.shape[1], device=root.device)
    valid = index < counts[:, None]
    above = torch.where(valid, _below_root(parents + 1), 0)
    ancestors = torch.where(valid, ancestor_masks(above, max_depth), torch.ones_like(index) << index)
    depths = ((ancestors[:, :, None] >> index) & 1).sum(-1) - 1
    return Tree(tokens, above, depths, ancestors, counts, max_depth, chain=False)


def seen_tokens(committed: Tensor, tree: Tree) -> Tensor:
    """[R, T, V] bool: the tokens before the one drawn at each node, from `committed` [R, V] bool and its own path.

    What the repetition penalty needs at a node of a draft.
    """
    width = tree.tokens.shape[1]
    index = torch.arange(width, device=tree.tokens.device)
    on_path = ((tree.ancestors[:, :, None] >> index) & 1).bool()
    tokens = torch.where(on_path, tree.tokens[:, None, :], tree.tokens[:, :, None])
    return committed[:, None, :].expand(-1, width, -1).clone().scatter_(2, tokens, True)


def compaction(path: Tensor, kept: Tensor, cached: Tensor) -> tuple[Tensor, Tensor]:
    """Where the KV of the surviving nodes lies and belongs: (source, destination), storage indices [R, D + 1] int64.

    `path` [R, D + 1] and `kept` [R] are a verdict's; `cached` [R] is the storage index of the root. Entries past
    `kept` copy the root onto itself. Read every source before writing. Nothing moves for a chain.
    """
    steps = torch.arange(path.shape[1], device=path.device)
    destination = torch.where(steps < kept[:, None], steps, 0)
    return cached[:, None] + path, cached[:, None] + destination


def ancestor_masks(parents: Tensor, max_depth: int) -> Tensor:
    """Ancestor-or-self masks [R, T] int64 from `parents` [R, T] (root: 0), by pointer doubling."""
    masks = (1 << torch.arange(parents.shape[1], device=parents.device)).expand_as(parents)
    hop = parents
    for _ in range(max_depth.bit_length()):
        masks = masks | masks.gather(1, hop)
        hop = hop.gather(1, hop)
    return masks


def _padded(values: Sequence[int], width: int) -> list[int]:
    return [*values, *[0] * (width - len(values))]


def _own_bits(masks: Sequence[int], width: int) -> list[int]:
    """Masks as int64, padding nodes with their own bit."""
    own = [1 << node for node in range(len(masks), width)]
    return [_as_int64(mask) for mask in (*masks, *own)]


def _as_int64(mask: int) -> int:
    return mask - (1 << MASK_BITS) if mask >> (MASK_BITS - 1) else mask


def _host_shape(parents: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """Parents, depths and ancestor masks of the nodes of one tree, root included."""
    nodes, depths, masks = [0], [0], [1]
    for node, drafted_parent in enumerate(parents, start=1):
        parent = drafted_parent + 1
        nodes.append(parent)
        depths.append(depths[parent] + 1)
        masks.append(masks[parent] | 1 << node)
    return nodes, depths, masks


# Static trees


class StaticLevel(NamedTuple):
    """The drafted nodes of one depth of a static tree, and what a head needs to draft below them."""

    nodes: tuple[int, ...]  # drafted node indices
    parents: tuple[int, ...]  # of each: its parent's index in `expanded` of the level above (first level: 0, the root)
    ranks: tuple[int, ...]  # of each: it takes its parent's rank-th best token
    expanded: tuple[int, ...]  # indices in `nodes` of those that have children: the head runs them next
    masks: tuple[int, ...]  # of each expanded: its expanded ancestors, bit per expanded node of the levels above


class StaticTree(NamedTuple):
    """A static tree on the device; make it once and fill it every round."""

    parents: Tensor  # [T] int64, as in Tree
    depths: Tensor  # [T] int64
    ancestors: Tensor  # [T] int64
    max_depth: int
    chain: bool

    @classmethod
    def from_parents(cls, parents: Sequence[int], device: torch.device | str) -> StaticTree:
        """Lay out drafted nodes with `parents` (-1 is the root)."""
        nodes, depths, masks = _host_shape(parents)
        packed = upload(torch.tensor([nodes, depths, [_as_int64(mask) for mask in masks]]), device)
        is_chain = all(parent == node - 1 for node, parent in enumerate(parents))
        return cls(packed[0], packed[1], packed[2], max(depths), is_chain)

    def fill(self, root: Tensor, tokens: Tensor) -> Tree:
        """Trees of R rows with last committed tokens `root` [R] and drafted `tokens` [R, T - 1], both int64."""
        tokens = torch.cat([root[:, None], tokens], 1)
        parents, depths, ancestors = (part.expand_as(tokens) for part in self[:3])
        counts = torch.full_like(root, tokens.shape[1])
        return Tree(tokens, parents, depths, ancestors, counts, self.max_depth, self.chain)


def static_levels(parents: Sequence[int]) -> tuple[StaticLevel, ...]:
    """The levels of a static tree, top down. Expanded nodes are numbered level by level, as the head runs them."""
    by_depth = _nodes_by_depth(parents)
    inner = set(parents)
    levels: list[StaticLevel] = []
    slots: dict[int, int] = {-1: 0}  # index among the expanded nodes of the level above
    masks: dict[int, int] = {-1: 0}  # expanded ancestors and self of an expanded node
    first = 0
    for nodes in by_depth:
        expanded = [index for index, node in enumerate(nodes) if node in inner]
        level = StaticLevel(
            nodes=tuple(nodes),
            parents=tuple(slots[parents[node]] for node in nodes),
            ranks=tuple(parents[:node].count(parents[node]) for node in nodes),
            expanded=tuple(expanded),
            masks=tuple(_as_int64(masks[parents[nodes[index]]]) for index in expanded),
        )
        levels.append(level)
        slots = {nodes[index]: slot for slot, index in enumerate(expanded)}
        masks = {node: masks[parents[node]] | 1 << (first + slot) for node, slot in slots.items()}
        first += len(expanded)
    return tuple(levels)


def _nodes_by_depth(parents: Sequence[int]) -> list[list[int]]:
    depths = _host_shape(parents)[1][1:]
    levels = range(1, max(depths, default=0) + 1)
    return [[node for node, depth in enumerate(depths) if depth == level] for level in levels]


# The dynamic tree of EAGLE-2 and EAGLE-3


class Frontier(NamedTuple):
    """The k nodes that the head runs next."""

    tokens: Tensor  # [R, k] int64
    parents: Tensor  # [R, k] int64, slot of the parent in the previous frontier: whose hidden state to take (first: 0)
    masks: Tensor  # [R, k] int64, bit l * k + j: slot j of the l-th frontier is a proper ancestor
    slots: Tensor  # [R, k] int64, index among the candidates of their level
    positions: Tensor | None = None  # [R, k] int64, absolute ones where they are known


class Grown(NamedTuple):
    """The nodes of a finished dynamic tree, N below the root."""

    tokens: Tensor  # [R, N] int64
    parents: Tensor  # [R, N] int64, -1 is the root
    logprobs: Tensor  # [R, N] float32, log q(token | path)


class Candidates(NamedTuple):
    """All nodes considered on one level, [R, C]; C is k on the first level and k * k on each further one."""

    tokens: Tensor  # int64
    scores: Tensor  # float32, sum over the path
    logprobs: Tensor  # float32
    parents: Tensor  # int64, index among all candidates so far; -1 is the root


def in_kernels(device: torch.device) -> bool:
    """Whether dynamic trees grow in kernels, as they do where layers are fused; `TreeGrowth` is the twin."""
    return fused_wanted() and _able(device)


@functools.cache
def _able(device: torch.device) -> bool:
    """Asked at every draft, so looked up once."""
    return not kernels_need(device)


class TreeGrowth:
    """A dynamic tree under construction: every candidate it has seen, as tensors of fixed shape (EAGLE-2, sec. 4).

    The loop: `grow(top-k below the root)`; for each further level run the head on `frontier()` and `grow(its top-k)`;
    then `select`. Candidates are ranked by the sum of `scores` (log-probabilities, so at most 0) along their path;
    `logprobs` are reported. Equal scores prefer the earlier candidate: a parent comes before its children, so the
    chosen set is closed under ancestors. With d levels the masks of the last frontier need (d - 2) * k <= 64.
    """

    def __init__(self, ids: Tensor | None = None) -> None:
        """`ids` [Vd] int64 are the target's ids of the columns that are found; None, they are equal."""
        self._ids, self._levels = ids, list[Candidates]()
        self._frontier: Frontier | None = None

    def frontier(self) -> Frontier:
        """The k best candidates of the last level, best first."""
        if self._frontier is None:
            self._frontier = self._above = self._best()
        return self._frontier

    def _best(self) -> Frontier:
        last, level = self._levels[-1], len(self._levels)
        if level == 1:
            none = torch.zeros_like(last.tokens)
            return Frontier(last.tokens, none, none, torch.arange(none.shape[1], device=none.device).expand_as(none))
        k = self._above.tokens.shape[1]
        slots = last.scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
        parents = slots.div(k, rounding_mode="floor")
        own = 1 << (parents + (level - 2) * k)
        return Frontier(last.tokens.gather(1, slots), parents, self._above.masks.gather(1, parents) | own, slots)

    def grow(self, found: Reading | Ranking) -> None:
        """Add the k best children, best first, of the root [R, 1, k], then of each slot of the frontier [R, k, k]."""
        columns, scores, logprobs = found.ranking() if isinstance(found, Reading) else found
        tokens = columns if self._ids is None else self._ids[columns]
        scores = total = torch.fmin(scores, scores.new_zeros(()))  # the NaN of a broken head becomes 0 too
        parents = torch.full_like(tokens, -1)
        if self._levels:
            slots = self.frontier().slots
            total = self._levels[-1].scores.gather(1, slots)[..., None] + scores
            before = sum(level.tokens.shape[1] for level in self._levels[:-1])
            parents = (slots + before)[..., None].expand_as(tokens)
        self._levels.append(Candidates(*(part.flatten(1) for part in (tokens, total, logprobs, parents))))
        self._frontier = None

    def select(self, nodes: int) -> Grown:
        """The best `nodes` candidates (all, if there are fewer), in the order they were seen."""
        seen = Candidates(*(torch.cat(part, 1) for part in zip(*self._levels, strict=True)))
        best = seen.scores.sort(dim=1, descending=True, stable=True).indices
        chosen = best[:, :nodes].sort(dim=1).values
        above = seen.parents.gather(1, chosen)
        parents = torch.where(above < 0, -1, torch.searchsorted(chosen, above))
        return Grown(seen.tokens.gather(1, chosen), parents, seen.logprobs.gather(1, chosen))


def _below_root(values: Tensor) -> Tensor:
    """Prepend the root's entry, 0."""
    return torch.nn.functional.pad(values, (1, 0))
