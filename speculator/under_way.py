"""A step under way: a recorded round that was launched and whose results are yet to be read.

Owns: the wait for it, and how its time is counted. Must never know why it was launched, nor sessions.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from speculator.errors import EngineFailedError, SpeculatorError
from speculator.results import collect
from speculator.round_result import Flight
from speculator.types import Step, StepResult, StepTimes
from target.errors import PlanError

if TYPE_CHECKING:
    from speculator.engine import Engine


@contextmanager
def device_failures() -> Iterator[None]:
    """Whatever the device throws, as EngineFailedError."""
    try:
        yield
    except SpeculatorError:
        raise
    except (RuntimeError, PlanError) as error:
        raise EngineFailedError(f"the step failed on the device: {str(error).splitlines()[0]}") from error


class UnderWay:
    """A launched step; rounds are collected in the order of their launches."""

    def __init__(self, engine: Engine, steps: Sequence[Step], flight: Flight, begun: float) -> None:
        self._engine, self._steps, self._flight = engine, steps, flight
        self._launched = time.perf_counter()
        self._launching = self._launched - begun

    def collect(self) -> list[StepResult]:
        """Wait for the round; an empty result for each row whose sequence had ended before.

        Raises as `Engine.step`. What was launched on top of a round that failed is collected too, and does not count.
        """
        engine = self._engine
        try:
            with device_failures(), engine.waiting():
                results = collect(self._steps, (), (), self._flight)
        except SpeculatorError:
            engine.fallen = True
            raise
        if not engine.fallen:
            engine.landed(self._flight)
        now = time.perf_counter()
        engine.times = StepTimes(0.0, self._launching, now - max(self._launched, engine.landed_at))
        engine.landed_at = now
        return results
