"""Entries from any thread to the one thread that waits for them.

Owns: the wake-up, through a pipe. Must never know what an entry is.
"""

from __future__ import annotations

import os
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

SOME = 64  # bytes; a race may leave more than one
Entry = TypeVar("Entry")


class Inbox(Generic[Entry]):
    """A queue whose reader waits on a pipe: a thread in `wait`, or an event loop that watches `fileno`.

    A lock, and with it queue.Queue and queue.SimpleQueue, wakes its waiter while the waker still holds the interpreter:
    the waiter goes back to sleep until it may run. Writing to a pipe lets go of the interpreter, which halves the way
    to the other thread. However many entries are put meanwhile, one byte wakes it.
    """

    def __init__(self, watched: bool = False) -> None:
        self._entries: deque[Entry] = deque()
        self._wanted = watched  # a byte would wake somebody
        self._out, self._in = os.pipe()
        weakref.finalize(self, _close, self._out, self._in).atexit = False

    def fileno(self) -> int:
        """Readable when there is something to take, after which `awake` is to be called first."""
        return self._out

    def put(self, entry: Entry) -> None:
        """Leaves an entry, from any thread; a reader that is busy looks by itself before it waits again."""
        self._entries.append(entry)
        if self._wanted:
            self._wanted = False
            os.write(self._in, b"\0")

    def wait(self) -> None:
        """Blocks until there may be an entry."""
        self._wanted = True
        if not self._entries:  # whoever put one before now saw a busy reader
            os.read(self._out, SOME)
        self._wanted = False

    def awake(self) -> None:
        """Hears the wake-up that made `fileno` readable; what is put from now on wakes again."""
        os.read(self._out, SOME)
        self._wanted = True

    def take(self) -> Iterator[Entry]:
        """Entry after entry until none is left."""
        entries = self._entries
        while entries:
            yield entries.popleft()


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
