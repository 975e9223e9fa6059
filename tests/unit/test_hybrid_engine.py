"""Hybrid targets in the engine: what is committed, in tokens and in states, is what plain decoding commits."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
import torch
from hybrid_models import FAMILIES, VOCAB, hybrid_engine, hybrid_head, hybrid_target, token_by_token
from torch import Tensor

from graphs.tape import TapeRecorder
from speculator.bench.theory import listening
from speculator.engine import Engine
from speculator.errors import EngineFailedError, InvalidTreeError, NumericalError
from speculator.passes import EagerPasses
from speculator.recorded import NO_STATES, RecordedPasses, Sizes
from speculator.recurrent import RecurrentRows
from speculator.types import Draft, DraftShape, Feed, Rule, SamplingParams, Step
from target.attention.base import bind
from target.attention.sdpa import SdpaAttention
from target.batch import Batch
from target.decoder import Decoder
from target.errors import PlanError
from target.states import StateCache
from tests.unit.engines import Driver, Sequence_

CHAIN, TREE = DraftShape(4), DraftShape(3, 9, 3)
PROMPTS = [[5, 9, 33, 2], list(range(1, 40)), [7], [60, 1, 60, 1, 60, 1, 3, 17, 22, 41] + [8] * 8]
GREEDY, SAMPLED = SamplingParams(), SamplingParams(temperature=0.9, seed=11)
MIXED = [GREEDY, SAMPLED, SamplingParams(repetition_penalty=1.4), SamplingParams(temperature=1.1, top_k=20, seed=5)]
COUNT = 30


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def target() -> Decoder:
    return hybrid_target()


def cache_of(engine: Engine) -> StateCache:
    assert isinstance(engine.recurrent, RecurrentRows)
    return engine.recurrent.cache


def plain(target: Decoder, params: list[SamplingParams], count: int = COUNT) -> list[list[int]]:
    driver = Driver(hybrid_engine(target, None))
    sessions = driver.start(PROMPTS, params, None)
    driver.rounds(sessions, count, [None] * 4)
    return [s.produced[:count] for s in sessions]


# tokens


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["mtp", "eagle3", "eagle"])
def test_what_is_committed_does_not_depend_on_the_head(family: str, kind: str) -> None:
    target = hybrid_target(family)
    driver = Driver(hybrid_engine(target, hybrid_head(target, kind)), scatter=1)
    sessions = driver.start(PROMPTS, MIXED, CHAIN)
    driver.rounds(sessions, COUNT, [CHAIN, DraftShape(2), None, DraftShape(0)])
    assert [s.produced[:COUNT] for s in sessions] == plain(target, MIXED)


def oracle(truth: list[list[int]], rate: float, rng: random.Random) -> Callable[[Sequence_], Draft]:
    """A drafter that knows the text, drafts up to 5 tokens, and is right with probability `rate` at each."""

    def drafter(s: Sequence_) -> Draft:
        after = truth[s.row][len(s.produced) : len(s.produced) + rng.randint(0, 5)]
        tokens = tuple(t if rng.random() < rate else (t + 1) % VOCAB for t in after)
        return Draft(tokens, tuple(range(-1, len(tokens) - 1)))

    return drafter


@pytest.mark.parametrize("rate", [0.0, 0.6, 1.0], ids=["wrong", "lucky", "right"])
def test_exact_fakes(target: Decoder, rate: float) -> None:
    truth = plain(target, MIXED, COUNT + 8)
    driver = Driver(hybrid_engine(target, hybrid_head(target, "mtp")), scatter=1)
    sessions = driver.start(PROMPTS, MIXED, CHAIN)
    driver.rounds(sessions, COUNT, [None] * 4, oracle(truth, rate, random.Random(2)))
    assert [s.produced[:COUNT] for s in sessions] == [t[:COUNT] for t in truth]
    accepted = {a for s in sessions for a in s.accepted}
    assert accepted == {0} if rate == 0 else len(accepted) > 3


@pytest.mark.parametrize("rule", [Rule.REJECTION, Rule.BLOCK])
def test_greedy_is_greedy_under_every_rule(target: Decoder, rule: Rule) -> None:
    driver = Driver(hybrid_engine(target, hybrid_head(target, "mtp")))
    sessions = driver.start(PROMPTS, [SamplingParams(rule=rule)] * 4, CHAIN)
    driver.rounds(sessions, COUNT, [CHAIN] * 4)
    assert [s.produced[:COUNT] for s in sessions] == plain(target, [GREEDY] * 4)


# states


class ByToken(SdpaAttention):
    """Attention row by row and token by token, over a length that never changes."""

    longest = 128

    def plan(self, batch: Batch) -> Batch:  # type: ignore[override]
        return batch

    def run(self, plan: Batch, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:  # type: ignore[override]
        rows = [self._row(plan, r, layer, q, k, v, window) for r in range(len(q))]
        return torch.cat(rows)

    def _row(self, batch: Batch, r: int, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        outs = []
        for t in range(q.shape[1]):
            one = Batch(
                batch.tokens[r : r + 1, t : t + 1], batch.positions[r : r + 1, t : t + 1],
                batch.context[r : r + 1] + t, (batch.counts[r : r + 1] > t).long(), batch.pages[r : r + 1],
                longest=self.longest,
            )  # fmt: skip
            whole = super().plan(one)
            parts = (x[r : r + 1, t : t + 1].clone() for x in (q, k, v))
            outs.append(super().run(whole, layer, *parts, window))
        return torch.cat(outs, dim=1)


def exact_engine(target: Decoder) -> Engine:
    engine = hybrid_engine(target, None)
    engine.passes.attention = ByToken(engine.cache)  # type: ignore[attr-defined]
    return engine


ROUNDS = {"dense": 2000, "next": 400}
SONG = 60


@pytest.mark.parametrize("family", ROUNDS)
def test_the_committed_state_is_plain_decodings_bit_for_bit(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds of random acceptance through the whole engine, rows in any mix, against each row decoded alone.

    What shares a pass changes how matrix products round, so they run token by token on both sides. Layer 0 attends, so
    that states read what attention made of a cache that held rejected tokens.
    """
    kinds = ["full_attention", "linear_attention", "linear_attention", "full_attention"]
    target = hybrid_target(family, layer_types=kinds, linear_num_value_heads=32)  # whole vectors of a CPU
    token_by_token(monkeypatch, target)
    expected = [decoded_alone(target, row) for row in range(4)]
    rng, rounds, engine = random.Random(7), 0, exact_engine(target)
    truth = [tokens for tokens, _ in expected]
    while rounds < ROUNDS[family]:
        driver = Driver(engine, scatter=1 + rounds)
        sessions = driver.start(PROMPTS, MIXED, None)
        check_states(engine, sessions, expected)
        while live := [s for s in sessions if len(s.produced) < SONG - 6]:
            some = rng.sample(live, rng.randint(1, len(live)))
            driver.rounds(some, min(len(s.produced) for s in some) + 1, [None] * 4, oracle(truth, 0.7, rng))
            check_states(engine, sessions, expected)
            rounds += len(some)
        assert [s.produced[: SONG - 6] for s in sessions] == [t[: SONG - 6] for t in truth]


def decoded_alone(target: Decoder, row: int) -> tuple[list[int], list[tuple[Tensor, Tensor]]]:
    """The tokens of plain decoding, and the committed states of its row after each of them."""
    engine = exact_engine(target)
    driver = Driver(engine)
    prompts, params = [[1]] * 4, list(MIXED)
    prompts[row] = PROMPTS[row]
    sessions, states = driver.start(prompts, params, None), []
    for produced in range(1, SONG):
        states.append(tuple(x[:, row + 1].clone() for x in (cache_of(engine).windows, cache_of(engine).matrices)))
        driver.rounds(sessions[row : row + 1], produced + 1, [None] * 4)
    return sessions[row].produced, states  # type: ignore[return-value]


def check_states(engine: Engine, sessions: list[Sequence_], expected: list[tuple[list[int], list[tuple]]]) -> None:
    for s in sessions:
        windows, matrices = expected[s.row][1][len(s.produced) - 1]
        assert torch.equal(cache_of(engine).windows[:, s.row + 1], windows), s
        assert torch.equal(cache_of(engine).matrices[:, s.row + 1], matrices), s


def started(target: Decoder) -> tuple[Driver, list[Sequence_], Engine]:
    engine = hybrid_engine(target, hybrid_head(target, "mtp"))
    driver = Driver(engine)
    return driver, driver.start(PROMPTS, [GREEDY] * 4, CHAIN), engine


def snapshot(engine: Engine) -> tuple[Tensor, Tensor, list[int]]:
    assert isinstance(engine.recurrent, RecurrentRows)
    return cache_of(engine).windows.clone(), cache_of(engine).matrices.clone(), list(engine.recurrent.lengths)


def unchanged(engine: Engine, before: tuple[Tensor, Tensor, list[int]]) -> bool:
    now = snapshot(engine)
    return torch.equal(now[0], before[0]) and torch.equal(now[1], before[1]) and now[2] == before[2]


@pytest.mark.parametrize("where", ["logits", "draft", "results"])
def test_a_step_that_failed_can_be_run_again(target: Decoder, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the worker does it: everybody's part of a failed step once more, alone."""
    driver, sessions, engine = started(target)
    driver.rounds(sessions, 8, [CHAIN] * 4)
    steps = [driver._step(s, draft=s.draft, root=s.tokens[-1], propose=CHAIN) for s in sessions[:3]]
    fresh = sessions[3]
    engine.open(3, GREEDY, True)
    steps.append(Step(3, 0, fresh.pages, Feed(PROMPTS[1][:10], PROMPTS[1][10])))
    before = snapshot(engine)
    with monkeypatch.context() as broken:
        if where == "logits":
            logits = target.logits
            broken.setattr(target, "logits", lambda final: logits(final) * float("nan"))
        elif where == "draft":
            broken.setattr(engine.passes, "draft", failing)
        else:
            broken.setattr("speculator.engine.collect", failing)
        with pytest.raises((NumericalError, EngineFailedError)):
            engine.step(steps)
    assert unchanged(engine, before)
    for step in steps:
        driver_result = engine.step([step])[0]
        if step.feed is None:
            session = sessions[step.row]
            session.tokens += driver_result.tokens
            session.produced += driver_result.tokens
            session.cached += len(driver_result.tokens)
            session.draft = driver_result.draft
    driver.rounds(sessions[:3], COUNT, [CHAIN] * 4)
    assert [s.produced[:COUNT] for s in sessions[:3]] == plain(target, [GREEDY] * 4)[:3]


def failing(*args: object) -> None:
    raise RuntimeError("the device is gone")


def test_proposing_moves_no_state(target: Decoder) -> None:
    driver, sessions, engine = started(target)
    before = snapshot(engine)
    for _ in range(2):
        engine.step([driver._step(s, propose=DraftShape(3)) for s in sessions])
    assert unchanged(engine, before)


def test_a_step_from_anywhere_else_is_refused(target: Decoder) -> None:
    driver, sessions, engine = started(target)
    s, before = sessions[1], snapshot(engine)
    past = Step(s.row, s.cached - 3, s.pages, root=s.tokens[-4], draft=Draft())
    with pytest.raises(EngineFailedError, match=r"stands after 39 tokens, the step begins after 36; .* cannot go back"):
        engine.step([past])
    assert unchanged(engine, before)


def test_a_commit_that_failed_half_way_is_not_run_again(target: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    driver, sessions, engine = started(target)
    step = driver._step(sessions[0], draft=sessions[0].draft, root=sessions[0].tokens[-1])
    with monkeypatch.context() as broken:
        broken.setattr("target.states.window_after", failing)
        with pytest.raises(EngineFailedError, match="the device is gone"):
            engine.step([step])
    with pytest.raises(EngineFailedError, match="the state of row 0 was lost .* create the session again"):
        engine.step([step])
    driver.rounds(sessions[1:], 6, [CHAIN] * 4)
    engine.open(0, GREEDY, True)
    engine.step([Step(0, 0, sessions[0].pages, Feed([5, 9], 33))])


@pytest.mark.parametrize("part", ["draft", "propose"])
def test_trees_are_refused_with_their_reason(target: Decoder, part: str) -> None:
    driver, sessions, engine = started(target)
    before = snapshot(engine)
    made = {"draft": Draft((1, 2), (-1, -1)), "propose": TREE}[part]
    with pytest.raises(InvalidTreeError, match="takes chains only, every branch of a tree would need a state of its"):
        engine.step([driver._step(sessions[0], root=sessions[0].tokens[-1], **{part: made})])
    assert unchanged(engine, before)
    line = DraftShape(3, 3, 1, (-1, 0, 1))  # a given tree that is a chain
    driver.rounds(sessions, COUNT, [line] * 4)
    assert [s.produced[:COUNT] for s in sessions] == plain(target, [GREEDY] * 4)


def test_a_row_that_changes_hands_forgets(target: Decoder) -> None:
    driver, sessions, engine = started(target)
    driver.rounds(sessions, COUNT, [CHAIN] * 4)
    for row in range(4):
        engine.close(row)
    assert not cache_of(engine).matrices.any() and not cache_of(engine).windows.any()
    again = Driver(engine, scatter=3).start(PROMPTS, [GREEDY] * 4, CHAIN)
    driver.rounds(again, COUNT, [CHAIN] * 4)
    assert [s.produced[:COUNT] for s in again] == plain(target, [GREEDY] * 4)


def test_passes_that_take_no_states_are_refused(target: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    _, sessions, engine = started(target)
    monkeypatch.setattr(engine, "passes", object())
    with pytest.raises(EngineFailedError, match="object takes no recurrent states"):
        engine.step([Step(0, sessions[0].cached, sessions[0].pages, root=sessions[0].tokens[-1], draft=Draft())])


def test_passes_that_hand_on_take_states(target: Decoder) -> None:
    driver, sessions, engine = started(target)
    with listening(engine) as listener:
        driver.rounds(sessions, COUNT, [CHAIN] * 4)
    assert listener.logits is not None
    assert [s.produced[:COUNT] for s in sessions] == plain(target, [GREEDY] * 4)


def test_the_attention_of_a_pass_is_bound_as_it_is_elsewhere(target: Decoder) -> None:
    """The slow twin used above is the backend's own attention."""
    engine = hybrid_engine(target, None)
    exact, usual = ByToken(engine.cache), engine.passes.attention  # type: ignore[attr-defined]
    batch = Batch(*(torch.tensor(x) for x in ([[1, 2, 3]], [[0, 1, 2]], [0], [3], [[1, 2]])), longest=3)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 3, heads, 8, generator=generator) for heads in (4, 2, 2))
    ours, theirs = (bind(a, batch)(0, q, k, v, None) for a in (exact, usual))
    torch.testing.assert_close(ours, theirs)


# recorded passes


def recorded(engine: Engine, states: StateCache | None) -> RecordedPasses:
    """On a tape that spoils everything between replays, the largest number of rows only."""
    passes = engine.passes
    assert isinstance(passes, EagerPasses)
    passes.states = states
    made = RecordedPasses(
        passes, TapeRecorder(poison_between_replays=True), Sizes(4, 60, 4, CHAIN), engine.device, rung=0
    )
    made.capture()
    return made


@pytest.mark.parametrize("family", ["dense", "next"])
def test_replayed_passes_say_and_keep_what_eager_ones_do(family: str) -> None:
    target = hybrid_target(family)
    engines = [hybrid_engine(target, hybrid_head(target, "mtp")) for _ in range(2)]
    passes = engines[0].passes = recorded(engines[0], cache_of(engines[0]))
    drivers = [Driver(engine, scatter=1) for engine in engines]
    sessions = [driver.start(PROMPTS[:3], MIXED[:3], CHAIN) for driver in drivers]
    for count in range(2, 16):
        for driver, some in zip(drivers, sessions, strict=True):
            driver.rounds(some, count, [CHAIN, DraftShape(2), DraftShape(0)])
        assert [s.tokens for s in sessions[0]] == [s.tokens for s in sessions[1]]
        assert [s.accepted for s in sessions[0]] == [s.accepted for s in sessions[1]]
        for ours, theirs in zip(*map(snapshot, engines), strict=True):
            assert ours == theirs if isinstance(ours, list) else torch.allclose(ours, theirs, atol=1e-5)
    assert passes.verifying.counts.replayed > 8 and not passes.verifying.counts.eager
    assert not cache_of(engines[0]).matrices[:, 0].any() and not cache_of(engines[0]).windows[:, 0].any()


def test_what_a_replay_kept_is_the_eager_pass_bit_for_bit(target: Decoder) -> None:
    engine = hybrid_engine(target, hybrid_head(target, "mtp"))
    passes = engine.passes = recorded(engine, cache_of(engine))
    driver = Driver(engine)
    sessions = driver.start(PROMPTS[:3], MIXED[:3], CHAIN)
    for _ in range(5):
        driver.rounds(sessions, min(len(s.produced) for s in sessions) + 1, [CHAIN] * 4)
        before = snapshot(engine)
        steps = [driver._step(s, draft=Draft((1, 2, 3, 4), (-1, 0, 1, 2)), root=s.tokens[-1]) for s in sessions]
        pending = engine.recurrent
        assert isinstance(pending, RecurrentRows)
        with torch.inference_mode():
            engine.rows.cached[torch.arange(3)] = torch.tensor([s.cached for s in sessions])
            engine._verify(steps, range(3))
            found = pending._pending[-1][0].kept
            assert found is not None
            kept = [part.clone() for part in found]
            graph = next(g for shape, g in passes.verifying.graphs.items() if (shape.rows, shape.query_len) == (4, 5))
            _, twin = passes.twin(passes.verifying, graph)
        for ours, again in zip(kept, twin, strict=True):
            assert torch.equal(ours, again[:, :3])
        assert unchanged(engine, before)


def test_a_prompt_warm_up_without_states_captures_nothing_and_says_so_once(
    target: Decoder, caplog: pytest.LogCaptureFixture
) -> None:
    engine = hybrid_engine(target, hybrid_head(target, "mtp"))
    with caplog.at_level("WARNING"):
        passes = recorded(engine, None)
        passes.capture()
    told = [r.message for r in caplog.records if "before its states exist" in r.message]
    assert told == ["passes run eager: a target with recurrent layers cannot be warmed up before its states exist"]
    assert not any(manager.ready or manager.graphs for manager in passes.managers)
    zeros = torch.zeros(1, 1, dtype=torch.int64)
    batch = Batch(zeros, zeros, zeros[0], zeros[0] + 1, zeros, longest=1)
    for run in (passes.feed, passes.verify):
        with pytest.raises(PlanError, match="a hybrid target cannot run without recurrent states"):
            run(batch)
    engine.passes = passes  # with an engine's states the same passes decode, eager and counted
    driver = Driver(engine)
    sessions = driver.start(PROMPTS, [GREEDY] * 4, CHAIN)
    driver.rounds(sessions, COUNT, [CHAIN] * 4)
    assert [s.produced[:COUNT] for s in sessions] == plain(target, [GREEDY] * 4)
    assert set(passes.verifying.counts.eager) == {NO_STATES}
