"""The scheduler against an engine that asserts the step contract, and against a plain reference."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from speculator.answers import Answer, Created, Extended, Generated, Proposed, Verified
from speculator.drafts import KEEP, ShapeRequest
from speculator.errors import (
    DeadlineExceededError,
    DraftNotFoundError,
    EngineFailedError,
    InvalidArgumentError,
    InvalidTreeError,
    NumericalError,
    PositionMismatchError,
    ServerFullError,
    SessionBusyError,
    SessionExistsError,
    SessionFinishedError,
    SessionForbiddenError,
    SessionNotFoundError,
    SpeculationDisabledError,
    SpeculatorError,
    StepCancelledError,
)
from speculator.scheduler import WINDOW, Scheduler
from speculator.session import Job, Kind, SessionSpec
from speculator.types import Draft, DraftShape, EngineInfo, FinishReason, Rule, SamplingParams, StoppingParams
from tests.fakes import EOS, INFO, FakeEngine, info, next_token, plain

Outcome = Answer | SpeculatorError
SAMPLED = SamplingParams(temperature=1.0, seed=3)


def prompt(length: int, salt: int = 0) -> tuple[int, ...]:
    return tuple(1 + (7 * i + 13 * salt + i * i) % (INFO.vocab_size - 1) for i in range(length))


class Bench:
    """A scheduler and its engine, driven by hand on a clock that stands still."""

    def __init__(self, about: EngineInfo = INFO, **engine: Sequence[float]) -> None:
        self.now = 100.0
        self.engine = FakeEngine(about, **engine)
        self.scheduler = Scheduler(about, self.engine, idle_timeout=60.0, clock=lambda: self.now)
        self.answers: dict[Job, list[Outcome]] = {}

    def submit(self, job: Job) -> Job:
        self.answers[job] = []
        self.scheduler.submit(job)
        self._collect()
        return job

    def step(self) -> int:
        """One engine step, each part alone again if it fails; how many sessions it had."""
        steps = self.scheduler.next_steps()
        if steps:
            self.scheduler.complete(self._run(steps), self.engine.times)
            self.scheduler.settle()
        self._collect()
        self.scheduler.check()
        return len(steps)

    def _run(self, steps):
        try:
            return self.engine.step(steps)
        except SpeculatorError as error:
            return [error] if len(steps) == 1 else [self._run([step])[0] for step in steps]

    def _collect(self) -> None:
        for job, answer in self.scheduler.take_answers():
            self.answers[job].append(answer)

    def run(self, job: Job) -> Answer:
        """Submits and steps until the last answer; raises what the job raises."""
        self.submit(job)
        while not self.done(job):
            assert self.step(), "nothing to do, yet the job has no answer"
        answer = self.answers[job][-1]
        if isinstance(answer, SpeculatorError):
            raise answer
        return answer

    def done(self, job: Job) -> bool:
        answers = self.answers[job]
        return bool(answers) and not (isinstance(answers[-1], Generated) and answers[-1].finish is FinishReason.RUNNING)

    def error(self, job: Job) -> SpeculatorError:
        answer = self.answers[job][-1]
        assert isinstance(answer, SpeculatorError)
        return answer

    # ---- requests ----

    def create_job(self, name: str, tokens: tuple[int, ...] = prompt(5), owner: str = "", **spec) -> Job:
        made = SessionSpec(name, owner, tokens, **spec)
        return Job(Kind.CREATE, name, owner, spec=made)

    def create(self, name: str, tokens: tuple[int, ...] = prompt(5), **spec) -> Created:
        answer = self.run(self.create_job(name, tokens, **spec))
        assert isinstance(answer, Created)
        return answer

    def propose(self, name: str, base: int, shape: ShapeRequest = KEEP) -> Proposed:
        answer = self.run(Job(Kind.PROPOSE, name, "", base=base, shape=shape))
        assert isinstance(answer, Proposed)
        return answer

    def verify(self, name: str, base: int, draft: Draft | int, shape: ShapeRequest | None = None) -> Verified:
        answer = self.run(verify_job(name, base, draft, shape))
        assert isinstance(answer, Verified)
        return answer

    def extend(self, name: str, base: int, tokens: tuple[int, ...], shape: ShapeRequest | None = None) -> Extended:
        answer = self.run(Job(Kind.EXTEND, name, "", base=base, tokens=tokens, shape=shape))
        assert isinstance(answer, Extended)
        return answer

    def generate_job(self, name: str, tokens: tuple[int, ...] = prompt(5), **spec) -> Job:
        return Job(Kind.GENERATE, name, "", spec=SessionSpec(name, "", tokens, **spec))

    def text(self, name: str) -> list[int]:
        return list(self.scheduler.look(name, "", with_tokens=True).tokens or ())


def verify_job(name: str, base: int, draft: Draft | int, shape: ShapeRequest | None = None) -> Job:
    job = Job(Kind.VERIFY, name, "", base=base, shape=shape)
    if isinstance(draft, int):
        job.draft_id = draft
    else:
        job.draft = draft
    return job


def chain(*tokens: int) -> Draft:
    return Draft(tokens, tuple(range(-1, len(tokens) - 1)))


@pytest.fixture
def bench() -> Bench:
    return Bench()


# ---- the loop of a client ----


@pytest.mark.parametrize("sampling", [SamplingParams(), SAMPLED])
@pytest.mark.parametrize(
    "shape", [KEEP, ShapeRequest(depth=0), ShapeRequest(branching=3, depth=3), ShapeRequest(parents=(-1, -1, 0, 1, 2))]
)
def test_rounds_commit_what_plain_decoding_would(bench: Bench, sampling: SamplingParams, shape: ShapeRequest) -> None:
    created = bench.create("a", sampling=sampling)
    length, draft = 6, bench.propose("a", 6, shape)
    out = [created.next_token]
    while len(out) < 40:
        answer = bench.verify("a", length, draft.draft_id, shape)
        out += answer.tokens
        length = answer.length
        assert answer.next_draft is not None and answer.next_draft.base == length == 5 + len(out)
        draft = answer.next_draft
    assert out == plain(prompt(5), len(out), sampling)
    assert bench.text("a") == [*prompt(5), *out]


def test_long_prompts_come_in_chunks(bench: Bench) -> None:
    created = bench.create("a", prompt(40))
    fed = [step.feed for steps in bench.engine.steps for step in steps]
    assert [len(feed.tokens) for feed in fed] == [16, 16, 8]
    assert [feed.following for feed in fed] == [prompt(40)[16], prompt(40)[32], None]
    assert [created.next_token] == plain(prompt(40), 1)


def test_resuming_from_the_tokens_gives_the_same_future(bench: Bench) -> None:
    bench.create("a", sampling=SAMPLED)
    length = 6
    for _ in range(4):
        length = bench.verify("a", length, bench.propose("a", length).draft_id).length
    text = tuple(bench.text("a"))
    again = bench.create("b", text, sampling=SAMPLED)
    assert [again.next_token] == plain(text, 1, SAMPLED)


def test_prefill_only_commits_nothing(bench: Bench) -> None:
    created = bench.create("a", prompt(40), prefill_only=True)
    assert created.next_token is None and created.session.length == 40
    draft = bench.propose("a", 40)
    answer = bench.verify("a", 40, draft.draft_id)
    assert list(answer.tokens) == plain(prompt(40), len(answer.tokens))


def test_an_empty_draft_decodes_one_token(bench: Bench) -> None:
    bench.create("a")
    answer = bench.verify("a", 6, Draft())
    assert list(answer.tokens) == plain(prompt(5), 2)[1:]
    assert bench.scheduler.look("a", "").stats.rounds == [1]


def test_client_trees_are_verified(bench: Bench) -> None:
    bench.create("a")
    right = plain(prompt(5), 4)
    tree = Draft((right[1] % 100 + 1, right[1], right[2], 50), (-1, -1, 1, 0))
    answer = bench.verify("a", 6, tree)
    assert answer.accepted == (1, 2) and list(answer.tokens) == right[1:4]


def test_a_bad_client_tree_commits_nothing(bench: Bench) -> None:
    bench.create("a")
    with pytest.raises(InvalidTreeError):
        bench.verify("a", 6, Draft((5,), (3,)))
    assert bench.verify("a", 6, Draft()).length == 7


def test_propose_twice_is_one_draft(bench: Bench) -> None:
    bench.create("a")
    first, steps = bench.propose("a", 6), len(bench.engine.steps)
    again = bench.propose("a", 6)
    assert again.draft_id == first.draft_id and again.draft == first.draft
    assert len(bench.engine.steps) == steps
    other = bench.propose("a", 6, ShapeRequest(depth=2))
    assert other.draft_id != first.draft_id and len(other.draft.tokens) == 2


# ---- base_length: lock and idempotency key ----


def test_verify_again_answers_what_is_stored(bench: Bench) -> None:
    bench.create("a")
    first = bench.verify("a", 6, bench.propose("a", 6).draft_id, KEEP)
    again = bench.verify("a", 6, 99, KEEP)
    assert again == first._replace(replayed=True, timing=again.timing)
    assert len(bench.text("a")) == first.length


def test_extend_again_answers_what_is_stored(bench: Bench) -> None:
    bench.create("a")
    first = bench.extend("a", 6, (9, 8), KEEP)
    assert bench.extend("a", 6, (9, 8), KEEP).replayed
    assert bench.text("a")[6:] == [9, 8] and first.length == 8


def test_only_the_last_base_is_replayed(bench: Bench) -> None:
    bench.create("a")
    length = bench.verify("a", 6, Draft()).length
    bench.verify("a", length, Draft())
    with pytest.raises(PositionMismatchError) as caught:
        bench.verify("a", 6, Draft())
    assert caught.value.metadata["committed_length"] == str(len(bench.text("a")))


def test_an_extend_does_not_replay_a_verify(bench: Bench) -> None:
    bench.create("a")
    bench.verify("a", 6, Draft())
    with pytest.raises(PositionMismatchError):
        bench.extend("a", 6, (5,))


@pytest.mark.parametrize("kind", [Kind.PROPOSE, Kind.VERIFY, Kind.EXTEND])
def test_a_stale_base_is_aborted(bench: Bench, kind: Kind) -> None:
    bench.create("a")
    job = bench.submit(Job(kind, "a", "", base=4, draft=Draft(), tokens=(5,), shape=KEEP))
    assert isinstance(bench.error(job), PositionMismatchError)


def test_a_draft_is_gone_after_a_commit(bench: Bench) -> None:
    bench.create("a")
    draft = bench.propose("a", 6)
    length = bench.verify("a", 6, Draft()).length
    with pytest.raises(DraftNotFoundError):
        bench.verify("a", length, draft.draft_id)


def test_one_step_of_a_session_at_a_time(bench: Bench) -> None:
    bench.create("a")
    first = bench.submit(verify_job("a", 6, Draft()))
    second = bench.submit(verify_job("a", 6, Draft()))
    assert isinstance(bench.error(second), SessionBusyError)
    bench.step()
    assert isinstance(bench.answers[first][0], Verified)


# ---- create ----


def test_create_again_is_replayed(bench: Bench) -> None:
    first = bench.create("a")
    bench.verify("a", 6, Draft())
    again = bench.create("a")
    assert again.replayed and again.next_token == first.next_token
    assert again.session.length == 7, "the session is shown as it is now"


@pytest.mark.parametrize("other", [{"tokens": prompt(6)}, {"sampling": SAMPLED}, {"shape": ShapeRequest(depth=1)}])
def test_create_with_another_body_is_refused(bench: Bench, other: dict[str, object]) -> None:
    bench.create("a")
    with pytest.raises(SessionExistsError):
        bench.create("a", **other)


def test_create_while_creating_is_busy(bench: Bench) -> None:
    bench.submit(bench.create_job("a"))
    second = bench.submit(bench.create_job("a"))
    assert isinstance(bench.error(second), SessionBusyError)


def test_sessions_answer_their_owner_only(bench: Bench) -> None:
    bench.create("a", owner="me")
    for job in (
        Job(Kind.PROPOSE, "a", "you", base=6, shape=KEEP),
        Job(Kind.VERIFY, "a", "you", base=6, draft=Draft()),
        bench.create_job("a", owner="you"),
    ):
        assert isinstance(bench.error(bench.submit(job)), SessionForbiddenError)
    with pytest.raises(SessionForbiddenError):
        bench.scheduler.delete("a", "you")
    with pytest.raises(SessionForbiddenError):
        bench.scheduler.look("a", "you")
    assert bench.scheduler.page("you", "", 10) == []
    assert [view.session_id for view in bench.scheduler.page("me", "", 10)] == ["a"]


def test_no_row_left(bench: Bench) -> None:
    for i in range(INFO.max_rows):
        bench.create(f"s{i}")
    with pytest.raises(ServerFullError) as caught:
        bench.create("one-more")
    assert caught.value.metadata == {"limit": "sessions"} and caught.value.retry_after > 0
    bench.scheduler.delete("s3", "")
    bench.create("one-more")


def test_no_promise_without_pages() -> None:
    bench = Bench(info(total_pages=85))
    bench.create("a", prompt(5))  # all of the context: 256 + 70 tokens of 84 * 4
    with pytest.raises(ServerFullError) as caught:
        bench.create("b", prompt(5))
    assert caught.value.metadata == {"limit": "kv_pages"}
    bench.scheduler.delete("a", "")
    bench.create("b", prompt(5), stopping=StoppingParams(10))
    bench.create("c", prompt(5), stopping=StoppingParams(10))


def test_a_small_cache_bounds_the_context() -> None:
    bench = Bench(info(total_pages=41))  # 160 tokens, 70 of them scratch
    assert bench.scheduler.context == 90
    job = bench.generate_job("a", prompt(5))
    while not bench.done(job) if job in bench.answers else bench.submit(job):
        bench.step()
    tokens = [t for answer in bench.answers[job] for t in answer.tokens]
    assert tokens == plain(prompt(5), 85)


def test_pages_are_handed_out_lowest_first(bench: Bench) -> None:
    bench.create("a", prompt(30))
    pages = bench.engine.steps[-1][0].pages
    assert list(pages) == list(range(1, len(pages) + 1))


# ---- ends ----


def run_generate(bench: Bench, **spec) -> tuple[list[int], list[Generated]]:
    job = bench.generate_job("g", **spec)
    bench.run(job)
    parts = [part for part in bench.answers[job] if isinstance(part, Generated)]
    return [token for part in parts for token in part.tokens], parts


@pytest.mark.parametrize("count", [1, 2, 3, 7, 30])
@pytest.mark.parametrize("speculate", [True, False])
def test_generate_stops_at_its_length(bench: Bench, count: int, speculate: bool) -> None:
    tokens, parts = run_generate(bench, stopping=StoppingParams(count), speculate=speculate)
    assert tokens == plain(prompt(5), count)
    assert parts[-1].finish is FinishReason.LENGTH
    assert all(part.finish is FinishReason.RUNNING for part in parts[:-1])
    stats = parts[-1].session.stats
    assert stats.output_tokens == count and stats.steps == len(parts) - 1
    if not speculate:
        assert stats.draft_tokens == 0


def test_generate_without_speculation_asks_for_no_draft(bench: Bench) -> None:
    run_generate(bench, stopping=StoppingParams(10), speculate=False)
    assert all(step.propose is None for steps in bench.engine.steps for step in steps)


def test_generate_stops_at_the_context(bench: Bench) -> None:
    tokens, parts = run_generate(bench, tokens=prompt(200))
    assert len(tokens) == INFO.max_context - 200 and parts[-1].finish is FinishReason.LENGTH


@pytest.mark.parametrize("length", range(5, 16))
def test_eos_inside_a_draft_ends_the_text(length: int) -> None:
    bench = Bench(hits=(1.0,))
    bench.engine.eos_after = {length}
    tokens, parts = run_generate(bench, stopping=StoppingParams(40))
    assert tokens == [*plain(prompt(5), length - 5), EOS]
    assert parts[-1].finish is FinishReason.STOP
    stats = parts[-1].session.stats
    accepted = sum(part.accepted for part in parts)
    assert stats.accepted_tokens == accepted == sum(stats.accepted_at)
    assert stats.accepted_at == stats.drafted_at or length < 6, "what lies behind EOS does not lower acceptance"


def test_eos_can_be_ignored() -> None:
    bench = Bench()
    bench.engine.eos_after = {8}
    tokens, parts = run_generate(bench, stopping=StoppingParams(10, ignore_eos=True))
    assert EOS in tokens and len(tokens) == 10 and parts[-1].finish is FinishReason.LENGTH


def test_own_stop_tokens(bench: Bench) -> None:
    right = plain(prompt(5), 9)
    stop = right[4]
    tokens, parts = run_generate(bench, stopping=StoppingParams(40, frozenset({stop})))
    assert tokens == right[: right.index(stop) + 1] and parts[-1].finish is FinishReason.STOP


def test_a_finished_session_holds_nothing_but_answers(bench: Bench) -> None:
    bench.create("a", stopping=StoppingParams(3))
    last = bench.verify("a", 6, chain(*plain(prompt(5), 4)[1:]), None)
    assert last.finish is FinishReason.LENGTH and last.length == 8 and last.next_draft is None
    assert bench.scheduler.usage()[:5] == (0, 1, 0, 0, 0)
    assert bench.verify("a", 6, Draft()).replayed
    for job in (verify_job("a", 8, Draft()), Job(Kind.PROPOSE, "a", "", base=8, shape=KEEP)):
        assert isinstance(bench.error(bench.submit(job)), SessionFinishedError)
    assert len(bench.text("a")) == 8


def test_drafts_never_outgrow_what_may_be_committed(bench: Bench) -> None:
    bench.create("a", stopping=StoppingParams(4))
    assert len(bench.propose("a", 6).draft.tokens) == 2, "three tokens may come, the last one is the bonus"
    length = bench.verify("a", 6, Draft()).length
    assert len(bench.propose("a", length).draft.tokens) == 1
    length = bench.verify("a", length, Draft()).length
    assert bench.propose("a", length).draft.tokens == ()
    assert bench.verify("a", length, bench.propose("a", length).draft_id).finish is FinishReason.LENGTH


def test_the_cap_depends_on_what_is_committed_only() -> None:
    shapes = []
    for hits in ((0.0,), (1.0,)):
        bench = Bench(hits=hits)
        bench.create("a", stopping=StoppingParams(8))
        bench.verify("a", 6, bench.propose("a", 6).draft_id, KEEP)
        shapes.append(bench.engine.steps[-1][0].propose)
    assert shapes[0] == shapes[1] == DraftShape(4)


# ---- extend ----


def test_extend_commits_the_callers_tokens(bench: Bench) -> None:
    bench.create("a")
    own = tuple(prompt(40, 9))
    answer = bench.extend("a", 6, own, KEEP)
    assert bench.text("a")[6:] == list(own) and answer.length == 46
    assert answer.next_draft is not None and answer.next_draft.base == 46
    out = bench.verify("a", 46, answer.next_draft.draft_id)
    assert list(out.tokens) == plain(bench.text("a")[:46], len(out.tokens))


def test_extend_beyond_the_limit_commits_nothing(bench: Bench) -> None:
    bench.create("a", stopping=StoppingParams(4))
    with pytest.raises(InvalidArgumentError, match="takes 3 more"):
        bench.extend("a", 6, (5, 6, 7, 8))
    assert bench.extend("a", 6, (5, 6, 7)).finish is FinishReason.LENGTH


def test_a_half_fed_extend_leaves_no_trace(bench: Bench) -> None:
    bench.create("a", prompt(20))
    own = tuple(prompt(40, 9))
    job = bench.submit(Job(Kind.EXTEND, "a", "", base=21, tokens=own))
    bench.step()
    bench.scheduler.cancel(job)
    bench._collect()
    assert isinstance(bench.error(job), StepCancelledError)
    assert len(bench.text("a")) == 21
    answer = bench.verify("a", 21, bench.propose("a", 21).draft_id)
    assert list(answer.tokens) == plain(prompt(20), 1 + len(answer.tokens))[1:]


def test_a_failing_extend_can_be_repeated(bench: Bench) -> None:
    bench.create("a")
    own = tuple(prompt(20, 9))
    job = bench.submit(Job(Kind.EXTEND, "a", "", base=6, tokens=own))
    bench.step()
    bench.engine.raise_next = [NumericalError("nan")]
    bench.step()
    assert isinstance(bench.error(job), NumericalError)
    assert bench.extend("a", 6, own).length == 26


# ---- batches ----


def test_rounds_of_all_sessions_go_together(bench: Bench) -> None:
    for i in range(4):
        bench.create(f"s{i}", prompt(5, i))
    for i in range(4):
        bench.submit(verify_job(f"s{i}", 6, Draft()))
    assert bench.step() == 4


def test_short_prompts_share_a_step_and_long_ones_take_turns(bench: Bench) -> None:
    jobs = [bench.submit(bench.create_job(f"s{i}", prompt(5, i))) for i in range(3)]
    assert bench.step() == 3 and all(bench.done(job) for job in jobs)
    long = bench.submit(bench.create_job("long", prompt(100)))
    short = bench.submit(bench.create_job("short", prompt(8)))
    bench.step()
    assert not bench.done(short), "the first step is filled by the prompt that came first"
    bench.step()
    assert bench.done(short) and not bench.done(long)


def test_a_long_prompt_does_not_hold_up_rounds(bench: Bench) -> None:
    bench.create("a")
    bench.submit(bench.create_job("long", prompt(200)))
    length = 6
    for _ in range(5):
        job = bench.submit(verify_job("a", length, Draft()))
        assert bench.step() == 2
        answer = bench.answers[job][0]
        assert isinstance(answer, Verified)
        length = answer.length


def test_one_bad_row_fails_alone(bench: Bench) -> None:
    for i in range(4):
        bench.create(f"s{i}", prompt(5, i))
    bench.engine.bad_rows = {2}
    jobs = [bench.submit(verify_job(f"s{i}", 6, Draft())) for i in range(4)]
    bench.step()
    assert isinstance(bench.error(jobs[2]), NumericalError)
    assert all(isinstance(bench.answers[job][0], Verified) for job in jobs if job is not jobs[2])
    assert len(bench.text("s2")) == 6
    bench.engine.bad_rows = set()
    assert bench.verify("s2", 6, Draft()).length == 7


def test_a_failing_create_frees_its_place(bench: Bench) -> None:
    bench.engine.raise_next = [EngineFailedError("out of memory")]
    with pytest.raises(EngineFailedError):
        bench.create("a")
    assert bench.scheduler.usage()[:5] == (0, 0, 0, 0, 0)
    bench.create("a")


def test_a_failing_open_frees_its_place(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(bench.engine, "open", broken)
    with pytest.raises(EngineFailedError):
        bench.create("a")
    monkeypatch.undo()
    bench.create("a")


# ---- time ----


def test_a_late_item_is_dropped_before_its_step(bench: Bench) -> None:
    bench.create("a")
    job = verify_job("a", 6, Draft())
    job.deadline = bench.now + 1
    bench.submit(job)
    bench.now += 2
    assert bench.step() == 0
    assert isinstance(bench.error(job), DeadlineExceededError) and len(bench.text("a")) == 6


def test_a_commit_past_the_deadline_stands(bench: Bench) -> None:
    bench.create("a")
    job = verify_job("a", 6, Draft())
    job.deadline = bench.now + 1
    bench.submit(job)
    steps = bench.scheduler.next_steps()
    bench.now += 2
    bench.scheduler.cancel(job)
    bench.scheduler.complete(bench.engine.step(steps), bench.engine.times)
    bench._collect()
    assert isinstance(bench.answers[job][0], Verified)
    assert bench.verify("a", 6, Draft()).replayed


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_cancelled_create_frees_its_place(bench: Bench, steps: int) -> None:
    job = bench.submit(bench.create_job("a", prompt(100)))
    for _ in range(steps):
        bench.step()
    bench.scheduler.cancel(job)
    bench._collect()
    assert isinstance(bench.error(job), StepCancelledError)
    assert bench.scheduler.usage()[:5] == (0, 0, 0, 0, 0)
    bench.create("a", prompt(100))


def test_an_abandoned_session_without_a_known_id_goes_away(bench: Bench) -> None:
    job = bench.create_job("made-by-server", anonymous=True)
    bench.run(job)
    bench.scheduler.cancel(job)
    with pytest.raises(SessionNotFoundError):
        bench.text("made-by-server")
    named = bench.create_job("named")
    bench.run(named)
    bench.scheduler.cancel(named)
    assert len(bench.text("named")) == 6, "a session with a known id waits for its owner"


def test_idle_sessions_expire(bench: Bench) -> None:
    bench.create("a")
    bench.create("b", idle_timeout=600.0)
    bench.now += 40
    bench.verify("a", 6, Draft())
    bench.now += 40
    bench.scheduler.sweep()
    assert len(bench.text("a")) == 7, "a step is a sign of life"
    bench.now += 61
    bench.scheduler.sweep()
    with pytest.raises(SessionNotFoundError):
        bench.text("a")
    bench.text("b")
    bench.scheduler.check()


def test_expired_sessions_make_room_at_once(bench: Bench) -> None:
    for i in range(INFO.max_rows):
        bench.create(f"s{i}")
    bench.now += 61
    bench.create("new")


def test_delete_ends_the_item_in_the_queue(bench: Bench) -> None:
    bench.create("a")
    job = bench.submit(verify_job("a", 6, Draft()))
    assert bench.scheduler.delete("a", "") is not None
    bench._collect()
    assert isinstance(bench.error(job), StepCancelledError)
    assert bench.scheduler.delete("a", "") is None
    bench.scheduler.check()


def test_deleting_a_generation_ends_it_as_cancelled(bench: Bench) -> None:
    job = bench.submit(bench.generate_job("g"))
    bench.step()
    bench.step()
    bench.scheduler.delete("g", "")
    bench._collect()
    last = bench.answers[job][-1]
    assert isinstance(last, Generated) and last.finish is FinishReason.CANCELLED and last.session is not None
    assert bench.scheduler.usage()[:5] == (0, 0, 0, 0, 0)


def test_a_generation_waits_for_its_reader() -> None:
    bench = Bench(hits=(0.0,))
    job = bench.submit(bench.generate_job("g", stopping=StoppingParams(200)))
    while bench.step():
        pass
    assert len(bench.answers[job]) == WINDOW
    bench.scheduler.credit(job, 10)
    while bench.step():
        pass
    assert len(bench.answers[job]) == WINDOW + 10
    job.deadline = bench.now
    bench.scheduler.sweep()
    bench._collect()
    assert isinstance(bench.error(job), DeadlineExceededError)
    assert bench.scheduler.usage()[:5] == (0, 0, 0, 0, 0)


# ---- speculation off ----


def test_a_session_without_speculation_verifies_but_drafts_nothing(bench: Bench) -> None:
    bench.create("a", speculate=False)
    with pytest.raises(SpeculationDisabledError):
        bench.propose("a", 6)
    with pytest.raises(SpeculationDisabledError):
        bench.verify("a", 6, Draft(), KEEP)
    assert bench.verify("a", 6, Draft()).length == 7


def test_a_server_without_a_head_drafts_nothing() -> None:
    bench = Bench(info(draft_method="none"))
    bench.create("a")
    with pytest.raises(SpeculationDisabledError):
        bench.propose("a", 6)
    tokens, _ = run_generate(bench, stopping=StoppingParams(8))
    assert tokens == plain(prompt(5), 8)


def test_the_rule_is_echoed(bench: Bench) -> None:
    bench.create("a", sampling=SamplingParams(temperature=1.0, rule=Rule.REJECTION))
    assert bench.verify("a", 6, Draft()).rule is Rule.REJECTION


def test_a_rule_that_lets_drafts_choose_is_refused_where_they_may_not() -> None:
    bench = Bench(info(invariant=True))
    with pytest.raises(InvalidArgumentError, match='"rejection" lets drafts choose among tokens'):
        bench.create("a", sampling=SamplingParams(temperature=1.0, rule=Rule.REJECTION))
    bench.create("a", sampling=SAMPLED)


# ---- anything, in any order ----


class Client:
    """What the reference knows of one session: its text and the last request that committed."""

    def __init__(self, text: list[int], limit: int) -> None:
        self.text, self.limit = text, limit
        self.last: tuple[Kind, int] | None = None
        self.draft = 0

    @property
    def finished(self) -> bool:
        return len(self.text) >= self.limit


NAMES = st.sampled_from(["a", "b", "c", "d", "e"])


class AnyOrder(RuleBasedStateMachine):
    """Creates, steps, repeats, cancels, expires and fails at random; the reference is plain decoding."""

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench(info(max_rows=3, total_pages=120, prefill_chunk=8))
        self.clients: dict[str, Client] = {}
        self.waiting: dict[str, Job] = {}

    def _send(self, name: str, job: Job) -> None:
        if name in self.waiting:
            self.bench.submit(job)
            answer = self.bench.answers[job][-1]
            replayed = isinstance(answer, Created) and answer.replayed
            assert replayed or isinstance(answer, SessionBusyError | SessionExistsError)
        else:
            self.waiting[name] = self.bench.submit(job)
            self._hear(name)

    def _hear(self, name: str) -> None:
        job = self.waiting[name]
        if not self.bench.done(job):
            return
        del self.waiting[name]
        answer = self.bench.answers[job][-1]
        if isinstance(answer, Created | Generated):
            self._heard_text(name, job)
        elif isinstance(answer, Verified | Extended):
            self._heard_commit(self.clients[name], job, answer)
        elif isinstance(answer, Proposed):
            self.clients[name].draft = answer.draft_id

    def _heard_text(self, name: str, job: Job) -> None:
        tokens = list(job.spec.tokens)
        limit = min(self.bench.scheduler.context, len(tokens) + (job.spec.stopping.max_new_tokens or 10**6))
        if job.kind is Kind.GENERATE:
            out = [token for part in self.bench.answers[job] for token in part.tokens]
            assert out == plain(tokens, limit - len(tokens))
        elif name not in self.clients:
            self.clients[name] = Client([*tokens, next_token(tokens, SamplingParams())], limit)

    def _heard_commit(self, client: Client, job: Job, answer: Verified | Extended) -> None:
        if client.last == (job.kind, job.base):
            assert answer.replayed
            return
        assert not answer.replayed and job.base == len(client.text)
        tokens = list(answer.tokens if isinstance(answer, Verified) else job.tokens)
        if isinstance(answer, Verified):
            assert tokens == plain(client.text, len(tokens))
        client.text += tokens
        client.last = (job.kind, job.base)
        client.draft = answer.next_draft.draft_id if answer.next_draft else 0
        assert answer.length == len(client.text) <= client.limit

    @rule(name=NAMES, length=st.integers(1, 30), bound=st.sampled_from([None, 1, 4, 30]))
    def create(self, name: str, length: int, bound: int | None) -> None:
        self._send(name, self.bench.create_job(name, prompt(length, ord(name)), stopping=StoppingParams(bound)))

    @rule(name=NAMES, length=st.integers(1, 30))
    def generate(self, name: str, length: int) -> None:
        if name in self.clients or name in self.waiting:
            return
        self._send(name, self.bench.generate_job(name, prompt(length, 99), stopping=StoppingParams(12)))

    @rule(name=NAMES, depth=st.sampled_from([None, 0, 2]))
    def propose(self, name: str, depth: int | None) -> None:
        if name in self.clients:
            base = len(self.clients[name].text)
            self._send(name, Job(Kind.PROPOSE, name, "", base=base, shape=ShapeRequest(depth=depth)))

    @rule(name=NAMES, more=st.booleans())
    def verify(self, name: str, more: bool) -> None:
        client = self.clients.get(name)
        if client is not None:
            draft = client.draft or chain(*plain(client.text, 2)) if not client.finished else Draft()
            self._send(name, verify_job(name, len(client.text), draft, KEEP if more else None))

    @rule(name=NAMES, count=st.integers(1, 20))
    def extend(self, name: str, count: int) -> None:
        client = self.clients.get(name)
        if client is not None:
            tokens = prompt(count, 5)
            self._send(name, Job(Kind.EXTEND, name, "", base=len(client.text), tokens=tokens))

    @rule(name=NAMES)
    def repeat(self, name: str) -> None:
        client = self.clients.get(name)
        if client is not None and client.last is not None:
            kind, base = client.last
            self._send(name, Job(kind, name, "", base=base, draft=Draft(), tokens=(5,)))

    @rule(name=NAMES)
    def stale(self, name: str) -> None:
        client = self.clients.get(name)
        if client is not None and name not in self.waiting:
            job = self.bench.submit(verify_job(name, len(client.text) + 1, Draft()))
            assert isinstance(self.bench.error(job), PositionMismatchError)

    @rule(name=NAMES)
    def cancel(self, name: str) -> None:
        if name in self.waiting:
            self.bench.scheduler.cancel(self.waiting[name])
            self.bench._collect()
            assert isinstance(self.bench.error(self.waiting.pop(name)), StepCancelledError)

    @rule(name=NAMES)
    def delete(self, name: str) -> None:
        self.bench.scheduler.delete(name, "")
        self.bench._collect()
        self.clients.pop(name, None)
        job = self.waiting.pop(name, None)
        assert job is None or self.bench.answers[job], "what was in the queue is answered"

    @rule(fails=st.sampled_from([(), (0,), (1,), (0, 1, 2)]))
    @precondition(lambda self: self.waiting)
    def step(self, fails: tuple[int, ...]) -> None:
        self.bench.engine.bad_rows = set(fails)
        self.bench.step()
        for name in list(self.waiting):
            self._hear(name)

    @rule()
    def expire(self) -> None:
        if not self.waiting:
            self.bench.now += 100
            self.bench.scheduler.sweep()
            self.clients.clear()

    @invariant()
    def adds_up(self) -> None:
        self.bench.scheduler.check()
        for name, client in self.clients.items():
            assert self.bench.text(name) == client.text

    def teardown(self) -> None:
        self.bench.engine.bad_rows = set()
        while self.bench.step():
            pass
        for name in list(self.waiting):
            self._hear(name)
        for name in list(self.bench.scheduler.sessions):
            self.bench.scheduler.delete(name, "")
        self.bench._collect()
        self.bench.scheduler.check()
        assert self.bench.scheduler.usage()[:5] == (0, 0, 0, 0, 0)
        assert self.bench.engine.rows == {}


AnyOrder.TestCase.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestAnyOrder = AnyOrder.TestCase
