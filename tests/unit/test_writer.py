"""Messages of one call: at once when nothing is under way, in order always."""

from __future__ import annotations

import asyncio

from speculator.writer import Writer


class Wire:
    """A transport whose writes end when told."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.ends: list[asyncio.Future[None]] = []
        self.wrote = 0
        self.failures: list[Exception] = []
        self.writer = Writer(self.write, self._wrote, self.failures.append)

    async def write(self, message: int) -> None:
        if message < 0:
            raise ConnectionError("the peer is gone")
        self.begun.append(message)
        self.ends.append(asyncio.get_running_loop().create_future())
        await self.ends[-1]

    def _wrote(self) -> None:
        self.wrote += 1

    async def end(self) -> None:
        self.ends[-1].set_result(None)
        await asyncio.sleep(0)


async def test_a_message_leaves_in_the_turn_that_made_it() -> None:
    wire = Wire()
    wire.writer.put(1)
    assert wire.begun == [1] and not wire.writer.idle()


async def test_the_end_of_a_write_is_noticed_when_it_is_asked_for() -> None:
    wire = Wire()
    wire.writer.put(1)
    await wire.end()
    wire.writer.put(2)
    assert wire.begun == [1, 2] and wire.wrote == 0 and not wire.writer.waiting
    wire.ends[-1].set_result(None)
    assert wire.writer.idle()


async def test_messages_wait_for_the_one_before_in_order() -> None:
    wire = Wire()
    for number in range(5):
        wire.writer.put(number)
    assert wire.begun == [0] and list(wire.writer.waiting) == [1, 2, 3, 4]
    for number in range(1, 5):
        await wire.end()
        assert wire.begun == list(range(number + 1))
    assert wire.wrote == 4


async def test_a_late_message_does_not_overtake_those_that_wait() -> None:
    wire = Wire()
    wire.writer.put(0)
    wire.writer.put(1)
    wire.ends[-1].set_result(None)  # ended, and nobody has been told yet
    wire.writer.put(2)
    assert wire.begun == [0]
    await asyncio.sleep(0)
    await wire.end()
    assert wire.begun == [0, 1, 2]


async def test_finish_drops_what_waits_and_waits_for_what_is_under_way() -> None:
    wire = Wire()
    await wire.writer.finish()  # nothing to wait for
    wire.writer.put(1)
    wire.writer.put(2)
    ending = asyncio.ensure_future(wire.writer.finish())
    await asyncio.sleep(0)
    assert not ending.done()
    await wire.end()
    await asyncio.wait_for(ending, 5)
    assert wire.begun == [1] and wire.writer.idle()


async def test_it_reports_when_all_has_left() -> None:
    wire = Wire()
    wire.writer.put(1)
    wire.writer.report()
    assert wire.wrote == 0
    await wire.end()
    assert wire.wrote == 1 and wire.writer.idle()


async def test_a_write_that_fails_drops_what_waited_behind_it() -> None:
    wire = Wire()
    for number in (0, -1, 7):
        wire.writer.put(number)
    await wire.end()
    assert [type(error) for error in wire.failures] == [ConnectionError]
    assert wire.writer.idle() and wire.begun == [0]


async def test_a_write_that_fails_while_it_waits_is_told_when_it_is_noticed() -> None:
    wire = Wire()
    wire.writer.put(0)
    wire.ends[-1].set_exception(ConnectionError("the peer is gone"))
    assert wire.writer.idle()
    assert [type(error) for error in wire.failures] == [ConnectionError]


async def test_cancel_gives_up_quietly() -> None:
    wire = Wire()
    wire.writer.put(1)
    wire.writer.put(2)
    wire.writer.cancel()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert wire.begun == [1] and wire.writer.idle() and not wire.failures
