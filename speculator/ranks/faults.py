"""Faults on purpose, to test how a gang ends: a rank that kills itself, stops, hangs, or runs out of memory.

Owns: the environment variable that asks for one. Must never do anything without it.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Mapping

# rank:phases:times:kind, as "2:target|head:3:kill": at the third time of any of these phases
VARIABLE = "SPECULATOR_FAULT"
NOW = "fault now: "  # begins the line on stderr just before it happens


def fault_of(rank: int, environ: Mapping[str, str]) -> Callable[[str], None]:
    """What `Pulse` calls before each phase. ValueError for a fault that cannot be read."""
    text = environ.get(VARIABLE, "")
    if not text:
        return lambda phase: None
    who, phases, times, kind = text.split(":")
    names, act, left = tuple(phases.split("|")), FAULTS[kind], [int(times)]

    def fault(entered: str) -> None:
        left[0] -= entered.startswith(names)
        if int(who) == rank and left[0] == 0:
            left[0] = -1
            os.write(2, f"{NOW}rank {rank}, {kind} in {entered}\n".encode())
            act()

    return fault


def _memory() -> None:
    raise RuntimeError("out of memory, as a test wants it")


def _hang() -> None:
    """This thread alone: the rank beats on."""
    threading.Event().wait()


FAULTS: Mapping[str, Callable[[], None]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "memory": _memory,
    "hang": _hang,
}
