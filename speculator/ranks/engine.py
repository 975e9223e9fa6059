"""The engine of rank 0, which tells the others what it is about to do, and the loop of those that are told.

Owns: that every rank runs the same steps in the same order, and that one which comes to other results ends the gang.
Must never know processes, sockets or the service.
"""

from __future__ import annotations

import logging
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any, NoReturn

from speculator.engine import Engine
from speculator.errors import EngineFailedError, SpeculatorError
from speculator.ranks.channel import Channel
from speculator.ranks.codec import Change, Close, Kind, Landed, Open, Order
from speculator.ranks.errors import RankLostError, sentence
from speculator.ranks.pulse import Pulse
from speculator.types import SamplingParams, Step, StepResult
from speculator.under_way import UnderWay

log = logging.getLogger(__name__)

Lost = Callable[[str], str]  # hears in one sentence why the gang cannot go on, and may know better


class LeadEngine(Engine):
    """An engine whose steps the other ranks run too. `lost` hears of the first failure; from then on every step fails.

    A step that fails on this rank alone cannot be run again: the others may wait inside a collective of it.
    """

    def __init__(self, channel: Channel, lost: Lost, pulse: Pulse, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._channel, self._lost, self._pulse = channel, lost, pulse
        self._changes: list[Change] = []
        self._digest, self._ended, self._orders = 0, "", 0
        self.waiting = pulse.waiting

    def open(self, row: int, sampling: SamplingParams, speculate: bool) -> None:
        super().open(row, sampling, speculate)
        self._changes.append(Open(row, sampling, speculate))

    def close(self, row: int) -> None:
        super().close(row)
        self._changes.append(Close(row))

    def step(self, steps: Sequence[Step]) -> list[StepResult]:
        self._tell(Order(self._changes, steps, self._digest))
        return self._outcome(lambda: super(LeadEngine, self).step(steps))

    def launch(self, steps: Sequence[Step]) -> LeadFlight | None:
        if not self.launches:
            return None
        self._tell(Order(self._changes, steps, self._digest, Kind.LAUNCH))
        with self._alone():
            flight = super().launch(steps)
        if flight is None:
            self._pulse.rest("serving")
            return None
        return LeadFlight(self, flight)

    def collected(self, flight: UnderWay) -> list[StepResult]:
        """The results of a launched round; the others collect theirs before the next order."""
        if self._ended:
            raise RankLostError(self._ended)
        self._changes.append(Landed())
        return self._outcome(flight.collect)

    def end(self) -> None:
        """The last order: the other ranks leave their loops, if they are still there."""
        if not self._ended:
            self._tell(Order(self._changes, (), self._digest, Kind.END))
            self._digest = self._orders = 0

    def give_up(self, why: str) -> None:
        """A rank was lost; any thread may say so. The step under way fails when its collectives do."""
        self._ended = self._ended or why

    def _outcome(self, run: Callable[[], list[StepResult]]) -> list[StepResult]:
        error = None
        with self._alone():
            try:
                results = run()
            except EngineFailedError:
                raise
            except SpeculatorError as failure:
                results, error = [], failure
        self._digest = digest(self._digest, results, error)
        self._pulse.rest("serving")
        if error is not None:
            raise error
        return results

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """A failure of the device is this rank's own, and so is an error that no step should bring."""
        try:
            self._pulse.step(self._orders)
            yield
        except (EngineFailedError, RuntimeError) as failure:
            self._end(f"rank 0 failed in a step: {sentence(failure)}")
        except SpeculatorError:
            raise
        except Exception as failure:  # noqa: BLE001 - nobody knows how far this rank came, and the others wait for it
            log.exception("a step failed")
            self._end(f"rank 0 failed in a step: {type(failure).__name__}: {sentence(failure)}")

    def _tell(self, order: Order) -> None:
        if self._ended:
            raise RankLostError(self._ended)
        try:
            self._channel.send(order)
        except RuntimeError as error:
            self._end(f"rank 0 could not reach the other ranks: {sentence(error)}")
        self._changes = []
        self._orders += 1

    def _end(self, why: str) -> NoReturn:
        """What the watch on the gang saw says more than what broke here."""
        if not self._ended:
            self.give_up(self._lost(why))
        raise RankLostError(self._ended)


class LeadFlight(UnderWay):
    """A launched round of rank 0."""

    def __init__(self, engine: LeadEngine, flight: UnderWay) -> None:
        self._lead, self._own = engine, flight

    def collect(self) -> list[StepResult]:
        return self._lead.collected(self._own)


class Follower:
    """A rank that runs what rank 0 tells; `pulse` hears of every order and of its end."""

    def __init__(self, engine: Engine, channel: Channel, pulse: Pulse | None = None) -> None:
        self._engine, self._channel, self._pulse = engine, channel, pulse or Pulse()
        self._flights: deque[UnderWay] = deque()
        self._digest = 0
        engine.waiting = self._pulse.waiting

    def run(self) -> None:
        """Until rank 0 says that it was the last order; RankLostError when this rank fails, or goes another way."""
        for number in count(1):
            self._pulse.rest("waiting for work")
            order = self._channel.receive()
            self._pulse.step(number)
            for change in order.changes:
                self._change(change)
            self._check(order)
            if order.kind is Kind.END:
                self._engine.finish()
                return
            self._do(order)

    def _change(self, change: Change) -> None:
        if isinstance(change, Open):
            self._engine.open(*change)
        elif isinstance(change, Close):
            self._engine.close(change.row)
        else:
            self._note(self._flights.popleft().collect)

    def _check(self, order: Order) -> None:
        if order.digest != self._digest:
            text = "went another way than rank 0: its last step committed or drafted other tokens"
            raise RankLostError(
                f"rank {self._channel.rank} {text}; give all ranks the same devices, models and versions"
            )

    def _do(self, order: Order) -> None:
        if order.kind is Kind.STEP:
            self._note(lambda: self._engine.step(order.steps))
            return
        flight = self._engine.launch(order.steps)
        if flight is not None:
            self._flights.append(flight)

    def _note(self, run: Callable[[], list[StepResult]]) -> None:
        """Run; an error that the step itself deserves is rank 0's too."""
        try:
            self._digest = digest(self._digest, run(), None)
        except EngineFailedError as failure:
            raise RankLostError(f"rank {self._channel.rank} failed in a step: {failure.message}") from failure
        except SpeculatorError as error:
            self._digest = digest(self._digest, [], error)


def digest(before: int, results: Sequence[StepResult], error: SpeculatorError | None) -> int:
    """What steps came to, as a number: what was said before, then committed tokens and drafts, or the kind of error."""
    said = [(r.tokens, r.accepted, r.draft and (r.draft.tokens, r.draft.parents, r.draft.draft_id)) for r in results]
    return zlib.crc32(repr((said, error and error.reason)).encode(), before)
