"""The one thread that owns the device.

Owns: the engine, the scheduler and the inbox between them and the event loop. Must never know gRPC or protobuf, and
never touch the event loop but to hand it a batch of answers.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

from speculator.answers import Answer
from speculator.errors import EngineFailedError, SpeculatorError
from speculator.inbox import Inbox
from speculator.scheduler import Scheduler
from speculator.session import Job
from speculator.totals import Totals
from speculator.types import EngineInfo, SamplingParams, Step, StepResult, StepTimes

log = logging.getLogger(__name__)

Outcome = StepResult | SpeculatorError
Act: TypeAlias = tuple[Callable[..., Any], tuple[Any, ...], bool]  # what, with what, and whether amid a step too
Delivery = tuple[Job, Answer | SpeculatorError]


class Flight(Protocol):
    """A step that was launched."""

    def collect(self) -> Sequence[StepResult]:
        """Wait for its results; raises what `EngineLike.step` raises."""


class EngineLike(Protocol):
    """What the service needs of an engine; see Engine for the meaning of each part."""

    info: EngineInfo
    times: StepTimes

    def open(self, row: int, sampling: SamplingParams, speculate: bool) -> None: ...

    def close(self, row: int) -> None: ...

    def step(self, steps: Sequence[Step]) -> list[StepResult]: ...

    def launch(self, steps: Sequence[Step]) -> Flight | None:
        """Begin a step and wait for nothing; None, and nothing begun, where `step` has to run it."""

    def passes_run(self) -> Mapping[str, tuple[int, int]]: ...


class Worker:
    """Runs engine steps on its own thread.

    While the device runs a round that was launched, the next one is launched too, if its sessions need nobody to go
    on, and only then are the results of the first one read and delivered. An act waits until no step is under way.
    An engine of several stages has as many steps under way, each of sessions of its own.

    `deliver` is called on that thread with all answers of one engine step; `failed` once if the thread cannot go on.
    `post`, `stop` and `leftovers` belong to the one thread that uses the worker.
    """

    def __init__(
        self,
        engine: EngineLike,
        deliver: Callable[[list[Delivery]], None],
        failed: Callable[[BaseException], None],
        *,
        idle_timeout: float = 600.0,
        totals: Totals | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.scheduler = Scheduler(engine.info, engine, idle_timeout=idle_timeout, totals=totals, clock=clock)
        self._engine = engine
        self._deliver = deliver
        self._failed = failed
        self._clock = clock
        self._inbox: Inbox[Act] = Inbox()
        self._stages = engine.info.pipeline_parallel
        self._flights: deque[Flight] = deque()  # the steps under way, the oldest first
        self._alive = True
        self._thread = threading.Thread(target=self._main, name="speculator-device", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def post(self, act: Callable[..., Any], *args: Any) -> None:
        """Runs `act(*args)` on the worker's thread, between two engine steps."""
        self._inbox.put((act, args, False))

    def submit(self, job: Job) -> None:
        """Queues a work item; steps of other sessions stay under way where the engine has stages for them."""
        self._inbox.put((self.scheduler.submit, (job,), self._stages > 1))

    def post_amid(self, act: Callable[..., Any], *args: Any) -> None:
        """The same for an act that leaves the sessions of a step under way alone: it does not wait for its end."""
        self._inbox.put((act, args, True))

    def stop(self, timeout: float | None = None) -> None:
        """Lets the running step end, then ends the thread."""
        self.post(self._end)
        if self._thread.is_alive():
            self._thread.join(timeout)

    def leftovers(self) -> list[Delivery]:
        """Answers, all errors, of what the thread left undone when it ended."""
        self._flights.clear()
        self._act()
        self.scheduler.fail_all(EngineFailedError("the engine has stopped"))
        return self.scheduler.take_answers()

    def _end(self) -> None:
        self._alive = False

    def _main(self) -> None:
        try:
            while self._alive:
                self._turn()
            self._land_all()
        except BaseException as error:
            log.exception("the device thread cannot go on")
            self._failed(error)

    def _turn(self) -> None:
        if not self._flights and not self.scheduler.ready:
            self._inbox.wait()
        self._act()
        self._go_on(self._start())
        answers = self.scheduler.take_answers()
        if answers:
            self._deliver(answers)

    def _go_on(self, launched: Flight | None) -> None:
        """Read what is due: the step before the one just launched, or the oldest when no more can be under way."""
        if self._stages == 1:
            launched = self._land(launched)
        if launched is not None:
            self._flights.append(launched)
        if self._stages > 1 and (launched is None or len(self._flights) == self._stages):
            self._land()

    def _act(self) -> None:
        for act, args, amid in self._inbox.take():
            if not amid:
                self._land_all()
            act(*args)

    def _start(self) -> Flight | None:
        """Launch the next step beside those under way, if there are any; run it here where it cannot fly."""
        steps = self.scheduler.next_steps()
        flight = self._launch(steps) if steps else None
        if steps and flight is None:
            if self._flights and self._stages == 1:
                self.scheduler.recall()
            else:
                self._land_all()
                self.scheduler.complete(self._run(steps), self._engine.times)
        return flight

    def _launch(self, steps: Sequence[Step]) -> Flight | None:
        try:
            return self._engine.launch(steps)
        except Exception as error:  # noqa: BLE001 - the same step, not launched, says what is wrong
            log.warning("a step could not be launched: %s", error)
            return None

    def _land(self, following: Flight | None = None) -> Flight | None:
        """Complete the oldest step under way, if any; `following` was launched on top of it, and falls if it fails."""
        if not self._flights:
            return following
        flight = self._flights.popleft()
        outcomes = _collected(flight)
        if isinstance(outcomes, Exception):
            if following is not None:
                _collected(following)
                self.scheduler.recall()
            following, outcomes = None, self._alone(self.scheduler.under_way, outcomes)
        self.scheduler.complete(outcomes, self._engine.times)
        return following

    def _land_all(self) -> None:
        while self._flights:
            self._land()

    def _alone(self, steps: Sequence[Step | None], error: Exception) -> Sequence[Outcome]:
        """The parts of a step that failed when all were together; None is no part any more."""
        if sum(step is not None for step in steps) == 1:
            return [_as_error(error)] * len(steps)
        return [StepResult() if step is None else self._run([step])[0] for step in steps]

    def _run(self, steps: Sequence[Step]) -> Sequence[Outcome]:
        """One engine step. When it fails, each part runs once more alone, so that only the bad ones fail."""
        try:
            return self._engine.step(steps)
        except Exception as error:  # noqa: BLE001 - whatever a device throws, the others go on
            if len(steps) == 1:
                return [_as_error(error)]
        return [self._run([step])[0] for step in steps]


def _collected(flight: Flight) -> Sequence[Outcome] | Exception:
    try:
        return flight.collect()
    except Exception as error:  # noqa: BLE001 - whatever a device throws, the others go on
        return error


def _as_error(error: Exception) -> SpeculatorError:
    if isinstance(error, SpeculatorError):
        return error
    log.error("an engine step failed", exc_info=error)
    return EngineFailedError(f"the engine step failed: {type(error).__name__}")
