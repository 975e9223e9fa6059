"""Recorded passes at other lengths, other batch sizes, other depths, and with poisoned memory: eager, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from graphs.conformance.backend import Batch
from graphs.conformance.harness import Kit, captured, close, eager, graph_of, replayed, same, update, worst
from graphs.conformance.rules import SHORT, STEPS, Wrong, captured_steps, far, step_inputs, steps_from
from graphs.conformance.world import World
from graphs.graph import Graph


def agree(world: World, judge: World, graph: Graph, batch: Batch, how: str) -> None:
    got, right = replayed(world, graph, batch), eager(judge, batch)
    if not same(got, right, batch):
        raise Wrong(f"{how}: replay and eager pass differ, {worst(got, right, batch)}")


def right(world: World, graph: Graph, batch: Batch) -> None:
    """A replay against the oracle."""
    got, expected = replayed(world, graph, batch), world.expected(batch)
    if not close(got, expected, batch, world.traits.tolerance):
        raise Wrong(f"a replay has wrong numbers: {worst(got, expected, batch)}")


def borders(kit: Kit, page_size: int, query_len: int) -> list[int]:
    """Lengths at which pages, splits or parts of the device change hands, and one to either side, ascending."""
    top = kit.traits.longest - query_len
    powers = [2**power for power in range(4, top.bit_length())]
    centres = {page_size, 2 * page_size, *powers, *kit.traits.borders, top - 1}
    return sorted({c + d for c in centres for d in (-1, 0, 1) if 0 <= c + d <= top})


def test_any_length_after_capture_at_a_short_one(kit: Kit, page_size: int, query_len: int) -> None:
    world, judge = kit.worlds(3, page_size)
    graph = graph_of(captured(kit, world, first := world.batch(SHORT, query_len)), first)
    lengths = borders(kit, page_size, query_len)
    for turn, length in enumerate(lengths):
        batch = world.batch([length, lengths[-1 - turn], 0], query_len)
        agree(world, judge, graph, batch, f"recorded at {SHORT}, replayed at {length}")


def test_a_replay_has_the_right_numbers(kit: Kit, query_len: int) -> None:
    """Not only those of an eager pass: the oracle's."""
    world, _ = kit.worlds(3)
    graph = graph_of(captured(kit, world, first := world.batch(SHORT, query_len)), first)
    right(world, graph, world.batch(far(world, query_len), query_len))


@pytest.mark.parametrize("rows", [(32, 12, 32), (1, 3, 2)])
def test_a_batch_that_shrinks_and_grows(kit: Kit, rows: Sequence[int]) -> None:
    """In a graph of its own size, and padded in the graph of the largest."""
    most, query_len = max(rows), kit.traits.query_lens[-1]
    world, judge = kit.worlds(most)
    top = kit.traits.longest - query_len
    lengths = [(37 * row + 5) % (top + 1) for row in range(most)]
    short = [length % 16 for length in lengths]
    manager = captured(kit, world, *(world.batch(short[:n], query_len) for n in set(rows)))
    for turn, count in enumerate(rows):
        contexts = lengths[turn:] + lengths[:turn]
        for size in (count, most):
            batch = world.batch(contexts[:count], query_len, padded_to=size)
            graph = graph_of(manager, batch)
            agree(world, judge, graph, batch, f"{count} rows in a graph of {size}, after {rows[:turn]}")


def test_padding_rows_change_nothing(kit: Kit) -> None:
    """Loud padding beside a row: the row's numbers are those of the oracle, and the next pass finds its tokens."""
    query_len = kit.traits.query_lens[-1]
    world, judge = kit.worlds(4)
    graph = graph_of(captured(kit, world, first := world.batch([9], query_len, padded_to=4)), first)
    for context in (0, world.page_size - 1, kit.traits.longest - query_len):
        batch = world.batch([context], query_len, padded_to=4)
        agree(world, judge, graph, batch, f"one row of {context} tokens and three rows of padding")
        right(world, graph, batch)


def test_drafts_that_stop_and_start_again(kit: Kit) -> None:
    """Depth K, then 0, then K: the passes in between leave nothing behind."""
    query_len = kit.traits.query_lens[-1]
    world, judge = kit.worlds(3)
    verify = graph_of(captured(kit, world, first := world.batch(SHORT, query_len)), first)
    steps = {depth: steps_from(world, SHORT, depth) for depth in (STEPS, 1)}
    loops = {depth: graph_of(captured_steps(kit, world, each), each[0]) for depth, each in steps.items()}
    top = far(world, query_len + STEPS * query_len)
    for turn, depth in enumerate((STEPS, 0, STEPS, 1, 0, STEPS)):
        contexts = [length // (turn + 1) for length in top]
        agree(world, judge, verify, world.batch(contexts, query_len), f"verifying in round {turn + 1}")
        if depth:
            drafts_agree(world, judge, loops[depth], steps_from(world, contexts, depth))


def drafts_agree(world: World, judge: World, graph: Graph, batches: Sequence[Batch]) -> None:
    world.fill(batches[0])
    update(world, graph.state, batches[0])
    graph.load(step_inputs(world, batches))
    for step, (got, batch) in enumerate(zip(graph.replay(graph.decisions), batches, strict=True)):
        made, alone = torch.stack(got), eager(judge, batch)
        if not same(made, alone, batch):
            raise Wrong(f"step {step + 1} of {len(batches)} in one graph: {worst(made, alone, batch)}")


def test_free_memory_of_the_pool_is_poisoned_between_replays(kit: Kit) -> None:
    """Two graphs share a pool: neither may count on what its last replay left where others compute."""
    query_len, recorder = kit.traits.query_lens[-1], kit.recorder()
    world, judge = kit.worlds(3)
    batches = [world.batch(SHORT, query_len), world.batch(SHORT[:1], query_len)]
    manager = captured(kit, world, *batches, recorder=recorder)
    poison = recorder.poison()
    for contexts in (far(world, query_len), SHORT, far(world, query_len)):
        for size in (3, 1):
            batch = world.batch(contexts[:size], query_len)
            poison.replay()
            agree(world, judge, graph_of(manager, batch), batch, f"{size} rows after the pool's free memory held NaN")


def test_replays_are_the_same_every_time(kit: Kit) -> None:
    query_len = kit.traits.query_lens[0]
    world, _ = kit.worlds(3)
    graph = graph_of(captured(kit, world, first := world.batch(SHORT, query_len)), first)
    batch = world.batch(far(world, query_len), query_len)
    results = [replayed(world, graph, batch) for _ in range(3)]
    if not all(same(result, results[0], batch) for result in results):
        raise Wrong(f"three replays of one batch differ, {worst(results[-1], results[0], batch)}")
