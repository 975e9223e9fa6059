"""Whole rounds as graphs: whatever an engine says is the same as pass by pass, and the graph did it.

The GPU tests run the same functions with CUDA graphs.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

from graphs.errors import CaptureError, SharedStorageError
from graphs.graph import Counts
from graphs.recorder import CudaRecorder, Recorder
from graphs.tape import TapeRecorder
from speculator.engine import Engine
from speculator.errors import EngineFailedError, NumericalError
from speculator.heads.base import DraftHead
from speculator.passes import EagerPasses
from speculator.recorded import Sizes
from speculator.round import NOTHING, Rounds
from speculator.round_result import Layout
from speculator.tree import below, pack
from speculator.types import Draft, DraftShape, Rule, SamplingParams, Step, StepResult
from target.decoder import Decoder
from tests.unit.engines import VOCAB, Driver, Sequence_, tiny_engine
from tests.unit.test_recorded import PARAMS, PROMPTS, pair

CHAIN, TREE = DraftShape(4), DraftShape(3, 9, 3)
CAPACITY = 128  # tokens of the longest session here, scratch included
GREEDY, NOISE = [SamplingParams()] * 3, [SamplingParams(temperature=0.9, seed=s) for s in range(3)]
KINDS = [("eagle", CHAIN), ("eagle3", CHAIN), ("eagle3", TREE), ("mtp", CHAIN), ("mtp", TREE), ("mtp2", CHAIN)]


def record(engine: Engine, shape: DraftShape, rows: int = 4, rung: int | None = 0, **given: Any) -> Rounds:
    """Give an engine recorded rounds, on a tape that spoils everything between replays; `rung` 0 pads to `rows`."""
    info = engine.info
    assert isinstance(engine.passes, EagerPasses)
    sizes = Sizes(rows, CAPACITY // info.page_size, info.page_size, shape, every_rule=given.pop("every_rule", False))
    recorder: Recorder = CudaRecorder() if engine.device.type == "cuda" else TapeRecorder(poison_between_replays=True)
    kind = given.pop("kind", Rounds)
    engine.rounds = kind(engine.passes, recorder, sizes, engine.cache, engine.rows, engine.lookback, rung=rung, **given)
    engine.rounds.capture()
    return engine.rounds


class Lent(NamedTuple):
    """Models, and an engine over them with recorded rounds; `plain` are new engines without."""

    target: Decoder
    head: DraftHead
    engine: Engine
    rounds: Rounds

    def plain(self) -> Engine:
        return tiny_engine(self.target, self.head)


@functools.cache
def _made(kind: str, shape: DraftShape, device: str, every_rule: bool) -> Lent:
    target, head = pair(kind, device)
    engine = tiny_engine(target, head)
    return Lent(target, head, engine, record(engine, shape, every_rule=every_rule))


def lent(kind: str, shape: DraftShape, device: str, every_rule: bool = False) -> Lent:
    """One engine for many tests, since recording on a tape takes seconds; its counters begin anew."""
    made = _made(kind, shape, device, every_rule)
    made.rounds.manager._tally.counts = Counts()
    return made


class Listening(Driver):
    """Keeps every result of every session."""

    def __init__(self, engine: Engine, scatter: int = 1) -> None:
        super().__init__(engine, scatter)
        self.heard: dict[int, list[StepResult]] = {}

    def enter(self, row: int, prompt: Sequence[int], params: SamplingParams, shape: DraftShape | None) -> Sequence_:
        """One session more."""
        session = Sequence_(row, list(prompt), self._take(len(prompt) + 160))
        self.engine.open(row, params, shape is not None)
        while not session.produced:
            self._run([self._chunk(session, shape)], [session])
        return session

    def leave(self, session: Sequence_) -> None:
        """Its row and its pages are the next one's."""
        self.engine.close(session.row)
        self._free = session.pages[::-1] + self._free

    def _run(self, steps: list[Step], sessions: list[Sequence_]) -> list[StepResult]:
        results = super()._run(steps, sessions)
        for step, result in zip(steps, results, strict=True):
            self.heard.setdefault(step.row, []).append(result)
        return results


def play(
    engine: Engine, params: Sequence[SamplingParams], shape: DraftShape | None, count: int = 9
) -> dict[int, list[StepResult]]:
    """Sessions that start together and end one by one."""
    driver = Listening(engine)
    sessions = driver.start(PROMPTS[: len(params)], params, shape)
    driver.rounds(sessions, count, [shape] * len(sessions))
    driver.rounds(sessions[:1], 2 * count, [shape] * len(sessions))
    driver.rounds(sessions, 3 * count, [shape] * len(sessions))
    return driver.heard


def same(heard: dict[int, list[StepResult]], expected: dict[int, list[StepResult]]) -> bool:
    """Tokens, acceptance and drafts are equal, log-probabilities up to rounding; drafts are numbered anew."""
    assert heard.keys() == expected.keys()
    pairs = [p for row in heard for p in zip(heard[row], expected[row], strict=True)]
    return all(_plain(a) == _plain(b) and _near(a, b) for a, b in pairs)


def _plain(result: StepResult) -> tuple[object, ...]:
    draft = result.draft or Draft()
    return result.tokens, result.accepted, draft.tokens, draft.parents


def _near(a: StepResult, b: StepResult) -> bool:
    drafts = [(r.draft or Draft()).logprobs for r in (a, b)]  # of random heads, which enlarge what rounding left
    return a.logprobs == pytest.approx(b.logprobs, abs=1e-4) and drafts[0] == pytest.approx(drafts[1], abs=1e-2)


@pytest.mark.parametrize("kind, shape", KINDS)
def test_everything_said_is_that_of_eager_passes(kind: str, shape: DraftShape, device: str = "cpu") -> None:
    it, accepted = lent(kind, shape, device), 0
    for params in (GREEDY, NOISE, PARAMS):
        expected = play(it.plain(), params, shape)
        assert same(play(it.engine, params, shape), expected)
        accepted += sum(len(result.accepted) for results in expected.values() for result in results)
    assert accepted > 5
    assert it.rounds.counts.replayed > 45 and it.rounds.counts.share == 1.0, it.rounds.counts.eager


@pytest.mark.parametrize("kind, shape", [("eagle3", CHAIN), ("eagle3", TREE), ("mtp2", CHAIN)])
def test_every_graph_replays_what_running_gives_bit_for_bit(kind: str, shape: DraftShape, device: str = "cpu") -> None:
    """Result and memory, of each captured shape at lengths far from those of capture, with some padding."""
    rounds = lent(kind, shape, device).rounds
    draw = torch.Generator(device).manual_seed(1)
    for graph in rounds.manager.graphs.values():
        scramble(rounds, graph, draw)
        before = {name: kept.clone() for name, kept in rounds.memory().items()}
        with torch.inference_mode():
            replayed = graph.replay().clone()
            after = {name: kept.clone() for name, kept in read(rounds).items()}
            for name, kept in rounds.memory().items():
                kept.copy_(before[name])
        assert torch.equal(rounds.twin(graph), replayed), graph.shape
        differing = [name for name, kept in read(rounds).items() if not torch.equal(kept, after[name])]
        assert not differing, (graph.shape, differing)


def read(rounds: Rounds) -> dict[str, Tensor]:
    """All memory that anybody reads: padding goes to one slot, where the last one to write is as good as any."""
    memory = dict(rounds.memory())
    for name in [name for name in memory if name.startswith("cache ")]:
        memory[name] = memory[name].clone()
        memory[name][:, rounds.cache.pad_slot] = 0
    return memory


@torch.inference_mode()
def scramble(rounds: Rounds, graph: Any, draw: torch.Generator) -> None:
    """Sessions of random lengths in pages of their own, random numbers in the cache; the last row is padding."""
    memory, rows, spare = rounds.memory(), graph.shape.rows, rounds.state.spare
    given = dict(generator=draw, device=draw.device)
    for name, kept in memory.items():
        if kept.is_floating_point():
            kept.copy_(torch.randn(kept.shape, **given))
        elif name in ("tokens", "root", "following"):
            kept.copy_(torch.randint(0, VOCAB, kept.shape, **given))
    memory["cached"].copy_(torch.randint(20, 60, memory["cached"].shape, **given))
    memory["parents"].copy_(torch.arange(-1, memory["parents"].shape[1] - 1, device=draw.device))
    tables = memory["tables"]
    tables.copy_((torch.randperm(tables.numel(), **given) % (rounds.cache.pages - 1) + 1).view(tables.shape))
    tables[spare] = 0
    for name, value in (("temperature", 0.8), ("top_p", 0.9), ("min_p", 0.01), ("top_k", 20), ("penalty", 1.3)):
        if name in memory:
            memory[name].fill_(value)
    if "rule" in memory:
        memory["rule"].copy_(torch.arange(len(memory["rule"]), device=draw.device) % 3)
        memory["seen"].copy_(torch.randint(0, 2, memory["seen"].shape, **given))
    if "q" in memory:
        memory["q"].copy_(memory["q"].softmax(-1))
    if "end" in memory:
        memory["end"].copy_(memory["cached"])
        memory["held"].fill_(1)
    orders = [[row, graph.shape.query_len - 1, -1, -1] for row in range(rows)]
    if rows > 1:
        orders[-1] = [spare, -1, 0, 0]
    graph.state.refresh({"orders": torch.tensor(orders, device=draw.device)})


def picks(rounds: Rounds) -> list[str]:
    """The shapes of the graphs that rounds replay from now on."""
    picked, pick = list[str](), rounds.manager.pick

    def noted(*asked: Any) -> Any:
        graph = pick(*asked)
        picked.append(str(graph.shape) if graph else "none")
        return graph

    rounds.manager.pick = noted  # type: ignore[method-assign]
    return picked


def test_the_smallest_graph_that_holds_the_round_is_replayed(device: str = "cpu") -> None:
    target, head = pair("eagle3", device)
    engine = tiny_engine(target, head)
    rounds = record(engine, CHAIN, rows=3, rung=None)
    picked = picks(rounds)
    assert same(play(engine, PARAMS, CHAIN), play(tiny_engine(target, head), PARAMS, CHAIN))
    assert {"3x5/chain/filtered coupled", "1x5/chain/greedy"} <= set(picked)
    assert not {name for name in picked if name[0] == "4" or "x1/" in name}


def test_depths_change_from_round_to_round(device: str = "cpu") -> None:
    """Shorter chains come out of the recorded one or of their own; no draft at all keeps the head warm."""
    target, head = pair("eagle3", device)
    heard = []
    for recorded in (False, True):
        engine = tiny_engine(target, head)
        rounds = record(engine, CHAIN, depths=(0, 2)) if recorded else None
        driver = Listening(engine)
        sessions = driver.start(PROMPTS, PARAMS, CHAIN)
        draw = random.Random(1)
        for goal in range(4, 80, 2):
            shapes = [draw.choice([CHAIN, DraftShape(1), DraftShape(2), DraftShape(0), None]) for _ in sessions]
            driver.rounds(sessions, goal, shapes)
        heard.append(driver.heard)
        if rounds:
            assert rounds.counts.share == 1.0, rounds.counts.eager
    assert same(heard[1], heard[0])


def test_a_round_without_drafts_costs_a_tree_nothing(device: str = "cpu") -> None:
    """Where a policy rests, the target runs one token a row and the head catches up; then trees grow as before."""
    target, head = pair("eagle3", device)
    heard, picked = [], list[str]()
    for recorded in (False, True):
        engine = tiny_engine(target, head)
        if recorded:
            picked = picks(record(engine, TREE))
        driver = Listening(engine)
        sessions = driver.start(PROMPTS, PARAMS, TREE)
        for goal in range(3, 50, 3):
            driver.rounds(sessions, goal, [TREE if goal % 2 else NOTHING] * len(sessions))
        heard.append(driver.heard)
    assert same(heard[1], heard[0])
    assert {name.split("/")[0] + name.split("/")[1] for name in picked} == {"4x10tree", "4x1chain"}


@pytest.mark.parametrize("alone", [True, False])
def test_sessions_without_drafts_decode_in_rounds_too(alone: bool, device: str = "cpu") -> None:
    it = lent("eagle3", CHAIN, device)
    engine, rounds = it.engine, it.rounds
    if alone:
        engine = tiny_engine(it.target, None)
        rounds = record(engine, CHAIN)
    assert same(play(engine, PARAMS, None), play(tiny_engine(it.target, None), PARAMS, None))
    assert rounds.counts.share == 1.0 and rounds.counts.replayed > 20


def test_sessions_with_and_without_drafts_share_a_round(device: str = "cpu") -> None:
    it, heard = lent("eagle3", CHAIN, device), []
    for engine in (it.plain(), it.engine):
        driver = Listening(engine)
        shapes = [CHAIN, None, CHAIN]
        sessions = [driver.enter(row, PROMPTS[row], PARAMS[row], shape) for row, shape in enumerate(shapes)]
        driver.rounds(sessions, 40, shapes)
        heard.append(driver.heard)
    assert same(heard[1], heard[0])
    assert it.rounds.counts.share == 1.0 and it.rounds.counts.replayed > 20


def visitors(
    engine: Engine, shape: DraftShape, events: int, rows: int = 4, seed: int = 3, rules: Sequence[Rule] = ()
) -> dict[int, list[StepResult]]:
    """Sessions that come and go at random, in rows and pages that others had; `rules` come with penalties."""
    driver, draw, here = Listening(engine), random.Random(seed), dict[int, Sequence_]()
    for number in range(events):
        row = draw.randrange(rows)
        if row in here and draw.random() < 0.4:
            driver.leave(here.pop(row))
        elif row not in here:
            prompt = [draw.randrange(VOCAB) for _ in range(draw.randint(2, 40))]
            params = SamplingParams(draw.choice([0, 0.9]), top_k=draw.choice([0, 20]), seed=number)
            if rules:
                penalty = draw.choice([1.0, 1.3])
                params = replace(params, rule=draw.choice(rules), repetition_penalty=penalty)
            here[row] = driver.enter(row, prompt, params, shape)
        for _ in range(draw.randint(1, 5)):
            going = [s for s in here.values() if draw.random() < 0.9 and len(s.produced) < 50]
            if going:
                most = max(len(s.produced) for s in going)
                driver.rounds(
                    [s for s in going if len(s.produced) <= most],
                    min(len(s.produced) for s in going) + 1,
                    [shape] * rows,
                )
    return driver.heard


@pytest.mark.parametrize("kind, shape", [("eagle3", CHAIN), ("eagle3", TREE), ("mtp2", CHAIN)])
def test_hundreds_of_rounds_with_sessions_coming_and_going(kind: str, shape: DraftShape, device: str = "cpu") -> None:
    it = lent(kind, shape, device)
    assert same(visitors(it.engine, shape, 60), visitors(it.plain(), shape, 60))
    assert it.rounds.counts.replayed > 80 and it.rounds.counts.share == 1.0


# what is no recorded round runs pass by pass, is counted with its reason, and the next round is one again


def test_what_is_not_recorded_runs_pass_by_pass_and_says_why(device: str = "cpu") -> None:
    target, head = pair("eagle3", device)
    penalty, drawn = SamplingParams(repetition_penalty=1.2), SamplingParams(0.9, seed=1, rule=Rule.REJECTION)
    cases = [
        ([penalty], CHAIN, "a repetition penalty"),
        ([drawn], CHAIN, "rule rejection"),
        ([SamplingParams()], DraftShape(6), "another draft shape"),
        ([SamplingParams()], TREE, "another draft shape"),
        ([SamplingParams()] * 3, CHAIN, "no shape holds 3 rows of 5"),
    ]
    engine = tiny_engine(target, head)
    rounds = record(engine, CHAIN, rows=2)
    for params, shape, reason in cases:
        before = rounds.counts.eager[reason]
        assert same(play(engine, params, shape, 10), play(tiny_engine(target, head), params, shape, 10)), reason
        assert rounds.counts.eager[reason] > before, rounds.counts.eager


def test_greedy_rounds_are_recorded_whatever_the_rule(device: str = "cpu") -> None:
    it = lent("eagle3", CHAIN, device)
    params = [SamplingParams(rule=Rule.REJECTION), SamplingParams(rule=Rule.BLOCK)]
    assert same(play(it.engine, params, CHAIN), play(it.plain(), params, CHAIN))
    assert it.rounds.counts.replayed > 20 and it.rounds.counts.share == 1.0


def test_drafts_of_clients_and_of_the_engine_take_turns(device: str = "cpu") -> None:
    it, heard = lent("eagle3", CHAIN, device), []
    for engine in (it.plain(), it.engine):
        driver = Listening(engine)
        sessions = driver.start(PROMPTS, PARAMS, CHAIN)
        for goal in range(6, 60, 6):
            driver.rounds(sessions, goal, [CHAIN] * 3)
            driver.rounds(sessions, goal + 3, [CHAIN] * 3, drafter=lambda s: Draft((5, 9), (-1, -1)))
        heard.append(driver.heard)
    assert same(heard[1], heard[0])
    assert it.rounds.counts.replayed > 10
    assert set(it.rounds.counts.eager) == {"a draft that the device does not hold"}


def test_verify_and_propose_as_calls_of_their_own(device: str = "cpu") -> None:
    """A round that drafts nothing leaves what the draft of a later call starts from, and that draft is held."""
    it, heard = lent("eagle3", CHAIN, device), []
    for engine in (it.plain(), it.engine):
        driver = Listening(engine)
        [session] = driver.start(PROMPTS[:1], PARAMS[1:2], CHAIN)
        for goal in range(3, 15, 2):
            driver.rounds([session], goal, [None])
            [proposed] = engine.step([Step(0, session.cached, session.pages, root=session.tokens[-1], propose=CHAIN)])
            session.draft = proposed.draft
            driver.heard[0].append(proposed)
        heard.append(driver.heard)
    assert same(heard[1], heard[0])
    assert it.rounds.counts.share == 1.0 and it.rounds.counts.replayed > 5


def test_a_round_that_failed_can_be_run_again(device: str = "cpu") -> None:
    """As the worker does it: the step that met NaN once more, each session alone."""
    it = lent("eagle3", TREE, device)
    expected = play(it.plain(), PARAMS, TREE, 10)
    step, norm, failures = it.engine.step, it.target.norm.weight, list[int]()

    def failing(steps: Sequence[Step]) -> list[StepResult]:
        if not all(s.draft and s.draft.tokens for s in steps) or len(failures) >= 5 or len(steps) < 2:
            return step(steps)
        weights = norm.clone()
        norm.data.fill_(float("nan"))
        with pytest.raises(NumericalError):
            step(steps)
        norm.data.copy_(weights)
        failures.append(len(steps))
        return [step([s])[0] for s in steps]

    with mock.patch.object(it.engine, "step", failing):
        assert same(play(it.engine, PARAMS, TREE, 10), expected)
    assert len(failures) == 5 and it.rounds.counts.eager["a draft that the device does not hold"] > 5


# the five rules, and what is seen when one is broken


class OnePlan:
    """An attention backend that takes its first plan of a shape for every further pass of that shape."""

    def __init__(self, inner: Any) -> None:
        kept = dict[object, Any]()

        def plan(batch: Any) -> Any:
            key = (tuple(batch.tokens.shape), batch.ancestors is None)
            if key not in kept:
                kept[key] = inner.plan(batch)
            return kept[key]

        self.run, self.plan = inner.run, plan


def test_r1_broken_a_plan_that_an_earlier_pass_made_is_refused(device: str = "cpu") -> None:
    target, head = pair("mtp", device)
    engine = tiny_engine(target, head)
    assert isinstance(engine.passes, EagerPasses)
    engine.passes.attention = OnePlan(engine.passes.attention)
    with pytest.raises(SharedStorageError, match="share what only one of them may use"):
        record(engine, CHAIN)
    assert engine.rounds and not engine.rounds.manager.ready


class FrozenLengths(Rounds):
    """Lengths taken from memory that does not belong to the pass: those of whoever wrote last."""

    def _glue(self, kind: Any) -> Any:
        glue = super()._glue(kind)
        begin = glue.begin

        def begun(orders: Tensor) -> Any:
            return begin(orders)._replace(context=self.rows.cached[: len(orders)])

        glue.begin = begun  # type: ignore[method-assign]
        return glue


def test_r2_broken_a_plan_over_memory_of_others_is_refused(device: str = "cpu") -> None:
    target, head = pair("eagle3", device)
    with pytest.raises(SharedStorageError, match="batch"):
        record(tiny_engine(target, head), CHAIN, kind=FrozenLengths)


class WrongMode(Rounds):
    """R4: a decision of the host that differs between capture and replay."""

    def _graph(self, *given: Any) -> Any:
        self.state.mode = lambda rows: 0  # type: ignore[method-assign]
        return super()._graph(*given)


class StaleSteps(Rounds):
    """R5: draft steps on the plan of the first."""

    def _passes(self, state: Any) -> EagerPasses:
        passes = super()._passes(state)
        passes.head_attention = OnePlan(passes.head_attention)
        return passes


@pytest.mark.parametrize("kind", [WrongMode, StaleSteps])
def test_r4_r5_broken_shows_in_what_is_said(kind: type[Rounds], device: str = "cpu") -> None:
    target, head = pair("eagle3", device)
    expected = play(tiny_engine(target, head), PARAMS, CHAIN, 10)
    engine = tiny_engine(target, head)
    record(engine, CHAIN, kind=kind)
    driver = Listening(engine)
    sessions = driver.start(PROMPTS, PARAMS, CHAIN)
    driver.rounds(sessions, 6, [CHAIN] * 3)
    begun = {row: expected[row][: len(results)] for row, results in driver.heard.items()}
    assert not same(driver.heard, begun)


@pytest.mark.parametrize("moved", ["rows.cached", "rows.output", "state.memory"])
def test_r3_memory_that_moved_is_refused(moved: str, device: str = "cpu") -> None:
    target, head = pair("eagle3", device)
    engine = tiny_engine(target, head)
    rounds = record(engine, CHAIN)
    driver = Listening(engine)
    sessions = driver.start(PROMPTS[:1], PARAMS[:1], CHAIN)
    driver.rounds(sessions, 2, [CHAIN])
    graph = next(iter(rounds.manager.graphs.values()))
    for graph in rounds.manager.graphs.values():
        held = dict(graph.inputs)
        name = {"rows.cached": "cached", "rows.output": "output", "state.memory": "tokens"}[moved]
        graph.inputs = held | {name: held[name].clone()}
    with pytest.raises(EngineFailedError, match="moved after capture"):
        driver.rounds(sessions, 20, [CHAIN])
    assert rounds.counts.eager["addresses differ"] == 1


def test_a_body_that_reads_on_the_host_is_refused(device: str = "cpu", monkeypatch: Any = None) -> None:
    target, head = pair("eagle3", device)
    engine = tiny_engine(target, head)
    fuse = head.fuse
    head.fuse = lambda features: fuse(features) * float(features.abs().max() > 0)  # type: ignore[method-assign]
    with pytest.raises(CaptureError):
        record(engine, CHAIN)
    driver = Listening(engine)
    driver.rounds(driver.start(PROMPTS[:1], PARAMS[:1], CHAIN), 5, [CHAIN])  # and the engine goes on
    assert engine.rounds and engine.rounds.counts.replayed == 0
    assert next(iter(engine.rounds.counts.eager)).startswith("capture failed")


def test_no_capture_while_serving(device: str = "cpu") -> None:
    target, head = pair("eagle3", device)
    rounds = record(tiny_engine(target, head), CHAIN, rows=1)
    with pytest.raises(CaptureError, match="while serving"):
        rounds.capture()


# parts


def test_trees_on_the_device_are_laid_out_as_on_the_host() -> None:
    draw = random.Random(2)
    drafts = []
    for nodes in (9, 9, 4, 0):
        parents = tuple(draw.randrange(-1, i) for i in range(nodes))
        drafts.append(Draft(tuple(draw.randrange(VOCAB) for _ in range(nodes)), parents))
    roots = [1, 2, 3, 4]
    expected = pack(drafts, roots, "cpu")
    padded = torch.tensor([[*d.tokens, *[7] * (9 - len(d.tokens))] for d in drafts])
    parents = torch.tensor([[*d.parents, *[3] * (9 - len(d.parents))] for d in drafts])
    counts = torch.tensor([1 + len(d.tokens) for d in drafts])
    made = below(torch.tensor(roots), padded, parents, counts, expected.max_depth)
    valid = expected.valid()
    assert torch.equal(made.tokens[valid], expected.tokens[valid])
    for name in ("parents", "depths", "ancestors", "counts"):
        assert torch.equal(getattr(made, name), getattr(expected, name)), name


def test_results_come_back_as_they_were_packed() -> None:
    layout = Layout(path=3, nodes=2)
    parts = (
        torch.tensor([[5, 6, -1], [7, -1, -1]]),
        torch.tensor([2, 1]),
        torch.tensor([[0, 2, 0], [0, 0, 0]]),
        torch.tensor([[-0.1, -1e-30, 3e30], [-0.5, 0.0, float("inf")]]),
        torch.tensor([True, False]),
        torch.tensor([[1, 2], [3, 4]]),
        torch.tensor([[-1, 0], [-1, -1]]),
        torch.tensor([[-2.5, -3.5], [-4.5, -5.5]]),
    )
    for part, values in zip(parts, layout.unpack(layout.pack(parts)), strict=True):
        assert torch.tensor(values, dtype=part.dtype).equal(part)
