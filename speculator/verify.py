"""Lossless verification: which drafted nodes a round commits, and the bonus token after them.

Owns the three rules; under each, what is committed has exactly the target's sampling distribution.
Must never know a model, a cache or who drafted. Nothing here waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from speculator.errors import InvalidTreeError
from speculator.sampling import RowSampling, Stream, coupled_sample, fold, gumbel, probabilities, uniform, upload
from speculator.tree import Tree
from speculator.types import Draft, Rule


class Verdict(NamedTuple):
    """What a round commits in each of R rows; D is the tree's `max_depth`."""

    tokens: Tensor  # [R, D + 1] int64, the accepted path and the bonus token, -1 after
    kept: Tensor  # [R] int64 in 1..D + 1: accepted nodes and one bonus token, or the root and the accepted nodes
    path: Tensor  # [R, D + 1] int64, nodes whose features and KV survive: the root (0), the accepted nodes, 0 after


class DraftQ(NamedTuple):
    """The distributions that drafts were drawn from. A DraftQ of None means every node is a point mass."""

    probs: Tensor  # [R, T, V], row t is normalised and what node t was drawn from; the root's row is not read
    siblings: int  # host-known bound on the children of one node; 1 for chains

    @classmethod
    def from_drafts(
        cls,
        drafts: Sequence[Draft | None],
        width: int,
        vocab_size: int,
        device: torch.device | str,
        held: Sequence[Tensor | None] = (),
    ) -> DraftQ | None:
        """Dense q of R validated drafts padded to `width` nodes with the root; None if all are point masses.

        `held[r]` [nodes, V] is the q of a draft that was sampled here; other drafts bring their own q, which is
        normalised, or are point masses.
        """
        kept = {row: q for row, q in enumerate(held) if q is not None}
        if not kept and not any(draft and draft.q for draft in drafts):
            return None
        brought = [None if row in kept else draft for row, draft in enumerate(drafts)]
        probs = _dense([draft or Draft() for draft in brought], width, vocab_size, device)
        for row, q in kept.items():
            probs[row, 1 : len(q) + 1] = q
        return cls(probs, max(_most_siblings(draft) for draft in drafts))


def verify(rule: Rule, tree: Tree, scores: Tensor, rows: RowSampling, base: Tensor, q: DraftQ | None = None) -> Verdict:
    """Apply `rule` to drafts below sequences of committed length `base` [R] int64.

    `scores` [R, T, V] are `sampling.scores` after each node, `q` what the nodes were drawn from (`coupled` ignores it).
    """
    if rule is Rule.COUPLED:
        counter = base[:, None] + tree.depths
        return verify_coupled(tree, coupled_sample(scores, rows, counter, span=tree.max_depth + 1))
    if rule is Rule.BLOCK:
        return verify_block(tree, scores, rows, base, q)
    return verify_rejection(tree, scores, rows, base, q)


def verify_coupled(tree: Tree, samples: Tensor) -> Verdict:
    """Accept a node iff its parent is and it is the target's own token after it; `samples` [R, T] int64 has these.

    Serves greedy decoding too. Among several accepted paths the longest is taken, then the one that ends first.
    """
    _, kept, path = _walk(tree, tree.tokens == samples.gather(1, tree.parents))
    steps = torch.arange(path.shape[1], device=path.device)
    return Verdict(torch.where(steps < kept[:, None], samples.gather(1, path), -1), kept, path)


def verify_rejection(tree: Tree, scores: Tensor, rows: RowSampling, base: Tensor, q: DraftQ | None = None) -> Verdict:
    """Speculative sampling (Leviathan et al. 2023), on trees child after child (SpecInfer, Miao et al. 2024).

    With p the target's distribution at a node: its child c drawn from q_c is accepted with probability
    min(1, p(c) / q_c(c)); else p becomes norm(max(p - q_c, 0)) for the next child, or for the bonus token.
    """
    p = probabilities(scores, rows)
    key = fold(rows.seed, base)
    u = _accept_noise(key, tree)
    taken = _point_mass_trials(tree, p, u) if q is None else _trials(tree, p, q, u)
    last, kept, path = _walk(tree, taken)
    residual = _point_mass_residual(tree, p, last) if q is None else _residual(tree, p, q, last)
    bonus = _draw(residual, _at(p, last), key, kept)
    return Verdict(_emit(tree, path, kept, bonus), kept, path)


def verify_block(tree: Tree, scores: Tensor, rows: RowSampling, base: Tensor, q: DraftQ | None = None) -> Verdict:
    """Block verification of chains (Sun et al. 2024, arXiv 2403.10444): later tokens may rescue earlier ones.

    With K drafted tokens x, p_i and q_i the distributions at x_i: P_0 = 1, P_i = min(P_{i-1} p_i(x_i) / q_i(x_i), 1),
    S_i = sum max(P_i p_{i+1} - q_{i+1}, 0), h_i = S_i / (S_i + 1 - P_i) for i < K and h_K = P_K. The largest i with
    eta_i <= h_i is kept; the bonus comes from norm(max(P_i p_{i+1} - q_{i+1}, 0)), from p_{K+1} if i = K.
    Raises InvalidTreeError for a tree that is no chain.
    """
    if not tree.chain:
        raise InvalidTreeError("block verification takes chains only", field="draft.parent_indices")
    p = probabilities(scores, rows)
    key = fold(rows.seed, base)
    reach = _block_reach(tree, p, q)
    surplus = _block_surplus(tree, p, q, reach)
    accepted = _block_accepted(tree, reach, surplus, _accept_noise(key, tree))
    kept = accepted + 1
    last_p = _at(p, accepted)
    bonus = _draw(_block_residual(tree, last_p, q, reach, accepted), last_p, key, kept)
    path = _chain_path(tree, accepted)
    return Verdict(_emit(tree, path, kept, bonus), kept, path)


# Walking a tree


def _walk(tree: Tree, taken: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Deepest node whose whole path is `taken` [R, T] bool (the root's entry is not read): (last, kept, path)."""
    taken = taken & tree.valid()
    if tree.chain:
        accepted = taken[:, 1:].long().cumprod(1).sum(1)
        return accepted, accepted + 1, _chain_path(tree, accepted)
    taken[:, 0] = True
    index = torch.arange(taken.shape[1], device=taken.device)
    taken_mask = (taken.long() << index).sum(1, keepdim=True)
    accepted = (tree.ancestors & ~taken_mask) == 0
    last = torch.where(accepted, tree.depths, -1).argmax(1)
    kept = tree.depths.gather(1, last[:, None])[:, 0] + 1
    return last, kept, _tree_path(tree, last)


def _chain_path(tree: Tree, accepted: Tensor) -> Tensor:
    steps = torch.arange(tree.max_depth + 1, device=accepted.device)
    return torch.where(steps <= accepted[:, None], steps, 0)


def _tree_path(tree: Tree, last: Tensor) -> Tensor:
    """Nodes [R, D + 1] from the root to `last` [R], 0 after: each node of the path goes to the place of its depth."""
    index = torch.arange(tree.tokens.shape[1], device=last.device)
    on_path = (tree.ancestors.gather(1, last[:, None]) >> index) & 1
    nowhere = tree.max_depth + 1
    place = torch.where(on_path > 0, tree.depths, nowhere)
    path = torch.zeros(len(last), nowhere + 1, dtype=torch.int64, device=last.device)
    return path.scatter_(1, place, index.expand_as(place))[:, :nowhere]


def _emit(tree: Tree, path: Tensor, kept: Tensor, bonus: Tensor) -> Tensor:
    """Tokens of the accepted path, then `bonus` [R], then -1."""
    steps = torch.arange(path.shape[1], device=path.device)
    accepted = tree.tokens.gather(1, path).roll(-1, 1)
    tokens = torch.where(steps < kept[:, None] - 1, accepted, bonus[:, None])
    return torch.where(steps < kept[:, None], tokens, -1)


# What all rules with a draft distribution share


def _accept_noise(key: Tensor, tree: Tree) -> Tensor:
    """One uniform per node, [R, T] float64."""
    index = torch.arange(tree.tokens.shape[1], device=key.device)
    return uniform(key, index.expand_as(tree.tokens), Stream.ACCEPT, index[:1])[..., 0]


def _draw(residual: Tensor, fallback: Tensor, key: Tensor, kept: Tensor) -> Tensor:
    """Sample [R] from unnormalised `residual` [R, V], or from `fallback` where rounding left nothing of it."""
    weights = torch.where(residual.sum(-1, keepdim=True) > 0, residual, fallback)
    ids = torch.arange(weights.shape[1], device=key.device)
    return (weights.log() + gumbel(key, kept[:, None], Stream.RESIDUAL, ids)[:, 0]).argmax(-1)


def _at(values: Tensor, node: Tensor) -> Tensor:
    """Row `node` [R] of `values` [R, T, V]."""
    return values.gather(1, node[:, None, None].expand(-1, 1, values.shape[2]))[:, 0]


def _token_probs(values: Tensor, at: Tensor, tokens: Tensor) -> Tensor:
    """values[r, at[r, t], tokens[r, t]] for `values` [R, T, V]: [R, T] float64."""
    return values.flatten(1).gather(1, at * values.shape[2] + tokens).double()


def _node_probs(tree: Tree, p: Tensor) -> Tensor:
    """The target's probability of each node's token after its parent, [R, T]; the root's entry means nothing."""
    return _token_probs(p, tree.parents, tree.tokens)


def _own_q(tree: Tree, q: DraftQ) -> Tensor:
    """q of each node's own token, [R, T]."""
    index = torch.arange(tree.tokens.shape[1], device=tree.tokens.device)
    return _token_probs(q.probs, index.expand_as(tree.tokens), tree.tokens)


def _drafted(tree: Tree) -> Tensor:
    """[R, T] bool: neither the root nor padding."""
    drafted = tree.valid()
    drafted[:, 0] = False
    return drafted


# Rejection


def _earlier_siblings(tree: Tree) -> Tensor:
    """[R, T, T] bool: node j is a child of i's parent that is tried before i."""
    drafted = _drafted(tree)
    same = (tree.parents[:, :, None] == tree.parents[:, None, :]) & drafted[:, :, None] & drafted[:, None, :]
    return same.tril(-1)


def _first_taken(trial: Tensor, earlier: Tensor) -> Tensor:
    """Of several children that would be accepted, the first one is."""
    return trial & ~(earlier & trial[:, None, :]).any(-1)


def _point_mass_trials(tree: Tree, p: Tensor, u: Tensor) -> Tensor:
    """Nodes [R, T] bool accepted by their own trial, when each was drafted with certainty.

    The i-th distinct child is tried with p(c_i) / (1 - p(c_1) - ... - p(c_{i-1})); a repeated one has nothing left.
    """
    chance = _node_probs(tree, p)
    if tree.chain:
        return u < chance
    earlier = _earlier_siblings(tree)
    repeated = (earlier & (tree.tokens[:, :, None] == tree.tokens[:, None, :])).any(-1)
    chance = torch.where(repeated, 0.0, chance)
    tried = torch.where(earlier, chance[:, None, :], 0.0).sum(-1)
    return _first_taken(u * (1 - tried).clamp(min=0) < chance, earlier)


def _point_mass_residual(tree: Tree, p: Tensor, last: Tensor) -> Tensor:
    """p after node `last` [R] without its children, [R, V]."""
    after = _at(p, last)
    children = (tree.parents == last[:, None]) & _drafted(tree)
    rejected = torch.zeros_like(after).scatter_add_(1, tree.tokens, children.to(after.dtype))
    return torch.where(rejected > 0, 0.0, after)


def _trials(tree: Tree, p: Tensor, q: DraftQ, u: Tensor) -> Tensor:
    """Nodes [R, T] bool accepted by their own trial, in general: round j tries the j-th child of every node at once."""
    own_q = _own_q(tree, q)
    if tree.chain or q.siblings <= 1:
        return u * own_q < _node_probs(tree, p)
    earlier = _earlier_siblings(tree)
    rank = earlier.sum(-1)
    taken = torch.zeros_like(tree.tokens, dtype=torch.bool)
    for tried in range(q.siblings):
        taken |= (rank == tried) & (u * own_q < _node_probs(tree, p))
        if tried + 1 < q.siblings:
            p = _without_children(tree, p, q, rank == tried)
    return _first_taken(taken, earlier)


def _without_children(tree: Tree, p: Tensor, q: DraftQ, turn: Tensor) -> Tensor:
    """`p` [R, T, V] of every node after rejecting its child among the nodes whose `turn` [R, T] it is."""
    index = torch.arange(tree.tokens.shape[1], device=p.device)
    is_child = (tree.parents[:, None, :] == index[:, None]) & (turn & _drafted(tree))[:, None, :]
    child = is_child.long().argmax(-1, keepdim=True)
    reduced = _reduce(p, q.probs.gather(1, child.expand_as(p)))
    return torch.where(is_child.any(-1, keepdim=True), reduced, p)


def _residual(tree: Tree, p: Tensor, q: DraftQ, last: Tensor) -> Tensor:
    """p after node `last` [R] when all of its children were rejected, [R, V]."""
    children = (tree.parents == last[:, None]) & _drafted(tree)
    rank = children.cumsum(1)
    after = _at(p, last)
    for tried in range(1, q.siblings + 1):
        turn = children & (rank == tried)
        reduced = _reduce(after, _at(q.probs, turn.long().argmax(1)))
        after = torch.where(turn.any(1, keepdim=True), reduced, after)
    return after


def _reduce(p: Tensor, q: Tensor) -> Tensor:
    """norm(max(p - q, 0)); all zeros if rounding leaves nothing."""
    rest = (p - q).clamp(min=0)
    return rest / rest.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)


# Block verification. Index i stands for the first i drafted tokens, so node i ends it and node i + 1 is x_{i+1}.


def _block_reach(tree: Tree, p: Tensor, q: DraftQ | None) -> Tensor:
    """P_i [R, T]: the running min(P ratio, 1) is a cumulative sum of logs reflected at 0."""
    ratio = _node_probs(tree, p).log()
    if q is not None:
        ratio = ratio - _own_q(tree, q).clamp(min=torch.finfo(torch.float64).tiny).log()
    ratio = torch.where(_drafted(tree), ratio, 0.0)
    total = ratio.cumsum(1)
    return (total - total.clamp(min=0).cummax(1).values).exp()


def _block_surplus(tree: Tree, p: Tensor, q: DraftQ | None, reach: Tensor) -> Tensor:
    """S_i [R, T - 1] for i < T - 1."""
    if q is None:  # the point mass q takes all of P_i p(x_{i+1}) and nothing else
        return reach[:, :-1] * (1 - _node_probs(tree, p)[:, 1:])
    return (reach[:, :-1, None] * p[:, :-1] - q.probs[:, 1:]).clamp(min=0).sum(-1)


def _block_accepted(tree: Tree, reach: Tensor, surplus: Tensor, eta: Tensor) -> Tensor:
    """The largest i with eta_i <= h_i, [R]."""
    rest = surplus + 1 - reach[:, :-1]
    # 0 / 0: P_i is 1 and q_{i+1} is p_{i+1}; then x_{i+1} passes too, and p_{i+1} is right for a bonus in any case.
    inner = torch.where(rest > 0, surplus / rest, 1.0)
    index = torch.arange(reach.shape[1], device=reach.device)
    ends = index == tree.counts[:, None] - 1
    chance = torch.where(ends, reach, torch.nn.functional.pad(inner, (0, 1)))
    return torch.where((eta <= chance) & tree.valid(), index, 0).amax(1)


def _block_residual(tree: Tree, after: Tensor, q: DraftQ | None, reach: Tensor, accepted: Tensor) -> Tensor:
    """What the bonus is drawn from, unnormalised [R, V], given the target's `after` [R, V] the accepted tokens."""
    ended = (accepted == tree.counts - 1)[:, None]
    following = (accepted + 1).clamp(max=tree.tokens.shape[1] - 1)[:, None]
    if q is None:
        rest = after.scatter(1, tree.tokens.gather(1, following), 0.0)
    else:
        rest = (reach.gather(1, accepted[:, None]) * after - _at(q.probs, following[:, 0])).clamp(min=0)
    return torch.where(ended, after, rest)


# Client drafts


def _dense(drafts: Sequence[Draft], width: int, vocab_size: int, device: torch.device | str) -> Tensor:
    """q of every node [R, width, V] float64, 0 for the root and padding, in one copy to `device`."""
    cells: list[int] = []
    probs: list[float] = []
    for row, draft in enumerate(drafts):
        for node, (ids, weights) in enumerate(_distributions(draft), start=1):
            cells += [(row * width + node) * vocab_size + token for token in ids]
            probs += weights
    bits = torch.tensor(probs, dtype=torch.float64).view(torch.int64)
    packed = upload(torch.stack([torch.tensor(cells, dtype=torch.int64), bits]), device)
    dense = torch.zeros(len(drafts) * width * vocab_size, dtype=torch.float64, device=device)
    return dense.scatter_(0, packed[0], packed[1].view(torch.float64)).view(len(drafts), width, vocab_size)


def _distributions(draft: Draft) -> list[tuple[Sequence[int], list[float]]]:
    """Support and normalised probabilities of every node's q."""
    if draft.q is None:
        return [((token,), [1.0]) for token in draft.tokens]
    weights = [[math.exp(value) for value in q.logprobs] for q in draft.q]
    return [(q.token_ids, [w / math.fsum(row) for w in row]) for q, row in zip(draft.q, weights, strict=True)]


def _most_siblings(draft: Draft | None) -> int:
    parents = draft.parents if draft else ()
    return max((parents.count(parent) for parent in set(parents)), default=1)
