"""Kernels of a chain round between its passes beside torch's operations, on the interpreter: pieces, whole rounds."""

from __future__ import annotations

import functools
import random
from collections import Counter
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fused import NO_KERNELS
from test_gqa import interpreted, on_the_interpreter  # noqa: F401
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from graphs.graph import Graph
from graphs.round import Plans
from graphs.shape import GraphShape
from graphs.state import AttentionState
from graphs.tape import TapeRecorder
from speculator.passes import EagerPasses, Verified
from speculator.recorded import Sizes
from speculator.round import Rounds
from speculator.round_glue import Kind, Memory, TorchGlue
from speculator.round_state import FILTERED, GREEDY, MOST_STOPS, NEVER, NO_TOKEN, NOISE, RoundState
from speculator.rows import Rows
from speculator.sampling import gumbel_of
from speculator.types import DraftShape, SamplingParams
from target.batch import Batch
from target.fused import fuse
from target.readout import read_logits
from tests.unit import test_run_ahead as ahead
from tests.unit.engines import tiny_engine, tiny_head, tiny_target
from tests.unit.test_recorded import pair
from tests.unit.test_round import CHAIN, lent, play, read, same, scramble

CPU, WORDS = torch.device("cpu"), 13  # few, so that stops and ties happen
NOISY = [SamplingParams(), SamplingParams(temperature=0.9, seed=3), SamplingParams(temperature=0.6, seed=5)]


class Scene(NamedTuple):
    """Sessions in any state, and what is asked of them."""

    memory: Memory
    orders: Tensor
    logits: Tensor


def scene(rows: int, depth: int, seed: int, device: torch.device = CPU, pages: int = 5) -> Scene:
    """Rows that the host knows, rows ahead, ended ones and padding; near their ends, and far."""
    draw, dice = torch.Generator().manual_seed(seed), random.Random(seed)

    def ints(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=draw)

    count = rows + 3
    state, kept = RoundState(count, depth, pages, device), Rows(count, 8, WORDS, torch.float32, device)
    fill = {
        "tokens": ints(0, WORDS, count, depth), "parents": ints(0, 9, count, depth), "ended": ints(0, 4, count) == 0,
        "tables": ints(1, 99, count, pages), "room": ints(0, depth + 3, count), "seed": ints(-(2**62), 2**62, count),
        "limit": ints(20, 60, count).where(ints(0, 2, count) > 0, NEVER),
        "stops": ints(0, WORDS, count, MOST_STOPS).where(ints(0, 40, count, MOST_STOPS) == 0, NO_TOKEN),
        "temperature": ints(0, 3, count) / 2.0,
    }  # fmt: skip
    for name, values in fill.items():
        state.memory[name].copy_(values)
    state.memory["tables"][state.spare] = 0
    kept.cached.copy_(ints(10, 50, count))
    kept.root.copy_(ints(0, WORDS, count))
    orders = torch.tensor([_order(dice, row, depth, state.spare) for row in dice.sample(range(count - 1), rows)])
    logits = ints(-3, 4, rows, depth + 1, WORDS).float()
    logits[ints(0, 30, rows, depth + 1) == 0, 0] = float("nan")
    filters = {"top_k": ints(0, 5, count), "top_p": ints(2, 5, count) / 4, "min_p": ints(0, 3, count) / 9}
    for name, values in filters.items():
        state.memory[name].copy_(values)
    return Scene(Memory(state, kept, None, None, 999), orders.to(device), logits.to(device))  # type: ignore[arg-type]


def _order(dice: random.Random, row: int, depth: int, spare: int) -> tuple[int, ...]:
    nobody, ahead = (spare, -1, 0, 0), (row, dice.randint(0, depth), -1, -1)
    known = (row, dice.choice([depth, dice.randint(0, depth)]), dice.randint(5, 55), dice.randrange(WORDS))
    return dice.choice([nobody, ahead, ahead, known])


def agreeing(logits: Tensor, tokens: Tensor, seed: int) -> Tensor:
    """Logits [R, T, V] that mostly make the next of tokens [R, T] the target's own."""
    dice = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(seed)).to(tokens.device)
    nods = (dice[:, 1:] < 0.7) | (dice[:, :1] < 0.5)
    more = torch.zeros_like(logits)
    more[:, :-1].scatter_(2, tokens[:, 1:, None], nods[..., None].float() * 90)
    return logits + more


def judged(glue: Any, s: Scene, seed: int) -> dict[str, Tensor]:
    """All that a round says and remembers up to its verdict; padding's memory is nobody's."""
    batch = glue.begin(s.orders)
    logits = agreeing(s.logits, batch.tokens, seed)
    read = partial(read_logits, logits.flatten(0, 1), noise=gumbel_of)
    glue.judge(Verified(logits, (lambda: logits) if seed % 2 else logits, read))
    said = {name: getattr(batch, name).clone() for name in ("tokens", "positions", "context", "counts", "pages")}
    state, rows = s.memory.state.memory, s.memory.rows
    kept = {name: state[name][:-1].clone() for name in ("ended", "room")}
    return said | kept | {"cached": rows.cached[:-1].clone(), "root": rows.root[:-1].clone()} | _verdict(glue)


def _verdict(glue: Any) -> dict[str, Tensor]:
    if isinstance(glue, TorchGlue):
        batch, parts = glue.true_rows.batch, glue.parts
        given = (batch.tokens, batch.positions, batch.counts, glue.context, *parts)
    else:
        j, path = glue.judged, glue.kind.queries
        columns = j.result[:, : 3 * path + 2].split([path, 1, path, path, 1], 1)
        reals = columns[3].contiguous().view(torch.float64)
        given = (j.tokens, j.positions, j.kept, j.context, columns[0], columns[1][:, 0], columns[2], reals)
        given = (*given, columns[4][:, 0])
    names = "true tokens, true positions, true counts, next context, said, kept, path, logprobs, finite".split(", ")
    return dict(zip(names, given, strict=True))


def alike(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Whole numbers all; real ones where something was committed."""
    for name, values in expected.items():
        found = got[name]
        if name == "logprobs":
            there = torch.arange(values.shape[1], device=values.device) < expected["kept"][:, None]
            torch.testing.assert_close(found[there], values.double()[there], rtol=0, atol=1e-4, equal_nan=True)
        else:
            assert torch.equal(found.long(), values.long()), name


def chain_glue() -> Any:
    from speculator.round_fused import ChainGlue  # which needs triton

    return ChainGlue


def both(
    rows: int, depth: int, mode: str, seed: int, plain: bool = False, device: torch.device = CPU
) -> dict[str, Tensor]:
    """The two glues over the same scene; what they both say."""
    kind, said = Kind(depth + 1, mode, DraftShape(depth), plain), []
    for glue in (TorchGlue, chain_glue()):
        s = scene(rows, depth, seed, device)
        said.append(judged(glue(s.memory, kind), s, seed))
    alike(said[1], said[0])
    return said[0]


@on_the_interpreter
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 9),
    depth=st.integers(0, 16),
    mode=st.sampled_from([GREEDY, NOISE, FILTERED]),
    seed=st.integers(0, 10**6),
)
def test_any_verdict_is_that_of_torch(rows: int, depth: int, mode: str, seed: int) -> None:
    both(rows, depth, mode, seed)


@on_the_interpreter
@pytest.mark.parametrize("mode", [GREEDY, NOISE])
@pytest.mark.parametrize("depth", [0, 1, 7, 15])
def test_many_rows_at_once(depth: int, mode: str) -> None:
    """The scene has what it is for: acceptance of all kinds, ends by stop and by limit, unsound rows."""
    said = both(64, depth, mode, depth)
    assert {0, 1, depth + 1} <= set(said["kept"].tolist()) <= set(range(depth + 2))
    assert 0 < int(said["ended"].sum()) < 60 and 0 < int((said["finite"] == 0).sum()) < 30
    assert (said["counts"] == 0).sum() > 10 and (said["room"] == 0).any() and (said["room"] > NEVER // 2).any()


@on_the_interpreter
def test_a_round_without_drafts() -> None:
    both(5, 0, NOISE, 3, plain=True)


@on_the_interpreter
def test_drafts_start_after_the_newest_committed_token() -> None:
    parts = torch.randn(24, 5, 16, generator=torch.Generator().manual_seed(2)).split(8, dim=-1)
    outputs = parts[0] + parts[1]

    def newest(batch: Batch, *_: Any) -> Tensor:
        return outputs.gather(1, (batch.counts - 1).clamp(min=0)[:, None, None].expand(-1, 1, 8))

    passes, kept = SimpleNamespace(outputs=lambda *_: parts, catch_up=newest), []
    for glue in (TorchGlue, chain_glue()):
        s = scene(24, 4, 1)
        round_ = glue(s.memory, Kind(5, GREEDY, DraftShape(4), False))
        judged(round_, s, 1)
        round_.catch_up(passes)
        kept.append((round_.output, s.memory.rows.output[:-1]))
    assert all(torch.equal(*pair_) for pair_ in zip(*kept, strict=True))
    assert len(set(kept[0][0].flatten().tolist())) > 100


# ---- whole rounds ----


@functools.cache
def rounds_of(kind: str) -> Rounds:
    """Rounds of an engine that records none of them."""
    target, head = pair(kind) if kind != "own ids" else _own_ids()
    engine = tiny_engine(target, head)
    assert isinstance(engine.passes, EagerPasses)
    return Rounds(
        engine.passes, TapeRecorder(), Sizes(4, 32, 4, CHAIN), engine.cache, engine.rows, engine.lookback, depths=(0, 1)
    )


def _own_ids() -> tuple[Any, Any]:
    target = tiny_target()
    return target, tiny_head(target, "eagle3", draft_vocab_size=20, d2t=True)


def scrambled(rounds: Rounds, shape: GraphShape, seed: int) -> AttentionState:
    state = AttentionState(shape, rounds._padding(shape), lambda _: Plans(), shared=(rounds.cache,))
    scramble(rounds, SimpleNamespace(shape=shape, state=state), torch.Generator().manual_seed(seed))
    return state


def played(rounds: Rounds, shape: GraphShape, fused: bool, seed: int) -> tuple[list[list[Any]], dict[str, Tensor]]:
    """Two rounds over scrambled memory, the second ahead of the host; what the last one says, and all memory."""
    state, rounds.fused = scrambled(rounds, shape, seed), fused
    with torch.inference_mode():
        rounds._body(state)
        columns = rounds._kind_of(shape).layout.unpack(rounds._body(state.fresh()))
        return list(columns), {name: kept.clone() for name, kept in read(rounds).items()}


@on_the_interpreter
@pytest.mark.parametrize("kind", ["eagle", "own ids", "mtp"])
@pytest.mark.parametrize("mode", [GREEDY, NOISE, FILTERED])
def test_whole_rounds_say_and_leave_what_they_do_in_torch(kind: str, mode: str) -> None:
    rounds = rounds_of(kind)
    for queries, rows in ((5, 1), (5, 4), (2, 3), (1, 2)):
        shape = GraphShape(rows, queries, ("chain", mode))
        expected, got = (played(rounds, shape, fused, seed=rows) for fused in (False, True))
        layout = rounds._kind_of(shape).layout
        for column, (_, of), mine, theirs in zip(range(8), layout.columns, got[0], expected[0], strict=False):
            if of is int:
                assert mine == theirs, column
            else:  # committed ones where there are any, and all drafted ones
                kept = expected[0][1] if column == 3 else [layout.nodes] * rows
                assert _first(mine, kept) == pytest.approx(_first(theirs, kept), abs=1e-4)
        for name, kept in expected[1].items():
            torch.testing.assert_close(got[1][name], kept, rtol=0, atol=1e-4)


def on_kernels(rounds: Rounds, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds that a tape holds run anew instead, since a tape knows no kernels."""
    monkeypatch.setattr(rounds, "fused", True)
    for graph in rounds.manager.graphs.values():
        monkeypatch.setattr(graph, "replay", partial(_anew, rounds, graph))


def _anew(rounds: Rounds, graph: Graph) -> Tensor:
    graph._tally.replay()
    return rounds.twin(graph)


@on_the_interpreter
@pytest.mark.parametrize("kind", ["eagle3", "mtp"])
def test_sessions_say_what_they_do_pass_by_pass(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    it = lent(kind, CHAIN, "cpu")
    on_kernels(it.rounds, monkeypatch)
    expected = play(it.plain(), NOISY, CHAIN, 5)
    assert same(play(it.engine, NOISY, CHAIN, 5), expected)
    assert it.rounds.counts.replayed > 10 and it.rounds.counts.share == 1.0
    assert any(result.accepted for results in expected.values() for result in results)


@on_the_interpreter
@pytest.mark.parametrize("why", ["stop", "limit"])
def test_rounds_ahead_know_where_a_sequence_ends(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = ahead.recorded("eagle3", CHAIN).rounds
    assert rounds is not None
    on_kernels(rounds, monkeypatch)
    ahead.test_a_row_that_ended_commits_and_writes_nothing(why, CHAIN)
    ahead.test_every_message_is_that_of_an_engine_that_waits("eagle3", CHAIN, 1)


class Between(TorchDispatchMode):
    """Counts what runs outside of passes: operations by name, and launches."""

    def __init__(self) -> None:
        super().__init__()
        self.passes, self.found = 0, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not self.passes and name not in NO_KERNELS | {"unbind"}:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))

    def a_pass(self, run: Any, name: str = "") -> Any:
        def running(*args: Any, **given: Any) -> Any:
            self.found.update([name] if name else [])
            self.passes += 1
            try:
                return run(*args, **given)
            finally:
                self.passes -= 1

        return running


@on_the_interpreter
@pytest.mark.parametrize("mode", [GREEDY, NOISE])
def test_between_the_passes_there_is_one_kernel_before_two_after_and_one_a_level(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import speculator.round_fused as fused

    rounds, between, shape = rounds_of("own ids"), Between(), GraphShape(3, 5, ("chain", mode))
    for launch in ("launch_begin", "launch_judge", "launch_settle", "launch_note"):
        monkeypatch.setattr(fused, launch, between.a_pass(getattr(fused, launch), launch))
    passes, head = rounds.eager, rounds.eager.head
    for owner, name in ((passes, "outputs"), (head, "advance"), (head, "read"), (head, "read_sum"),
                        (passes.head_attention, "plan")):  # fmt: skip
        monkeypatch.setattr(owner, name, between.a_pass(getattr(owner, name)))
    monkeypatch.setattr(head, "reader", _reader)
    monkeypatch.setattr(passes, "verify", between.a_pass(_read_only(passes.verify, between)))
    state, rounds.fused = scrambled(rounds, shape, 1), True
    with torch.inference_mode(), between:
        rounds._body(state)
    assert between.found == {"launch_begin": 1, "launch_judge": 1, "launch_settle": 1, "launch_note": 4}


LOOKS = NO_KERNELS | {"unbind", "flatten", "unflatten", "empty_like"}  # composite ones reach inference mode whole
PRODUCTS = {"linear", "mm", "addmm"}


@on_the_interpreter
@pytest.mark.parametrize("mode", [GREEDY, NOISE])
def test_of_a_whole_chain_round_torch_does_two_operations_and_products(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The target's embeddings, and its taps side by side; all else is kernels, where layers are fused."""
    from triton.runtime.interpreter import GridExecutor

    from target.attention.triton import TritonAttention

    target, between = tiny_target(), Between()
    engine = tiny_engine(target, tiny_head(target, "eagle3"))
    passes, head = engine.passes, engine.head
    assert isinstance(passes, EagerPasses) and head is not None and fuse(target, head) > 20
    passes.attention = passes.head_attention = TritonAttention(engine.cache, pdl=False)
    target.reader = head.reader = between.a_pass(_reader)
    rounds = Rounds(passes, TapeRecorder(), Sizes(4, 32, 4, CHAIN), engine.cache, engine.rows)
    shape = GraphShape(2, 5, ("chain", mode))
    state, rounds.fused = scrambled(rounds, shape, 1), True
    monkeypatch.setattr(GridExecutor, "__call__", between.a_pass(GridExecutor.__call__, "kernel"))
    with torch.inference_mode(), between:
        rounds._body(state)
    assert between.found.pop("kernel") > 40
    assert {name: count for name, count in between.found.items() if name not in LOOKS | PRODUCTS} == {
        "embedding": 1,
        "cat": 1,
    }


def _reader(x: Tensor, weight: Tensor, product: Any, asked: Any) -> Any:
    return read_logits(product(x, weight), asked, gumbel_of)


def _read_only(verify: Any, between: Between) -> Any:
    """Verification that leaves its logits unwritten."""

    def verified(batch: Any) -> Verified:
        found = verify(batch)
        logits = found.logits.flatten(0, 1)
        read = between.a_pass(partial(read_logits, logits, noise=gumbel_of))
        return Verified(found.features, lambda: pytest.fail("logits were written"), read)

    return verified


def _first(rows: list[list[float]], counts: list[int]) -> list[float]:
    return [value for row, count in zip(rows, counts, strict=True) for value in row[:count]]


@on_the_interpreter
def test_which_rounds_the_kernels_take() -> None:
    rounds = rounds_of("eagle")
    rounds.fused = True
    kinds = {
        Kind(5, GREEDY, DraftShape(4), False): "ChainGlue",
        Kind(1, NOISE, DraftShape(0), True): "ChainGlue",
        Kind(5, FILTERED, DraftShape(4), False): "ChainGlue",
    }
    assert {kind: type(rounds._glue(kind)).__name__ for kind in kinds} == kinds
    two = rounds_of("mtp2")
    two.fused = True
    assert isinstance(two._glue(Kind(5, GREEDY, DraftShape(4), False)), TorchGlue)
