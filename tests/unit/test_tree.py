"""Layout of trees against plain-Python twins, and the dynamic tree against a naive one."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speculator.readout import Ranking
from speculator.tree import (
    StaticTree,
    TreeGrowth,
    ancestor_masks,
    below,
    chain,
    compaction,
    pack,
    seen_tokens,
    static_levels,
)
from speculator.types import Draft

VOCAB = 11
fast = settings(max_examples=80, deadline=None, derandomize=True)


@st.composite
def parent_lists(draw: st.DrawFn, most: int = 63) -> tuple[int, ...]:
    count = draw(st.integers(0, most))
    return tuple(draw(st.integers(-1, i - 1)) for i in range(count))


@st.composite
def draft_trees(draw: st.DrawFn, most: int = 63) -> Draft:
    parents = draw(parent_lists(most))
    return Draft(tuple(draw(st.integers(0, VOCAB - 1)) for _ in parents), parents)


def path_to(parents: tuple[int, ...], node: int) -> list[int]:
    """Nodes of a packed tree from the root to `node`, both included (drafted node i is node i + 1)."""
    return [0] if node == 0 else [*path_to(parents, parents[node - 1] + 1), node]


def as_bits(nodes: list[int]) -> int:
    mask = sum(1 << node for node in nodes)
    return mask - 2**64 if mask >= 2**63 else mask


# Layout


@fast
@given(st.lists(draft_trees(), min_size=1, max_size=3), st.integers(0, 4))
def test_packed_trees_are_what_the_drafts_say(drafts: list[Draft], extra: int) -> None:
    widest = max(len(draft.tokens) for draft in drafts) + 1
    width = min(64, widest + extra)
    tree = pack(drafts, list(range(len(drafts))), "cpu", width=width)
    assert tree.tokens.shape == (len(drafts), width)
    for row, draft in enumerate(drafts):
        count = len(draft.tokens) + 1
        assert tree.counts[row] == count
        assert tree.tokens[row, :count].tolist() == [row, *draft.tokens]
        for node in range(count):
            path = path_to(draft.parents, node)
            assert tree.depths[row, node] == len(path) - 1 <= tree.max_depth
            assert tree.parents[row, node] == (path[-2] if node else 0)
            assert tree.ancestors[row, node] == as_bits(path)
        for node in range(count, width):
            assert tree.ancestors[row, node] == as_bits([node])
        assert tree.valid()[row].tolist() == [node < count for node in range(width)]


@fast
@given(st.lists(st.integers(0, 63), min_size=1, max_size=4))
def test_chains_have_one_layout_however_they_are_made(lengths: list[int]) -> None:
    drafts = [Draft(tuple(range(n)), tuple(range(-1, n - 1))) for n in lengths]
    branched = Draft((1, 2), (-1, -1))
    packed = pack(drafts, [3] * len(drafts), "cpu")
    beside_a_tree = pack([*drafts, branched], [3] * (len(drafts) + 1), "cpu")
    assert packed.chain and not beside_a_tree.chain
    again = beside_a_tree.select(torch.arange(len(drafts)), chain=True)
    for one, other in zip(packed[:5], again[:5], strict=True):
        assert torch.equal(one, other[..., : one.shape[1]] if one.dim() == 2 else other)
    assert packed.max_depth == max(lengths)


def test_missing_drafts_are_empty_trees() -> None:
    tree = pack([None, None], [4, 5], "cpu")
    assert tree.tokens.tolist() == [[4], [5]]
    assert tree.counts.tolist() == [1, 1] and tree.max_depth == 0
    assert pack([None], [4], "cpu", width=3, max_depth=2).max_depth == 2


def test_a_chain_of_64_nodes_fills_the_mask() -> None:
    tree = chain(torch.zeros(1, 64, dtype=torch.int64), torch.tensor([64]), 63)
    assert [int(mask) % 2**64 for mask in tree.ancestors[0]] == [2 ** (n + 1) - 1 for n in range(64)]


@fast
@given(parent_lists())
def test_masks_on_the_device_equal_masks_of_the_host(parents: tuple[int, ...]) -> None:
    tree = pack([Draft(parents, parents)], [0], "cpu")
    assert torch.equal(ancestor_masks(tree.parents, tree.max_depth), tree.ancestors)


@fast
@given(draft_trees(20))
def test_seen_tokens_are_the_committed_ones_and_the_path(draft: Draft) -> None:
    committed = torch.zeros(1, VOCAB, dtype=torch.bool).index_fill_(1, torch.tensor([2, 7]), True)
    tree = pack([draft], [9], "cpu", width=22)
    seen = seen_tokens(committed, tree)
    tokens = [9, *draft.tokens]
    for node in range(len(tokens)):
        expected = {2, 7} | {tokens[n] for n in path_to(draft.parents, node)}
        assert set(seen[0, node].nonzero().flatten().tolist()) == expected
    assert committed.sum() == 2


@fast
@given(draft_trees(30), st.data())
def test_compaction_leaves_the_path_where_decoding_would_have_put_it(draft: Draft, data: st.DataObject) -> None:
    last = data.draw(st.integers(0, len(draft.tokens)))
    path = path_to(draft.parents, last)
    cached = data.draw(st.integers(0, 5))
    padded = torch.tensor([path + [0] * (31 - len(path))])
    source, destination = compaction(padded, torch.tensor([len(path)]), torch.tensor([cached]))
    storage = torch.tensor([-1] * cached + list(range(31)))
    before = storage.clone()
    storage[destination[0]] = before[source[0]]
    assert storage[: cached + len(path)].tolist() == [-1] * cached + path
    assert torch.equal(storage[cached + len(path) :], before[cached + len(path) :])


# Static trees


@fast
@given(parent_lists(30))
def test_static_levels_run_every_inner_node_once(parents: tuple[int, ...]) -> None:
    levels = static_levels(parents)
    assert sorted(node for level in levels for node in level.nodes) == list(range(len(parents)))
    above, scratch = [-1], []  # nodes that ran last, and all that ran, in scratch order
    for level in levels:
        for node, parent, rank in zip(level.nodes, level.parents, level.ranks, strict=True):
            assert above[parent] == parents[node]
            assert rank == [n for n, p in enumerate(parents) if p == parents[node]].index(node)
        above = [level.nodes[index] for index in level.expanded]
        for node, mask in zip(above, level.masks, strict=True):
            ancestors = [n - 1 for n in path_to(parents, node + 1)[1:-1]]
            assert [n for bit, n in enumerate(scratch) if mask >> bit & 1] == ancestors
        scratch += above
    assert set(scratch) == set(parents) - {-1}


@fast
@given(draft_trees(30))
def test_a_filled_static_tree_is_the_packed_one(draft: Draft) -> None:
    roots, tokens = torch.tensor([4, 5]), torch.tensor([draft.tokens, draft.tokens], dtype=torch.int64)
    filled = StaticTree.from_parents(draft.parents, "cpu").fill(roots, tokens)
    packed = pack([draft, draft], [4, 5], "cpu")
    assert all(torch.equal(one, other) for one, other in zip(filled[:5], packed[:5], strict=True))
    assert filled[5:] == packed[5:]


# The dynamic tree, against section 4 of the EAGLE-2 paper written down naively


class PathHead:
    """A head whose best k continuations are a pure function of the path; coarse log-probabilities make ties."""

    def __init__(self, k: int, coarseness: int, seed: int) -> None:
        self.k, self.coarseness, self.seed = k, coarseness, seed

    def __call__(self, path: tuple[int, ...]) -> list[tuple[float, int]]:
        rng = random.Random(f"{self.seed} {path}")
        logprobs = sorted((-rng.randrange(self.coarseness) / 64 for _ in range(self.k)), reverse=True)
        return list(zip(logprobs, rng.sample(range(100), self.k), strict=True))


def naive_tree(head: PathHead, depth: int, nodes: int) -> list[tuple[int, int, float]]:
    """(token, parent among the kept nodes, logprob) of the kept nodes."""
    k = head.k
    found = [(lp, lp, token, -1, (token,)) for lp, token in head(())]  # score, logprob, token, parent, path
    frontier = list(range(k))
    for _ in range(depth - 1):
        first = len(found)
        for parent in frontier:
            found += [
                (found[parent][0] + lp, lp, t, parent, (*found[parent][4], t)) for lp, t in head(found[parent][4])
            ]
        frontier = sorted(range(first, len(found)), key=lambda i: (-found[i][0], i))[:k]
    kept = sorted(sorted(range(len(found)), key=lambda i: (-found[i][0], i))[:nodes])
    place = {-1: -1} | {old: new for new, old in enumerate(kept)}
    return [(found[i][2], place[found[i][3]], found[i][1]) for i in kept]


def expand(heads: list[PathHead], paths: list[list[tuple[int, ...]]]) -> tuple[torch.Tensor, torch.Tensor]:
    rows = [[head(path) for path in row] for head, row in zip(heads, paths, strict=True)]
    return torch.tensor([[[c[0] for c in n] for n in row] for row in rows]), torch.tensor(
        [[[c[1] for c in n] for n in row] for row in rows]
    )


def check_masks(masks: torch.Tensor, paths: list[tuple[int, ...]], ran: list[tuple[int, ...]]) -> None:
    for mask, path in zip(masks.tolist(), paths, strict=True):
        assert [p for bit, p in enumerate(ran) if mask >> bit & 1] == [path[:n] for n in range(1, len(path))]


def grow(heads: list[PathHead], depth: int) -> TreeGrowth:
    """The draft loop with path heads; the 'hidden state' of a node is its path."""
    scores, tokens = expand(heads, [[()] for _ in heads])
    growth = TreeGrowth()
    growth.grow(Ranking(tokens, scores, scores))
    above: list[list[tuple[int, ...]]] = [[()] for _ in heads]
    ran: list[list[tuple[int, ...]]] = [[] for _ in heads]
    for _ in range(depth - 1):
        frontier = growth.frontier()
        slots = zip(above, frontier.parents.tolist(), frontier.tokens.tolist(), strict=True)
        above = [[(*row[p], t) for p, t in zip(parents, tokens, strict=True)] for row, parents, tokens in slots]
        for row, paths in enumerate(above):
            check_masks(frontier.masks[row], paths, ran[row])
            ran[row] += paths
        scores, tokens = expand(heads, above)
        growth.grow(Ranking(tokens, scores, scores))
    return growth


@pytest.mark.parametrize("coarseness", [1, 3, 40, 100_000])
@pytest.mark.parametrize(
    ("depth", "k", "nodes"), [(1, 4, 3), (2, 1, 2), (3, 2, 5), (4, 3, 63), (5, 4, 12), (8, 10, 59), (2, 3, 60)]
)
def test_the_dynamic_tree_is_the_naive_one(depth: int, k: int, nodes: int, coarseness: int) -> None:
    heads = [PathHead(k, coarseness, seed) for seed in range(3)]
    grown = grow(heads, depth).select(nodes)
    for row, head in enumerate(heads):
        expected = naive_tree(head, depth, nodes)
        for ours, naive in zip(grown, zip(*expected, strict=True), strict=True):
            assert ours[row].tolist() == list(naive)


def test_reported_logprobs_may_differ_from_the_ranking() -> None:
    scores, tokens = torch.tensor([[[-1.0, -2.0]]]), torch.tensor([[[8, 9]]])
    growth = TreeGrowth()
    growth.grow(Ranking(tokens, scores, torch.tensor([[[-0.1, -0.2]]])))
    growth.grow(Ranking(tokens.expand(1, 2, 2), scores.expand(1, 2, 2), torch.full((1, 2, 2), -0.5)))
    torch.testing.assert_close(growth.select(3).logprobs, torch.tensor([[-0.1, -0.2, -0.5]]))


def test_a_broken_head_still_gives_a_tree() -> None:
    """NaN or a positive score below a bad parent must not be chosen without the parent."""
    growth = TreeGrowth()
    first, scores = torch.tensor([[[-1.0, -5.0]]]), torch.tensor([[[-1.0, -math.inf], [math.nan, 9.0]]])
    growth.grow(Ranking(torch.tensor([[[1, 2]]]), first, first))
    for _ in range(2):
        growth.grow(Ranking(torch.tensor([[[1, 2], [3, 4]]]), scores, scores))
    for nodes in range(1, 10):
        grown = growth.select(nodes)
        assert (grown.parents[0] < torch.arange(nodes)).all()
        tree = below(torch.tensor([0]), grown.tokens, grown.parents, torch.tensor([nodes + 1]), 3)
        assert torch.equal(tree.depths[0, 1:], tree.depths[0].gather(0, tree.parents[0, 1:]) + 1)
