"""How far a rank has come: what its device thread does, since when, and whether it works, waits for others or rests.

Owns: these facts, which one thread writes and the watch on the gang reads. Must never import torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import NamedTuple


class State(IntEnum):
    """Who is to blame when nothing goes on: a rank that works, before any that waits for it."""

    RESTS = 0  # no work, for as long as it takes
    WAITS = 1  # in a collective, or for the device, which may itself be in one
    WORKS = 2


class Beat(NamedTuple):
    """A rank at one moment. Orders of rank 0 are numbered from 1 on all ranks; `step` is the one taken up last."""

    phase: str
    step: int
    state: int
    seconds: float  # since it last went on


class Pulse:
    """The heart of one rank. `clock` is monotonic, `fault` hears of every phase before it begins."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, fault: Callable[[str], None] = lambda phase: None
    ) -> None:
        self._clock, self._fault = clock, fault
        self._now = ("starting", 0, State.WORKS, clock())

    def tick(self, phase: str) -> None:
        """It goes on, with `phase`."""
        self._set(phase, self._now[1], State.WORKS)
        self._fault(phase)

    def step(self, number: int) -> None:
        """It takes up an order, or goes on with it."""
        self._set(f"step {number}", number, State.WORKS)
        self._fault(self._now[0])

    def rest(self, phase: str) -> None:
        """It waits for work, for as long as it takes."""
        self._set(phase, self._now[1], State.RESTS)

    def on(self) -> None:
        """It goes on with what it does."""
        self._set(*self._now[:3])

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside it waits for other ranks, or for the device."""
        phase, step, before, _ = self._now
        self._set(phase, step, State.WAITS)
        try:
            yield
        finally:
            self._set(phase, step, before)

    @property
    def beat(self) -> Beat:
        phase, step, state, since = self._now
        return Beat(phase, step, state, self._clock() - since)

    def _set(self, phase: str, step: int, state: State) -> None:
        self._now = (phase, step, state, self._clock())
