"""Eager passes of a backend against the oracle. Memory that no query may see holds NaN."""

from __future__ import annotations

import pytest

from graphs.conformance.harness import Kit
from graphs.conformance.rules import far, right_numbers


def test_lengths_around_page_borders(kit: Kit, page_size: int, query_len: int) -> None:
    contexts = [0, 1, page_size - 1, page_size, page_size + 1, 2 * page_size - query_len]
    world, _ = kit.worlds(len(contexts), page_size)
    right_numbers(world, world.batch([min(max(c, 0), kit.traits.longest - query_len) for c in contexts], query_len))


def test_the_longest_rows(kit: Kit, page_size: int, query_len: int) -> None:
    world, _ = kit.worlds(3, page_size)
    right_numbers(world, world.batch(far(world, query_len), query_len))


def test_rows_with_fewer_queries_than_the_batch(kit: Kit, query_len: int) -> None:
    """Zero queries, all queries, all but one; a row without queries or tokens stands between others."""
    world, _ = kit.worlds(4)
    right_numbers(world, world.batch([7, 0, 20, 3], query_len, [query_len, 0, max(query_len - 1, 1), 1]))


def test_empty_batches_of_padding_alone(kit: Kit, query_len: int) -> None:
    """Nothing valid comes out, and nothing breaks."""
    world, _ = kit.worlds(2)
    right_numbers(world, world.batch([0, 0], query_len, [0, 0]))


def test_a_pass_sees_the_tokens_that_earlier_passes_stored(kit: Kit, query_len: int) -> None:
    """A row grows pass by pass from nothing, across a page border."""
    world, _ = kit.worlds(2)
    steps = -(-(world.page_size + 1) // query_len) + 1
    for step in range(min(steps, (kit.traits.longest - query_len) // query_len)):
        right_numbers(world, world.batch([step * query_len, 0], query_len))


def test_tokens_above_the_context(kit: Kit, query_len: int) -> None:
    """Three tokens of earlier passes lie between the context and the queries, across a page border."""
    world, _ = kit.worlds(2)
    right_numbers(world, world.batch([world.page_size - 2, 5], query_len, offset=3))


@pytest.mark.parametrize("nodes", [(0,), (0, 0, 1), (0, 0, 0, 2)], ids=["one", "two leaves", "deep"])
def test_trees_see_their_ancestors_alone(kit: Kit, nodes: tuple[int, ...]) -> None:
    """`nodes` are parents; node 0 is the root, whose parent is said to be itself."""
    if not kit.traits.trees:
        pytest.skip("the backend's traits say that it has no trees")
    if len(nodes) > max(kit.traits.query_lens):
        pytest.skip(f"the backend takes {max(kit.traits.query_lens)} queries at most")
    world, _ = kit.worlds(2)
    masks = tree_masks(nodes)
    right_numbers(world, world.batch([9, world.page_size - 1], len(nodes), ancestors=[masks, masks]))


def tree_masks(parents: tuple[int, ...]) -> list[int]:
    """Bit masks of each node's ancestors and itself."""
    masks: list[int] = []
    for node, parent in enumerate(parents):
        masks.append(1 << node | (masks[parent] if node else 0))
    return masks
