"""How far a rank has come: what it does, since when, and how often it went on.

Owns: these numbers, which one thread writes and the watch on the gang reads. Must never import torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple


class Beat(NamedTuple):
    """A rank at one moment. `ticks` grows whenever it goes on; a rank that waits for work is not `busy`."""

    phase: str
    ticks: int
    busy: bool
    seconds: float  # since it last went on


class Pulse:
    """The heart of one rank. `clock` is monotonic, `fault` hears of every phase before it begins."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, fault: Callable[[str], None] = lambda phase: None
    ) -> None:
        self._clock, self._fault = clock, fault
        self._now = ("starting", 0, True, clock())

    def tick(self, phase: str) -> None:
        """It goes on, with `phase`."""
        self._set(phase, True)
        self._fault(phase)

    def rest(self, phase: str) -> None:
        """It waits for work, for as long as it takes."""
        self._set(phase, False)

    def progress(self, what: str, done: int, total: int) -> None:
        """`tick` as a progress of loading or capturing."""
        self.tick(what)

    @property
    def beat(self) -> Beat:
        phase, ticks, busy, since = self._now
        return Beat(phase, ticks, busy, self._clock() - since)

    def _set(self, phase: str, busy: bool) -> None:
        self._now = (phase, self._now[1] + 1, busy, self._clock())
