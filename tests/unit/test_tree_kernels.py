"""Kernels of draft trees on the interpreter against their torch twins: random scores with ties, random trees."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gqa import interpreted, on_the_interpreter  # noqa: F401
from test_round_fused import _own_ids, played, scene
from torch import Tensor

from graphs.shape import GraphShape
from graphs.tape import TapeRecorder
from speculator import drafting
from speculator.passes import EagerPasses, Verified
from speculator.readout import Ranking, Reading
from speculator.recorded import TREE, Sizes
from speculator.round import Rounds
from speculator.round_glue import Kind, Memory, TorchGlue
from speculator.round_state import FILTERED, GREEDY, NEVER, NO_TOKEN, NOISE
from speculator.sampling import gumbel_of
from speculator.tree import TreeGrowth
from speculator.types import DraftShape
from target.batch import Batch
from target.cache import LayerShape, PagedCache
from target.products import Product
from target.readout import Asked, Readout, Reads, read_logits
from tests.unit.engines import tiny_engine
from tests.unit.test_recorded import pair

CPU = torch.device("cpu")
few = settings(max_examples=20, deadline=None, derandomize=True)
SHAPES = [(1, 1, 1), (2, 1, 3), (1, 5, 4), (4, 6, 2), (8, 6, 32), (3, 10, 63), (16, 6, 60), (10, 8, 59), (16, 2, 63)]


def reading(nodes: int, like: Reader, source: torch.Generator) -> Reading:
    """Best columns of random logits of few values, so that many scores and sums are equal."""

    def numbers(*shape: int) -> Tensor:
        return torch.randint(1 - like.coarseness, 1, shape, generator=source).float() / 64

    n, k, device = like.rows * nodes, like.k, like.device
    columns = torch.stack([torch.randperm(99, generator=source)[:k] for _ in range(n)])
    scores, totals = numbers(n, k).sort(dim=1, descending=True).values, -numbers(2, n)
    parts = (columns, scores, numbers(n, k), totals[0], totals[1], torch.ones(n, dtype=torch.bool))
    warm = torch.rand(n, generator=source).masked_fill(torch.arange(n) % 3 == 0, 0).to(device) if like.warm else None
    return Reading(Readout(*(part.to(device) for part in parts)), Asked(k, warm, ranked=True), (like.rows, nodes))


class Reader(NamedTuple):
    """A head whose answers are random."""

    rows: int
    k: int
    coarseness: int  # different values
    warm: bool = False  # some rows are not greedy
    device: torch.device = CPU

    def levels(self, depth: int, seed: int = 0) -> list[Reading]:
        source = torch.Generator().manual_seed(seed)
        return [reading(self.k if level else 1, self, source) for level in range(depth)]


def same_growth(found: Sequence[Reading | Ranking], nodes: int, ids: Tensor | None) -> None:
    """Frontiers, the finished tree and the order of both are the twin's to the bit."""
    from speculator.kernels.tree import KernelGrowth

    first = found[0] if isinstance(found[0], Ranking) else found[0].ranking()
    rows, _, k = first.columns.shape
    context = torch.arange(7, 7 + rows, device=first.columns.device)
    ours, twin = KernelGrowth(k, len(found), context, ids), TreeGrowth(ids)
    for level, one in enumerate(found):
        ours.grow(one)
        twin.grow(one)
        if level + 1 < len(found):
            got, expected = ours.frontier(), twin.frontier()
            for name in ("tokens", "parents", "masks", "slots"):
                assert torch.equal(getattr(got, name), getattr(expected, name)), (level, name)
            assert got.positions is not None and torch.equal(got.positions, (context + level)[:, None].expand(rows, k))
    for got, expected in zip(ours.select(nodes), twin.select(nodes), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@on_the_interpreter
@pytest.mark.parametrize("coarseness", [3, 1 << 20])
@pytest.mark.parametrize(("k", "depth", "nodes"), SHAPES)
def test_a_dynamic_tree_is_that_of_the_twin(k: int, depth: int, nodes: int, coarseness: int) -> None:
    ids = torch.arange(99) * 3 + 5 if coarseness == 3 else None
    same_growth(Reader(2, k, coarseness, warm=coarseness > 3).levels(depth), nodes, ids)


@on_the_interpreter
@few
@given(
    k=st.integers(1, 16), depth=st.integers(1, 10), nodes=st.integers(1, 63), rows=st.integers(1, 8),
    coarseness=st.sampled_from([1, 2, 5, 1 << 20]), warm=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_dynamic_tree(k: int, depth: int, nodes: int, rows: int, coarseness: int, warm: bool, seed: int) -> None:
    depth = min(depth, 2 + 64 // k)
    same_growth(Reader(rows, k, coarseness, warm).levels(depth, seed), nodes, None)


@on_the_interpreter
def test_written_rankings_grow_as_read_ones() -> None:
    rankings = [found.ranking() for found in Reader(3, 5, 9).levels(4)]
    same_growth(rankings, 20, torch.arange(99).flip(0).contiguous())


@on_the_interpreter
def test_broken_scores_are_bounded_as_the_twin_bounds_them() -> None:
    found = Reader(2, 3, 4).levels(4)
    for level, bad in enumerate([math.nan, math.inf, -math.inf, 7.0]):
        found[level].found.scores[0, 1] = bad
        found[level].found.scores[1, 2] = -math.inf
    found[1].found.scores[:] = -math.inf
    found[2].found.score_total[0] = math.nan  # type: ignore[index]
    same_growth(found, 9, None)


# ---- between the passes of a round ----


class Held(NamedTuple):
    """Sessions in any state that hold trees, over a cache of their own, and what the target says."""

    memory: Memory
    orders: Tensor
    logits: Tensor  # [R, T, V]


def held(rows: int, nodes: int, depth: int, seed: int, device: torch.device = CPU) -> Held:
    base, pages = scene(rows, nodes, seed, device, 9), 9
    state, draw, dice = base.memory.state, torch.Generator().manual_seed(seed), random.Random(seed)
    room = (rows + 3) * pages
    cache = PagedCache([[LayerShape(2, 12)] * 2, [LayerShape(1, 4)]], room + 1, 8, torch.float32, device)
    for group in cache.groups:
        group.copy_(torch.randn(group.shape, generator=draw))
    state.memory["parents"].copy_(torch.tensor([_parents(dice, nodes, depth) for _ in range(rows + 3)]))
    tables = torch.randperm(room, generator=draw).view(-1, pages) + 1
    state.memory["tables"].copy_(tables)
    state.memory["tables"][state.spare] = 0
    return Held(base.memory._replace(cache=cache), base.orders, base.logits)


def _parents(dice: random.Random, nodes: int, depth: int) -> list[int]:
    """Of a tree of at most `depth` levels, most of it deep."""
    depths: dict[int, int] = {-1: 0}
    above = []
    for node in range(nodes):
        room = [p for p in range(-1, node) if depths[p] < depth]
        above.append(max(room[-3:]) if dice.random() < 0.6 else dice.choice(room))
        depths[node] = depths[above[-1]] + 1
    return above


def following(logits: Tensor, batch: Batch, seed: int) -> Tensor:
    """Logits [R, T, V] after which the draws mostly follow a node of the tree."""
    shapes, draw = batch.ancestors, random.Random(seed)
    assert shapes is not None
    more = torch.zeros_like(logits)
    for row, masks in enumerate(shapes.tolist()):
        for node, mask in list(enumerate(masks))[1:]:
            above = [n for n in range(node) if mask >> n & 1]
            if above and draw.random() < 0.75:
                more[row, above[-1]] = 0.0
                more[row, above[-1], batch.tokens[row, node]] = 90.0
    return logits + more


def judged(glue: Any, it: Held, seed: int) -> dict[str, Tensor]:
    """All that a round says and remembers up to its verdict, but for the memory of padding, which is nobody's."""
    batch = glue.begin(it.orders)
    logits = following(it.logits, batch, seed)
    glue.judge(Verified(logits, lambda: logits, partial(read_logits, logits.flatten(0, 1), noise=gumbel_of)))
    names = ("tokens", "positions", "context", "counts", "pages", "ancestors")
    said = {name: getattr(batch, name).clone() for name in names}
    state, rows = it.memory.state.memory, it.memory.rows
    said |= {name: state[name][:-1].clone() for name in ("ended", "room")}
    said |= {name: getattr(rows, name)[:-1].clone() for name in ("cached", "root")}
    cache = {
        f"cache {i}": group[:, it.memory.cache.page_size :].clone() for i, group in enumerate(it.memory.cache.groups)
    }
    return said | cache | _verdict(glue)


def _verdict(glue: Any) -> dict[str, Tensor]:
    if isinstance(glue, TorchGlue):
        batch, parts, features = glue.true_rows.batch, glue.parts, glue.true_rows.features
        given = (batch.tokens, batch.positions, batch.counts, glue.context, features, *parts)
    else:
        j, path = glue.judged, glue.kind.drafted.depth + 1
        columns = j.result[:, : 3 * path + 2].split([path, 1, path, path, 1], 1)
        reals = columns[3].contiguous().view(torch.float64)
        given = (j.tokens, j.positions, j.kept, j.context, glue.features, columns[0], columns[1][:, 0], columns[2])
        given = (*given, reals, columns[4][:, 0])
    names = "true tokens, true positions, true counts, next context, features, said, kept, path, logprobs, finite"
    return dict(zip(names.split(", "), given, strict=True))


def both(rows: int, nodes: int, depth: int, mode: str, seed: int, device: torch.device = CPU) -> dict[str, Tensor]:
    """What the two glues say of the same sessions; the torch one's."""
    from speculator.round_tree import TreeGlue

    kind, said = Kind(nodes + 1, mode, DraftShape(depth, nodes, 4), False), []
    for glue in (TorchGlue, TreeGlue):
        it = held(rows, nodes, depth, seed, device)
        said.append(judged(glue(it.memory, kind), it, seed))
    expected, got = said
    for name, values in expected.items():
        torch.testing.assert_close(got[name].double(), values.double(), rtol=0, atol=0, equal_nan=True, msg=name)
    return expected


@on_the_interpreter
@few
@given(
    rows=st.integers(1, 8), nodes=st.integers(1, 63), depth=st.integers(1, 16),
    mode=st.sampled_from([GREEDY, NOISE, FILTERED]), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_any_verdict_is_that_of_torch(rows: int, nodes: int, depth: int, mode: str, seed: int) -> None:
    both(rows, nodes, depth, mode, seed)


@on_the_interpreter
@pytest.mark.parametrize("mode", [GREEDY, NOISE])
@pytest.mark.parametrize("nodes, depth", [(1, 1), (32, 6), (63, 10)])
def test_many_rows_at_once(nodes: int, depth: int, mode: str) -> None:
    """The scene has what it is for: acceptance of all kinds, ends by stop and by limit, unsound rows."""
    said = both(16, nodes, depth, mode, depth)
    assert {0, 1} <= set(said["kept"].tolist()) and said["kept"].max() > min(depth, 3)
    assert 0 < int(said["ended"].sum()) < 16 and 0 < int((said["finite"] == 0).sum()) < 16
    assert (said["counts"] == 0).any() and (said["room"] == 0).any()
    assert depth < 6 or (said["path"][:, 1:] > said["path"][:, :-1] + 1).any()  # something had to move


@on_the_interpreter
@pytest.mark.parametrize("beyond", [-1, 0, 1])
def test_a_tree_ends_its_sequence_exactly_at_the_limit(beyond: int) -> None:
    from speculator.round_tree import TreeGlue

    kind, ended = Kind(10, GREEDY, DraftShape(3, 9, 4), False), []
    it = endless()
    live, length = it.orders[:, 1] >= 0, judged(TorchGlue(it.memory, kind), it, 3)["next context"] + 1
    rows = it.orders[live, 0]
    for glue in (TorchGlue, TreeGlue):
        it = endless()
        it.memory.state.memory["limit"][rows] = length[live] + beyond
        ended.append(judged(glue(it.memory, kind), it, 3)["ended"][rows])
    assert len(rows) > 3 and bool((ended[0] == (beyond <= 0)).all()) and torch.equal(*ended)


def endless() -> Held:
    """Sessions that neither a token nor a limit ends."""
    it = held(16, 9, 3, 3)
    state = it.memory.state.memory
    for name, value in (("ended", False), ("stops", NO_TOKEN), ("limit", NEVER)):
        state[name].fill_(value)
    return it


@on_the_interpreter
def test_a_chain_of_63_nodes_reaches_the_sign_bit() -> None:
    from speculator.kernels.tree import launch_begin_tree

    it = held(1, 63, 63, 0)
    state, rows = it.memory.state.memory, it.memory.rows
    state["parents"][0] = torch.arange(-1, 62)
    memory = state | {"cached": rows.cached, "root": rows.root}
    begun, shapes = launch_begin_tree(torch.tensor([[0, 63, 9, 2]]), memory, it.memory.state.spare, 64, 63, False)
    assert shapes.ancestors[0, 63] == -1 and shapes.depths[0].tolist() == list(range(64))
    assert begun.positions[0].tolist() == list(range(9, 73)) and int(begun.tokens[0, 0]) == 2


# ---- whole rounds ----

TREES = (DraftShape(3, 9, 3), DraftShape(1, 3, 4), DraftShape(7, 12, 2))


@functools.cache
def rounds_of(kind: str, shape: DraftShape) -> Rounds:
    """Rounds of an engine that records none of them; all models but MTP's are asked about logits that nobody writes."""
    target, head = pair(kind) if kind != "own ids" else _own_ids()
    for module in (m for model in (target, head) for m in model.modules() if isinstance(m, Reads) and kind != "mtp"):
        module.reader = _read
    engine = tiny_engine(target, head)
    assert isinstance(engine.passes, EagerPasses)
    return Rounds(engine.passes, TapeRecorder(), Sizes(4, 32, 4, shape), engine.cache, engine.rows, engine.lookback)


def _read(x: Tensor, weight: Tensor, _: Product, asked: Asked) -> Readout:
    return read_logits(x @ weight.T, asked, gumbel_of)


@on_the_interpreter
@pytest.mark.parametrize("kind", ["eagle3", "own ids", "mtp"])
@pytest.mark.parametrize("mode", [GREEDY, NOISE, FILTERED])
def test_whole_rounds_say_and_leave_what_they_do_in_torch(kind: str, mode: str, monkeypatch: Any) -> None:
    for shape in TREES:
        rounds = rounds_of(kind, shape)
        for count in (1, 3):
            form = GraphShape(count, shape.nodes + 1, (*TREE, shape.nodes, shape.branching, shape.depth, mode))
            said = []
            for fused in (False, True):
                monkeypatch.setattr(drafting, "in_kernels", lambda _, fused=fused: fused)
                said.append(played(rounds, form, fused, seed=count))
            alike(said[1], said[0], rounds._kind_of(form).layout.nodes)


def alike(got: tuple[list[Any], dict[str, Tensor]], expected: tuple[list[Any], dict[str, Tensor]], nodes: int) -> None:
    """Whole numbers all; real ones where there are any, up to the order of sums in torch."""
    for column, (mine, theirs) in enumerate(zip(got[0], expected[0], strict=True)):
        if column not in (3, 7):
            assert mine == theirs, column
            continue
        counts = expected[0][1] if column == 3 else [nodes] * len(mine)
        for one, other, count in zip(mine, theirs, counts, strict=True):
            assert one[:count] == pytest.approx(other[:count], abs=1e-4)
    for name, kept in expected[1].items():
        torch.testing.assert_close(got[1][name], kept, rtol=0, atol=1e-4, msg=name)


@on_the_interpreter
def test_which_rounds_the_kernels_take() -> None:
    from speculator.round_tree import TreeGlue

    rounds = rounds_of("mtp", TREES[0])
    rounds.fused = True
    nodes = TREES[0].nodes + 1
    assert isinstance(rounds._glue(Kind(nodes, GREEDY, TREES[0], False)), TreeGlue)
    assert isinstance(rounds._glue(Kind(nodes, FILTERED, TREES[0], False)), TreeGlue)
