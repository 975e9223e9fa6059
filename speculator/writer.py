"""Writes the messages of one call in order, each in the very turn of the event loop that made it when it can.

Owns: a write from its first part to its last, and the messages that wait behind it. Must never know what they say.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any


class Writer:
    """Drives `write`, a coroutine function that awaits futures of the running loop only, as that of gRPC's context.

    A task would begin a write one turn of the loop later and hear of its end in a turn of its own. Here `put` runs the
    part that hands the message over, and nobody asks for the end of a write until somebody needs it. `wrote` is called
    as `report` asks, `failed` with what a write raises; what waited behind that is dropped.
    """

    def __init__(
        self,
        write: Callable[[Any], Coroutine[Any, None, Any]],
        wrote: Callable[[], None],
        failed: Callable[[Exception], None],
    ) -> None:
        self.waiting: deque[Any] = deque()  # messages behind the one under way
        self._write, self._wrote, self._failed = write, wrote, failed
        self._work: Coroutine[Any, None, Any] | None = None
        self._awaited: asyncio.Future[Any] | None = None
        self._reporting = False

    def put(self, message: Any) -> None:
        """Writes a message now, or behind those that wait."""
        if self.idle():
            self._begin(message)
        else:
            self.waiting.append(message)
            self.report()

    def idle(self) -> bool:
        """Whether all messages have left."""
        if self._awaited is not None and self._awaited.done():
            self._go_on()
        return self._work is None and not self.waiting

    def report(self) -> None:
        """Has `wrote` called when the write under way has ended."""
        if not self._reporting and self._awaited is not None:
            self._reporting = True
            self._awaited.add_done_callback(self._ended)

    async def finish(self) -> None:
        """Drops what waits, and returns when the write under way has ended; nothing may be put meanwhile."""
        self.waiting.clear()
        while not self.idle() and self._awaited is not None:
            await asyncio.wait([self._awaited])

    def cancel(self) -> None:
        """Gives up what is under way and what waits."""
        self.waiting.clear()
        if self._awaited is not None:
            self._awaited.cancel()

    def _begin(self, message: Any) -> None:
        self._work = self._write(message)
        self._go_on()

    def _go_on(self) -> None:
        work, self._awaited = self._work, None
        assert work is not None
        try:
            self._awaited = work.send(None)
        except (StopIteration, asyncio.CancelledError):
            self._work = None
        except Exception as error:  # noqa: BLE001 - whatever it is, the call cannot go on
            self._work = None
            self.waiting.clear()
            self._failed(error)

    def _ended(self, _: object) -> None:
        self._reporting = False
        self.idle()
        if self._work is None and self.waiting:
            self._begin(self.waiting.popleft())
        if self.waiting:
            self.report()
        self._wrote()
