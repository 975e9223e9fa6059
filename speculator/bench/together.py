"""Work for several threads, whose results one reader takes as they come.

Owns: sharing out the items, the first error, and the end of it all. Must never know what the work is.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from queue import SimpleQueue
from typing import NamedTuple, TypeVar

Item = TypeVar("Item")
Value = TypeVar("Value")


class _Raised(NamedTuple):
    error: BaseException


class _Over(NamedTuple):
    """A thread has nothing left to do."""


def together(
    items: Iterable[Item], work: Callable[[Item, threading.Event], Iterator[Value]], count: int
) -> Iterator[Value]:
    """What `work` yields for all items, `count` of them at a time on threads of their own, as it comes.

    The first error ends all, after what came before it; leaving the iteration ends all, too.
    """
    waiting, stop = deque(items), threading.Event()
    heard: SimpleQueue[Value | _Raised | _Over] = SimpleQueue()
    threads = [
        threading.Thread(target=_work_off, args=(waiting, work, stop, heard), daemon=True)
        for _ in range(min(count, len(waiting)))
    ]
    for thread in threads:
        thread.start()
    try:
        yield from _until_over(heard, len(threads))
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def _work_off(
    waiting: deque[Item],
    work: Callable[[Item, threading.Event], Iterator[Value]],
    stop: threading.Event,
    heard: SimpleQueue[Value | _Raised | _Over],
) -> None:
    try:
        while not stop.is_set() and (item := _taken(waiting)) is not None:
            for value in work(item, stop):
                heard.put(value)
        heard.put(_Over())
    except BaseException as error:  # noqa: BLE001 - told to whoever reads
        heard.put(_Raised(error))


def _taken(waiting: deque[Item]) -> Item | None:
    with suppress(IndexError):  # another thread took the last one
        return waiting.popleft()
    return None


def _until_over(heard: SimpleQueue[Value | _Raised | _Over], threads: int) -> Iterator[Value]:
    while threads:
        value = heard.get()
        if isinstance(value, _Raised):
            raise value.error
        if isinstance(value, _Over):
            threads -= 1
        else:
            yield value
