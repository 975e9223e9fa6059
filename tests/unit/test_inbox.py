"""Entries from thread to thread: none lost, none doubled, nobody left asleep."""

from __future__ import annotations

import asyncio
import gc
import os
import select
import threading
import time

import pytest

from speculator.inbox import Inbox

END = -1


def reading(inbox: Inbox[int], into: list[int]) -> threading.Thread:
    """A thread that takes entries until it meets END."""

    def run() -> None:
        while END not in into:
            inbox.wait()
            into.extend(inbox.take())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def test_what_was_put_before_is_taken_without_a_wait() -> None:
    inbox: Inbox[int] = Inbox()
    inbox.put(1)
    inbox.put(2)
    inbox.wait()
    assert list(inbox.take()) == [1, 2] and list(inbox.take()) == []


def test_a_sleeping_reader_hears_every_entry() -> None:
    inbox, found = Inbox[int](), list[int]()
    thread = reading(inbox, found)
    end = time.monotonic() + 10
    for number in range(200):
        inbox.put(number)
        while len(found) <= number and time.monotonic() < end:
            time.sleep(0)
    inbox.put(END)
    thread.join(10)
    assert found == [*range(200), END]


def test_many_writers_lose_nothing() -> None:
    inbox, found = Inbox[int](), list[int]()
    thread = reading(inbox, found)

    def write(first: int) -> None:
        for number in range(first, first + 3000):
            inbox.put(number)

    writers = [threading.Thread(target=write, args=(i * 3000,)) for i in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    inbox.put(END)
    thread.join(10)
    assert not thread.is_alive() and sorted(found) == [END, *range(12_000)]
    for i in range(4):
        mine = [number for number in found if i * 3000 <= number < (i + 1) * 3000]
        assert mine == sorted(mine), "entries of one writer stay in order"


def test_a_burst_wakes_once() -> None:
    inbox: Inbox[int] = Inbox(watched=True)
    for number in range(100):
        inbox.put(number)
    assert os.read(inbox.fileno(), 1000) == b"\0"


async def test_an_event_loop_watches_it() -> None:
    inbox, found, done = Inbox[int](watched=True), list[int](), asyncio.Event()

    def collect() -> None:
        inbox.awake()
        found.extend(inbox.take())
        if END in found:
            done.set()

    loop = asyncio.get_running_loop()
    loop.add_reader(inbox.fileno(), collect)
    await asyncio.to_thread(lambda: [inbox.put(number) for number in (*range(1000), END)])
    await asyncio.wait_for(done.wait(), 10)
    loop.remove_reader(inbox.fileno())
    assert found == [*range(1000), END]


def test_its_pipe_goes_with_it() -> None:
    inbox: Inbox[int] = Inbox()
    descriptor = inbox.fileno()
    select.select([descriptor], [], [], 0)
    del inbox
    gc.collect()
    with pytest.raises(OSError):
        os.fstat(descriptor)
