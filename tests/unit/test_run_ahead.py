"""One round ahead: whatever a generation says is the same as with an engine that waits, and nothing is left behind.

Owns: a worker whose turns are taken by hand, and stories of sessions that come, end and go away at any moment.
"""

from __future__ import annotations

import functools
import random
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch

from speculator.answers import Created, Generated, Verified
from speculator.costs import Cost, CostTable
from speculator.drafts import KEEP
from speculator.engine import Engine
from speculator.errors import DeadlineExceededError, NumericalError, SpeculatorError, StepCancelledError
from speculator.policy import DepthPolicy, menu
from speculator.round_state import MOST_STOPS
from speculator.session import Job, Kind, SessionSpec
from speculator.types import (
    Bounds,
    Draft,
    DraftShape,
    FinishReason,
    Rule,
    SamplingParams,
    Step,
    StepResult,
    StoppingParams,
)
from speculator.under_way import UnderWay
from speculator.worker import Worker
from tests.unit.engines import VOCAB, tiny_engine
from tests.unit.test_recorded import PARAMS, PROMPTS, pair
from tests.unit.test_round import CHAIN, TREE, Listening, record

KINDS = [("eagle3", CHAIN), ("eagle3", TREE), ("mtp2", CHAIN)]
LIMITS = dict(max_context=90, scratch_tokens=38)  # of sessions that a page table of the recorded rounds holds


def limited(engine: Engine, shape: DraftShape) -> Engine:
    engine.info = replace(engine.info, default_shape=shape, **LIMITS)
    return engine


@functools.cache
def recorded(kind: str, shape: DraftShape, device: str = "cpu") -> Engine:
    """One engine with recorded rounds for many tests, since recording on a tape takes seconds."""
    engine = limited(tiny_engine(*pair(kind, device)), shape)
    record(engine, shape)
    return engine


def plain(kind: str, shape: DraftShape, device: str = "cpu") -> Engine:
    return limited(tiny_engine(*pair(kind, device)), shape)


class Watched:
    """An engine, and how many of its steps were under way."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self.info = engine, engine.info
        self.open, self.close, self.step, self.passes_run = engine.open, engine.close, engine.step, engine.passes_run
        self.most, self.ahead, self.launches = 0, 0, 0
        self._flights = weakref.WeakSet[_Watched]()

    @property
    def flying(self) -> int:
        """Steps that were launched and neither collected nor dropped."""
        return len(self._flights)

    @property
    def times(self) -> Any:
        return self._engine.times

    def launch(self, steps: Sequence[Step]) -> _Watched | None:
        flight = self._engine.launch(steps)
        if flight is None:
            return None
        self.launches, self.ahead = self.launches + 1, self.ahead + steps[0].ahead
        watched = _Watched(self._flights, flight)
        self._flights.add(watched)
        self.most = max(self.most, self.flying)
        return watched


class _Watched:
    def __init__(self, flights: weakref.WeakSet[_Watched], flight: UnderWay) -> None:
        self._flights, self._flight = flights, flight

    def collect(self) -> list[StepResult]:
        self._flights.discard(self)
        return self._flight.collect()


class Hand:
    """A worker that takes a turn when told to; `heard` are the messages of generations, `errors` how some ended."""

    def __init__(self, engine: Engine, policy: DepthPolicy | None = None, window: int = 8) -> None:
        self.engine = Watched(engine)
        self.now = 0.0
        self.worker = Worker(self.engine, self._deliver, self._failed, clock=lambda: self.now)
        self.scheduler = self.worker.scheduler
        self.scheduler.steer(policy)
        self.heard: dict[str, list[Said]] = {}
        self.errors: dict[str, SpeculatorError] = {}
        self.answers: list[Any] = []
        self._window = window

    def generate(self, name: str, prompt: Sequence[int], count: int | None = None, **more: Any) -> Job:
        stops, ignore = more.pop("stops", frozenset()), more.pop("ignore_eos", False)
        spec = SessionSpec(name, "", tuple(prompt), stopping=StoppingParams(count, stops, ignore), **more)
        job = Job(Kind.GENERATE, name, "", spec=spec)
        self.heard[name] = []
        self.worker.submit(job)
        return job

    def cancel(self, job: Job) -> None:
        self.worker.post(self.scheduler.cancel, job)

    @property
    def busy(self) -> bool:
        return bool(self.worker._flights or self.scheduler.ready or self.worker._inbox._entries)

    def turn(self) -> bool:
        if not self.busy:
            return False
        self.worker._turn()
        self.scheduler.check()
        return True

    def finish(self) -> Hand:
        while self.turn():
            pass
        assert not self.worker._flights and not self.scheduler.under_way
        return self

    @property
    def open(self) -> int:
        """Generations that have not ended."""
        return sum(not m or m[-1].finish is FinishReason.RUNNING for n, m in self.heard.items() if n not in self.errors)

    def at_rest(self) -> bool:
        """Rows and pages are back, and nothing waits."""
        used = self.scheduler.usage()
        return used[:5] == (0, 0, 0, 0, 0) and not self.busy

    def _deliver(self, answers: list[Any]) -> None:
        for job, answer in answers:
            if isinstance(answer, SpeculatorError):
                self.errors[job.session_id] = answer
            elif isinstance(answer, Generated):
                self.heard[job.session_id].append(Said(answer.tokens, answer.accepted, answer.finish, answer.logprobs))
                if len(self.heard[job.session_id]) % self._window == 0:
                    self.worker.post_amid(self.scheduler.credit, job, self._window)
            else:
                self.answers.append(answer)

    def _failed(self, error: BaseException) -> None:
        raise error


class Said(NamedTuple):
    """A message; equal ones have equal tokens, acceptance and end, and logprobs up to rounding."""

    tokens: tuple[int, ...]
    accepted: int
    finish: FinishReason
    logprobs: tuple[float, ...]

    def __eq__(self, other: object) -> bool:
        near = isinstance(other, Said) and self.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        return near and isinstance(other, Said) and self[:3] == other[:3]

    __hash__ = None  # type: ignore[assignment]


def texts(hand: Hand) -> dict[str, list[int]]:
    return {name: [t for said in messages for t in said.tokens] for name, messages in hand.heard.items()}


class Story:
    """Generations that begin at chance moments, each with chance bounds; the same for every engine."""

    def __init__(self, seed: int, count: int = 14) -> None:
        draw = random.Random(seed)
        self.sessions = [self._session(draw, number) for number in range(count)]
        self.begins = sorted(draw.randrange(60) for _ in range(count))

    def _session(self, draw: random.Random, number: int) -> dict[str, Any]:
        sampling = SamplingParams(draw.choice([0, 0.9]), top_k=draw.choice([0, 20]), seed=number)
        return dict(
            prompt=[draw.randrange(VOCAB) for _ in range(draw.randint(2, 30))],
            count=draw.choice([1, 2, 3, 7, 30, 45, None]),
            stops=frozenset(draw.sample(range(VOCAB), draw.choice([0, 1, 3]))),
            sampling=sampling,
            speculate=draw.random() < 0.8,
        )

    def _comes(self, number: int, turn: int) -> bool:
        return number < len(self.sessions) and self.begins[number] <= turn

    def tell(self, hand: Hand, cancels: random.Random | None = None) -> Hand:
        jobs, turn = list[Job](), 0
        while len(jobs) < len(self.sessions) or hand.busy:
            while self._comes(len(jobs), turn) and hand.open < 4:
                jobs.append(hand.generate(f"s{len(jobs)}", **self.sessions[len(jobs)]))
            if cancels and jobs and cancels.random() < 0.2:
                hand.cancel(cancels.choice(jobs[-4:]))
            hand.turn()
            turn += 1
        return hand


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("kind, shape", KINDS)
def test_every_message_is_that_of_an_engine_that_waits(
    kind: str, shape: DraftShape, seed: int, device: str = "cpu"
) -> None:
    """Sessions come and end by stop tokens inside drafts, token limits and the context limit."""
    story = Story(seed)
    expected = story.tell(Hand(plain(kind, shape, device)))
    hand = story.tell(Hand(recorded(kind, shape, device)))
    assert hand.heard == expected.heard and not hand.errors
    assert hand.scheduler.acceptance() == expected.scheduler.acceptance()
    assert {messages[-1].finish for messages in hand.heard.values()} == {FinishReason.STOP, FinishReason.LENGTH}
    assert hand.engine.most == 2 and hand.engine.ahead > 10
    assert hand.at_rest() and expected.engine.launches == 0


@pytest.mark.parametrize("seed", range(4))
def test_cancels_at_any_moment_lose_and_double_nothing(seed: int, device: str = "cpu") -> None:
    story = Story(seed)
    expected = story.tell(Hand(plain("eagle3", CHAIN, device)))
    hand = story.tell(Hand(recorded("eagle3", CHAIN, device)), random.Random(seed))
    assert any(isinstance(error, StepCancelledError) for error in hand.errors.values())
    for name, messages in hand.heard.items():
        whole = expected.heard[name]
        assert messages == (whole[: len(messages)] if name in hand.errors else whole)
    assert hand.engine.ahead > 5 and hand.at_rest()


def test_the_next_round_is_launched_before_the_last_one_is_delivered(device: str = "cpu") -> None:
    hand = Hand(recorded("eagle3", CHAIN, device))
    hand.generate("a", PROMPTS[0], 60, ignore_eos=True)
    while not hand.engine.ahead:
        hand.turn()
    said = len(hand.heard["a"])
    for turn in range(5):
        assert hand.engine.flying == 1 and len(hand.heard["a"]) == said + turn
        hand.turn()
    assert hand.finish().engine.most == 2


def test_nothing_is_known_ahead_of_what_a_client_does(device: str = "cpu") -> None:
    """Verify and Propose wait for their round, also beside a generation."""
    hand = Hand(recorded("eagle3", CHAIN, device))
    worker, scheduler = hand.worker, hand.scheduler
    spec = SessionSpec("c", "", tuple(PROMPTS[0]))
    worker.post(scheduler.submit, Job(Kind.CREATE, "c", "", spec=spec))
    hand.finish()
    created = hand.answers.pop()
    assert isinstance(created, Created)
    length, draft = created.session.length, Draft()
    for turn in range(8):
        if turn == 4:
            assert hand.engine.ahead == 0 and hand.engine.launches > 0
            hand.generate("g", PROMPTS[1], 40, ignore_eos=True)
        job = Job(Kind.VERIFY, "c", "", base=length, shape=KEEP, draft_id=draft.draft_id)
        job.draft = None if draft.tokens else draft
        worker.post(scheduler.submit, job)
        while not hand.answers:
            hand.turn()
        verified = hand.answers.pop()
        assert isinstance(verified, Verified) and verified.next_draft is not None
        length = verified.length
        made = verified.next_draft
        draft = Draft(made.draft.tokens, made.draft.parents, draft_id=made.draft_id)
    hand.finish()
    twin = Hand(plain("eagle3", CHAIN, device))
    twin.generate("g", PROMPTS[1], 40, ignore_eos=True)
    assert hand.heard["g"] == twin.finish().heard["g"]


def test_a_reader_that_lags_stops_the_rounds_and_gets_every_message(device: str = "cpu") -> None:
    expected = Hand(plain("eagle3", CHAIN, device))
    expected.generate("a", PROMPTS[1], 80, speculate=False, ignore_eos=True)
    expected.finish()
    hand = Hand(recorded("eagle3", CHAIN, device), window=1 << 30)
    job = hand.generate("a", PROMPTS[1], 80, speculate=False, ignore_eos=True)
    hand.finish()
    assert 0 < len(hand.heard["a"]) < len(expected.heard["a"]), "the window was not closed"
    hand.worker.post_amid(hand.scheduler.credit, job, 100)
    assert hand.finish().heard == expected.heard and hand.at_rest()


def test_pages_hold_one_path_more_than_is_known(device: str = "cpu") -> None:
    hand = Hand(recorded("eagle3", CHAIN, device))
    launch, margins, info = hand.engine.launch, list[int](), hand.engine.info

    def covered(steps: Sequence[Step]) -> Any:
        [session] = hand.scheduler.sessions.values()
        path = 1 + len(session.offer.draft.tokens) if session.offer else 1
        end = min(session.cached + path, session.limit) + info.scratch_tokens
        margins.append(len(steps[0].pages) * info.page_size - end if steps[0].ahead else 0)
        return launch(steps)

    hand.engine.launch = covered  # type: ignore[method-assign]
    hand.generate("a", PROMPTS[0], 60, ignore_eos=True)
    hand.finish()
    assert len(margins) > 20 and min(margins) >= 0


def test_a_deadline_ends_the_rounds_in_order(device: str = "cpu") -> None:
    expected = Hand(plain("eagle3", CHAIN, device))
    expected.generate("a", PROMPTS[0], 60, ignore_eos=True)
    expected.finish()
    hand = Hand(recorded("eagle3", CHAIN, device))
    hand.generate("a", PROMPTS[0], 60, ignore_eos=True).deadline = 5.0
    while hand.engine.ahead < 3:
        hand.turn()
    under_way = len(hand.heard["a"]) + 1
    hand.now = 6.0
    hand.finish()
    assert isinstance(hand.errors["a"], DeadlineExceededError) and len(hand.heard["a"]) == under_way
    assert hand.heard["a"] == expected.heard["a"][:under_way] and hand.at_rest()


def test_the_end_of_the_worker_leaves_no_round_behind(device: str = "cpu") -> None:
    hand = Hand(recorded("eagle3", CHAIN, device))
    hand.generate("a", PROMPTS[0], 60, ignore_eos=True)
    while hand.engine.ahead < 3:
        hand.turn()
    hand.worker.post(hand.worker._end)
    hand.worker._main()
    assert not hand.worker._flights
    [*said, last] = [answer for _, answer in hand.worker.leftovers()]
    assert isinstance(last, SpeculatorError) and hand.scheduler.usage()[:5] == (0, 0, 0, 0, 0)
    assert all(isinstance(answer, Generated) for answer in said)


# faults


@contextmanager
def spoiled(engine: Engine, when: Any) -> Iterator[list[int]]:
    """Launches for which `when(steps, number)` run a target whose output is NaN; the list has their numbers."""
    assert engine.rounds is not None
    launch, norm, spoilt, number = engine.rounds.launch, engine.model.norm.weight, list[int](), [0]

    def launched(steps: Sequence[Step], *more: Any) -> Any:
        number[0] += 1
        if not when(steps, number[0]):
            return launch(steps, *more)
        spoilt.append(number[0])
        weights = norm.clone()
        norm.data.fill_(float("nan"))
        try:
            return launch(steps, *more)
        finally:
            norm.data.copy_(weights)

    engine.rounds.launch = launched  # type: ignore[method-assign]
    try:
        yield spoilt
    finally:
        engine.rounds.launch = launch  # type: ignore[method-assign]


@pytest.mark.parametrize("kind, shape", KINDS)
def test_a_round_ahead_that_failed_is_run_again(kind: str, shape: DraftShape, device: str = "cpu") -> None:
    """Every fifth round meets NaN, with another one launched on top of it or not; each session alone then succeeds."""
    hands = [Hand(plain(kind, shape, device)), Hand(recorded(kind, shape, device))]
    for hand in hands:
        for row, sampling in enumerate([*PARAMS[:2], SamplingParams(rule=Rule.REJECTION)]):
            hand.generate(f"s{row}", PROMPTS[row], 40, sampling=sampling, ignore_eos=True)
    hands[0].finish()
    with spoiled(recorded(kind, shape, device), lambda steps, number: number % 5 == 0 and len(steps) > 1) as spoilt:
        hand.finish()
    assert len(spoilt) >= 2 and hand.engine.ahead > 3 and not hand.errors and hand.at_rest()
    assert texts(hand) == texts(hands[0])


def test_a_session_alone_whose_round_ahead_failed_ends_with_the_error(device: str = "cpu") -> None:
    engine = recorded("eagle3", CHAIN, device)
    expected = Hand(plain("eagle3", CHAIN, device))
    expected.generate("a", PROMPTS[0], 60, ignore_eos=True)
    expected.finish()
    hand = Hand(engine)
    hand.generate("a", PROMPTS[0], 60, ignore_eos=True)
    with spoiled(engine, lambda steps, number: number == 4 and steps[0].ahead) as spoilt:
        hand.finish()
    assert spoilt == [4] and isinstance(hand.errors["a"], NumericalError)
    assert hand.heard["a"] == expected.heard["a"][:3] and hand.at_rest()


def test_a_launch_that_throws_leaves_the_round_to_the_steps(device: str = "cpu") -> None:
    hand = Hand(recorded("eagle3", CHAIN, device))
    launch, thrown = hand.engine.launch, list[int]()

    def throwing(steps: Sequence[Step]) -> Any:
        if len(thrown) < 3 and hand.engine.launches % 3 == 2:
            thrown.append(steps[0].ahead)
            raise RuntimeError("no more memory")
        return launch(steps)

    hand.engine.launch = throwing  # type: ignore[method-assign]
    hand.generate("a", PROMPTS[0], 60, ignore_eos=True)
    expected = Hand(plain("eagle3", CHAIN, device))
    expected.generate("a", PROMPTS[0], 60, ignore_eos=True)
    assert hand.finish().heard == expected.finish().heard
    assert len(thrown) == 3 and any(thrown) and hand.at_rest()


# the device alone


def started(device: str, shape: DraftShape = CHAIN) -> tuple[Engine, list[Any]]:
    """Two sessions with a draft each, made by a recorded round."""
    engine = recorded("eagle3", shape, device)
    driver = Listening(engine)
    sessions = driver.start(PROMPTS[:2], PARAMS[:2], shape)
    driver.rounds(sessions, 3, [shape] * 2)
    return engine, sessions


def round_of(session: Any, shape: DraftShape | None, bounds: Bounds | None, ahead: bool = False) -> Step:
    if ahead:
        return Step(session.row, 0, session.pages, draft=Draft(), propose=shape, bounds=bounds, ahead=True)
    draft = session.draft or Draft()
    return Step(
        session.row, session.cached, session.pages, root=session.tokens[-1], draft=draft, propose=shape, bounds=bounds
    )


@pytest.mark.parametrize("shape", [CHAIN, TREE])
@pytest.mark.parametrize("why", ["stop", "limit"])
def test_a_row_that_ended_commits_and_writes_nothing(why: str, shape: DraftShape, device: str = "cpu") -> None:
    """Its neighbour goes on, and nothing of what was cached changes but where padding writes."""
    engine, sessions = started(device, shape)
    twin, others = started_twin(device, shape)
    first = twin.step([round_of(s, shape, None) for s in others])
    stops = frozenset({first[0].tokens[-1]}) if why == "stop" else frozenset[int]()
    limit = len(sessions[0].tokens) + len(first[0].tokens) if why == "limit" else 1000
    bounds = [Bounds(limit, stops), Bounds(1000, frozenset())]
    flights = [engine.launch([round_of(s, shape, b) for s, b in zip(sessions, bounds, strict=True)])]
    before = [layer.clone() for layer in engine.cache.layers]
    flights.append(engine.launch([round_of(s, shape, b, True) for s, b in zip(sessions, bounds, strict=True)]))
    assert all(flights)
    results = [flight.collect() for flight in flights if flight]
    assert [r.tokens for r in results[0]] == [r.tokens for r in first]
    assert results[1][0] == StepResult() and results[1][1].tokens and results[1][1].draft
    mine = {page * engine.info.page_size + i for page in sessions[0].pages for i in range(engine.info.page_size)}
    kept = torch.tensor(sorted(mine | {0}), device=engine.device)
    for layer, was in zip(engine.cache.layers, before, strict=True):
        assert torch.equal(layer[kept], was[kept])
    for row in (0, 1):
        engine.close(row)


def started_twin(device: str, shape: DraftShape) -> tuple[Engine, list[Any]]:
    engine = plain("eagle3", shape, device)
    driver = Listening(engine)
    sessions = driver.start(PROMPTS[:2], PARAMS[:2], shape)
    driver.rounds(sessions, 3, [shape] * 2)
    return engine, sessions


def test_bounds_are_forgotten_with_the_session(device: str = "cpu") -> None:
    engine, sessions = started(device)
    ends = Bounds(len(sessions[0].tokens) + 1, frozenset())
    flight = engine.launch([round_of(sessions[0], CHAIN, ends)])
    assert flight is not None and flight.collect()
    engine.open(0, SamplingParams(), True)
    assert engine.rounds is not None and not engine.rounds.state.bounded(0)
    driver = Listening(engine)
    [again] = driver.start(PROMPTS[:1], PARAMS[:1], CHAIN)
    driver.rounds([again], 20, [CHAIN])
    twin = Listening(plain("eagle3", CHAIN, device))
    [expected] = twin.start(PROMPTS[:1], PARAMS[:1], CHAIN)
    twin.rounds([expected], 20, [CHAIN])
    assert again.tokens == expected.tokens and all(result.tokens for result in driver.heard[0])


def test_what_cannot_go_ahead_is_not_begun_nor_counted(device: str = "cpu") -> None:
    engine, sessions = started(device)
    assert engine.rounds is not None
    before = (engine.rounds.counts.replayed, engine.rounds.counts.eager.total())
    too_many = Bounds(1000, frozenset(range(MOST_STOPS + 1)))
    first = round_of(sessions[0], CHAIN, too_many)
    flight = engine.launch([first])
    assert flight is not None and flight.collect()[0].tokens
    assert engine.launch([round_of(sessions[0], CHAIN, too_many, ahead=True)]) is None
    assert engine.launch([round_of(sessions[1], DraftShape(7), None)]) is None
    assert engine.launch([Step(1, sessions[1].cached, sessions[1].pages, propose=CHAIN)]) is None
    assert (engine.rounds.counts.replayed, engine.rounds.counts.eager.total()) == (before[0] + 1, before[1])


def test_a_policy_chooses_for_rounds_ahead_too(device: str = "cpu") -> None:
    shapes = menu(CHAIN, (2,))
    costs = CostTable(tuple(Cost(s, rows, 64, 1.0 + 0.3 * s.depth) for s in shapes for rows in (1, 8)), {})
    engine = recorded("eagle3", CHAIN, device)
    hand, expected = Hand(engine, DepthPolicy(shapes, costs)), Hand(plain("eagle3", CHAIN, device))
    for each in (hand, expected):
        for row in range(3):
            each.generate(f"s{row}", PROMPTS[row], 40, sampling=PARAMS[row], ignore_eos=True)
        each.finish()
    assert texts(hand) == texts(expected) and hand.engine.ahead > 5 and hand.at_rest()
    assert len({shape for shape, given in hand.scheduler.policy.given.items() if given}) > 1  # type: ignore[union-attr]


def test_padding_writes_nothing_where_invisible_tokens_are_read(device: str = "cpu") -> None:
    """Slot 0 of every layer stays zero: drafts of padding rows go where padding goes."""
    for kind, shape in KINDS:
        engine = recorded(kind, shape, device)
        driver = Listening(engine)
        driver.rounds(driver.start(PROMPTS[:1], PARAMS[:1], shape), 12, [shape])
        assert not any(layer[0].any() for layer in engine.cache.layers)
