"""The device thread and the way to it: ordering, failure, cancellation, back-pressure, all with real threads."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from speculator.answers import Generated
from speculator.core import DrafterCore
from speculator.drafts import KEEP
from speculator.errors import (
    DeadlineExceededError,
    DrainingError,
    EngineFailedError,
    InvalidArgumentError,
    NumericalError,
    ServerFullError,
    SessionNotFoundError,
)
from speculator.session import SessionSpec
from speculator.types import Draft, FinishReason, SamplingParams, StoppingParams
from tests.fakes import FakeEngine, info, plain

PROMPT = (5, 6, 7, 8)


def spec(name: str = "", tokens: tuple[int, ...] = PROMPT, count: int | None = None, **more: object) -> SessionSpec:
    return SessionSpec(name, "", tokens, stopping=StoppingParams(count), **more)  # type: ignore[arg-type]


@asynccontextmanager
async def running(engine: FakeEngine | None = None, **options: float) -> AsyncIterator[DrafterCore]:
    core = DrafterCore(engine or FakeEngine(), **options)  # type: ignore[arg-type]
    await core.start()
    try:
        yield core
    finally:
        await core.stop()
        core._worker.scheduler.check()


async def entered(engine: FakeEngine) -> None:
    """Waits until the engine is inside a step."""
    await asyncio.to_thread(engine.entered.wait, 10)


async def until(condition: object) -> None:
    while not condition():  # type: ignore[operator]
        await asyncio.sleep(0.005)


async def collect(core: DrafterCore, wanted: SessionSpec) -> list[Generated]:
    return [part async for part in core.generate(wanted)]


async def test_a_clients_loop() -> None:
    async with running() as core:
        created = await core.create(spec("a"))
        out, length = [created.next_token], 5
        draft = await core.propose("a", length)
        while len(out) < 30:
            answer = await core.verify("a", length, draft.draft_id, KEEP)
            out += answer.tokens
            length, draft = answer.length, answer.next_draft
        assert out == plain(PROMPT, len(out))
        assert (await core.extend("a", length, (9, 9))).length == length + 2
        view = await core.get("a", with_tokens=True)
        assert view.tokens == (*PROMPT, *out, 9, 9)
        stats = await core.delete("a")
        assert stats is not None and stats.steps > 0
        with pytest.raises(SessionNotFoundError):
            await core.get("a")


async def test_the_server_makes_ids() -> None:
    async with running() as core:
        first, second = await core.create(spec()), await core.create(spec())
        assert first.session.session_id != second.session.session_id
        assert len(first.session.session_id) == 36


async def test_timing_tells_where_time_went() -> None:
    engine = FakeEngine()
    async with running(engine) as core:
        await core.create(spec("a"))
        engine.gate.clear()
        engine.entered.clear()
        first = asyncio.create_task(core.create(spec("b")))
        await entered(engine)
        job = asyncio.create_task(core.verify("a", 5, Draft()))
        await asyncio.sleep(0.01)
        engine.gate.set()
        await first
        second = await job
        assert second.timing.queue >= 0.009, "it waited behind the step before"
        assert (second.timing.draft, second.timing.verify, second.timing.batch) == (0.003, 0.003, 1)


async def test_many_sessions_share_the_engine() -> None:
    engine = FakeEngine(info(max_rows=16, total_pages=16 * 82 + 1))
    async with running(engine) as core:
        prompts = [(1 + i, 2 + i, 3) for i in range(16)]
        texts = await asyncio.gather(*(collect(core, spec(f"s{i}", prompts[i], 20)) for i in range(16)))
        for tokens, parts in zip(prompts, texts, strict=True):
            assert [t for part in parts for t in part.tokens] == plain(tokens, 20)
        assert max(len(steps) for steps in engine.steps) > 4, "rounds of different sessions go together"
        assert core.usage()[:5] == (0, 0, 0, 0, 0)


# ---- cancel and deadline, in each phase ----


async def test_cancel_while_queued() -> None:
    engine = FakeEngine()
    async with running(engine) as core:
        await core.create(spec("a"))
        engine.gate.clear()
        engine.entered.clear()
        first = asyncio.create_task(core.create(spec("b")))
        await entered(engine)
        queued = asyncio.create_task(core.verify("a", 5, Draft()))
        await asyncio.sleep(0.01)
        queued.cancel()
        with suppress(asyncio.CancelledError):
            await queued
        engine.gate.set()
        await first
        assert (await core.get("a")).length == 5
        assert not (await core.verify("a", 5, Draft())).replayed


async def test_cancel_while_running_keeps_the_commit() -> None:
    engine = FakeEngine()
    async with running(engine) as core:
        await core.create(spec("a"))
        engine.gate.clear()
        engine.entered.clear()
        job = asyncio.create_task(core.verify("a", 5, Draft()))
        await entered(engine)
        job.cancel()
        with suppress(asyncio.CancelledError):
            await job
        engine.gate.set()
        await until(lambda: core.in_flight == 0)
        again = await core.verify("a", 5, Draft())
        assert again.replayed and again.length == 6


async def test_cancel_of_an_anonymous_create_frees_its_place() -> None:
    engine = FakeEngine()
    async with running(engine) as core:
        engine.gate.clear()
        job = asyncio.create_task(core.create(spec()))
        await entered(engine)
        job.cancel()
        with suppress(asyncio.CancelledError):
            await job
        engine.gate.set()
        await until(lambda: core.usage().active == 0)


async def test_deadline_while_queued() -> None:
    engine = FakeEngine()
    async with running(engine) as core:
        await core.create(spec("a"))
        engine.gate.clear()
        engine.entered.clear()
        first = asyncio.create_task(core.create(spec("b")))
        await entered(engine)
        late = asyncio.create_task(core.verify("a", 5, Draft(), deadline=time.monotonic() + 0.01))
        await asyncio.sleep(0.03)
        engine.gate.set()
        with pytest.raises(DeadlineExceededError):
            await late
        await first
        assert (await core.get("a")).length == 5


async def test_closing_a_generation_frees_its_place() -> None:
    async with running(FakeEngine(hits=(0.0,))) as core:
        parts = core.generate(spec("g", count=200))
        async for part in parts:
            if part.session is None:
                break
        await parts.aclose()
        await until(lambda: core.usage()[:5] == (0, 0, 0, 0, 0))
        assert core.in_flight == 0


async def test_ten_thousand_cancels_leave_nothing() -> None:
    async with running(FakeEngine(), max_queued=100_000) as core:
        await core.create(spec("a"))
        for _ in range(10):
            jobs = [asyncio.create_task(core.verify("a", 5, Draft(), deadline=0.0)) for _ in range(500)]
            jobs += [asyncio.create_task(core.create(spec())) for _ in range(500)]
            await asyncio.sleep(0)
            for job in jobs:
                job.cancel()
            await asyncio.gather(*jobs, return_exceptions=True)
        await until(lambda: core.in_flight == 0)
        await until(lambda: core.usage().active == 1)
        assert (await core.get("a")).length == 5


async def test_a_slow_reader_bounds_what_waits_for_it() -> None:
    async with running(FakeEngine(hits=(0.0,))) as core:
        parts = core.generate(spec("g", count=200))
        await anext(parts)
        await asyncio.sleep(0.2)
        assert (await core.get("g")).length <= len(PROMPT) + 64
        rest = [part async for part in parts]
        assert rest[-1].finish is FinishReason.LENGTH


# ---- failure ----


async def test_one_bad_row_fails_alone_and_the_server_goes_on() -> None:
    engine = FakeEngine()
    engine.bad_seeds = {13}
    async with running(engine) as core:
        bad = collect(core, spec("bad", count=10, sampling=SamplingParams(seed=13)))
        good = [collect(core, spec(f"g{i}", count=10)) for i in range(3)]
        results = await asyncio.gather(bad, *good, return_exceptions=True)
        assert isinstance(results[0], NumericalError)
        for parts in results[1:]:
            assert [t for part in parts for t in part.tokens] == plain(PROMPT, 10)
        assert core.usage().active == 0


async def test_a_strange_engine_error_is_wrapped(caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine()
    async with running(engine) as core:
        await core.create(spec("a"))
        engine.raise_next = [MemoryError("CUDA out of memory at 0xdeadbeef")]
        with pytest.raises(EngineFailedError, match="MemoryError") as caught:
            await core.verify("a", 5, Draft())
        assert "0xdeadbeef" not in caught.value.message
        assert (await core.verify("a", 5, Draft())).length == 6


async def test_a_dead_worker_answers_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    died = asyncio.Event()
    async with running() as core:
        core.on_dead = died.set
        await core.create(spec("a"))

        def broken(*_: object) -> None:
            raise RuntimeError("a bug in the scheduler")

        monkeypatch.setattr(core._worker.scheduler, "next_steps", broken)
        jobs = [core.verify("a", 5, Draft()), core.create(spec("b")), core.create(spec("c"))]
        results = await asyncio.gather(*jobs, return_exceptions=True)
        assert all(isinstance(result, EngineFailedError) for result in results)
        await asyncio.wait_for(died.wait(), 5)
        with pytest.raises(EngineFailedError):
            await core.create(spec("d"))
        with pytest.raises(EngineFailedError):
            await core.get("a")


async def test_a_bug_in_one_sessions_books_ends_that_session_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running() as core:
        for name in "ab":
            await core.create(spec(name))
        scheduler = core._worker.scheduler
        commit = scheduler._commit

        def broken(job: Any, session: Any, *rest: Any) -> None:
            if session.session_id == "a":
                raise KeyError("a bug")
            commit(job, session, *rest)

        monkeypatch.setattr(scheduler, "_commit", broken)
        monkeypatch.setattr(scheduler.totals, "item", lambda *_: 1 / 0)  # nor do figures stop anything
        results = await asyncio.gather(*(core.verify(name, 5, Draft()) for name in "ab"), return_exceptions=True)
        assert isinstance(results[0], EngineFailedError) and results[1].length == 6  # type: ignore[union-attr]
        with pytest.raises(SessionNotFoundError):
            await core.get("a")
        assert (await core.verify("b", 6, Draft())).length == 7
        await core.delete("b")
        usage = core.usage()
        assert usage.active == usage.used_pages == usage.reserved_pages == 0


async def test_stop_answers_what_is_left() -> None:
    engine = FakeEngine()
    core = DrafterCore(engine)
    await core.start()
    engine.gate.clear()
    first = asyncio.create_task(core.create(spec("a", tuple(range(1, 60)))))
    await entered(engine)
    second = asyncio.create_task(core.create(spec("b")))
    await asyncio.sleep(0.01)
    stopping = asyncio.create_task(core.stop())
    await asyncio.sleep(0.01)
    engine.gate.set()
    await stopping
    results = await asyncio.gather(first, second, return_exceptions=True)
    assert all(isinstance(result, EngineFailedError) for result in results)
    assert core.in_flight == 0


# ---- admission ----


async def test_back_pressure_is_by_work_item() -> None:
    engine = FakeEngine()
    async with running(engine, max_queued=4) as core:
        engine.gate.clear()
        jobs = [asyncio.create_task(core.create(spec(f"s{i}"))) for i in range(4)]
        await asyncio.sleep(0.01)
        with pytest.raises(ServerFullError) as caught:
            await core.create(spec("one-more"))
        assert caught.value.retry_after > 0
        engine.gate.set()
        await asyncio.gather(*jobs)
        await core.create(spec("one-more"))


async def test_bad_requests_never_reach_the_worker() -> None:
    engine = FakeEngine()
    async with running(engine) as core:
        for bad in (
            spec("a b"),
            spec("a", ()),
            spec("a", (101,)),
            spec("a", (5,) * 300),
            spec("a", count=0),
            spec("a", sampling=SamplingParams(top_p=2.0)),
            spec("a", idle_timeout=0.0),
            spec("a", idle_timeout=1e9),
            spec("a", (5,), prefill_only=True),
        ):
            with pytest.raises(InvalidArgumentError):
                await core.create(bad)
        with pytest.raises(InvalidArgumentError):
            await core.extend("a", 5, ())
        with pytest.raises(InvalidArgumentError):
            await core.extend("a", 5, (101,))
        assert engine.steps == [] and core.in_flight == 0


async def test_draining_takes_no_new_session_but_lets_others_go_on() -> None:
    async with running() as core:
        await core.create(spec("a"))
        core.drain()
        with pytest.raises(DrainingError):
            await core.create(spec("b"))
        with pytest.raises(DrainingError):
            await anext(core.generate(spec("g")))
        assert (await core.verify("a", 5, Draft())).length == 6
        core.close()
        with pytest.raises(DrainingError):
            await core.verify("a", 6, Draft())
        await asyncio.wait_for(core.quiet(), 1)


async def test_idle_sessions_expire_by_themselves() -> None:
    async with running(idle_timeout=0.05) as core:
        await core.create(spec("a"))
        await until(lambda: core.usage().active == 0)


async def test_the_engine_has_one_thread() -> None:
    engine = FakeEngine()
    async with running(engine) as core:
        await asyncio.gather(*(collect(core, spec(f"s{i}", count=5)) for i in range(5)))
    assert len(engine._threads) == 1 and threading.get_ident() not in engine._threads


async def test_totals_count_every_commit() -> None:
    engine = FakeEngine()
    async with running(engine) as core:
        parts = await collect(core, spec("g", count=30))
        stats, totals = parts[-1].session.stats, core.totals
        await until(lambda: totals.acceptance.output_tokens == 30)  # counted after the answer went out
        assert totals.acceptance.rounds == stats.rounds
        assert totals.acceptance.output_tokens == stats.output_tokens == 30
        assert sum(totals.batch_size.counts) == len(engine.steps)
        assert sum(totals.accepted_per_step().counts) == stats.steps
        with pytest.raises(SessionNotFoundError):
            await core.verify("none", 5, Draft())
        assert totals.rejected == {"SESSION_NOT_FOUND": 1}
