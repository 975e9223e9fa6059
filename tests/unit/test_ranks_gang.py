"""The watch on a gang: who is named when a rank dies, falls silent, hangs, fails or never comes."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from speculator.ranks.gang import Hub, Limits, Member
from speculator.ranks.pulse import Pulse

FAST = Limits(silent=0.8, stalled=0.8, starting=0.8, absent=1.5)
MEMBER = """
import sys, time
from speculator.ranks.gang import Limits, Member
from speculator.ranks.pulse import Pulse
pulse = Pulse()
member = Member(1, sys.argv[1], "token", pulse, lambda why: print(why, flush=True))
member.start()
pulse.tick("loading")
print("there", flush=True)
time.sleep(30)
"""
HUB = """
import time
from speculator.ranks.gang import Hub
from speculator.ranks.pulse import Pulse
gang = Hub(2, Pulse(), print, "token")
gang.start()
print(gang.address, flush=True)
time.sleep(30)
"""


class Told:
    """Hears of losses."""

    def __init__(self) -> None:
        self.why: list[str] = []
        self._some = threading.Event()

    def __call__(self, why: str) -> None:
        self.why.append(why)
        self._some.set()

    def wait(self, seconds: float = 8.0) -> str:
        assert self._some.wait(seconds), "nobody was told"
        return self.why[0]


@contextmanager
def hub(size: int, limits: Limits = FAST, describe: Callable[[int], str] = lambda rank: "") -> Iterator[Hub]:
    told = Told()
    found = Hub(size, Pulse(), told, "token", describe=describe, limits=limits)
    found.told = told  # type: ignore[attr-defined]
    found.start()
    yield found
    found.end()


def join(gang: Hub, rank: int, told: Told | None = None, limits: Limits = FAST) -> Member:
    member = Member(rank, gang.address, "token", Pulse(), told or Told(), limits)
    member.start()
    return member


def until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.01)


def test_a_healthy_gang_lives_and_ends_in_order() -> None:
    with hub(3) as gang:
        members = [join(gang, rank) for rank in (1, 2)]
        for member in members:
            member.pulse.rest("waiting for work")
        gang.pulse.rest("waiting for work")
        time.sleep(2.0)
        assert gang.told.why == []  # type: ignore[attr-defined]
        gang.end()
        for member in members:
            member._thread.join(3.0)
            assert not member._thread.is_alive() and member.why == ""


@pytest.mark.parametrize("stop", ["kill", "stop"])
def test_a_process_that_dies_or_is_stopped_is_named(stop: str) -> None:
    process = None
    told = Told()
    with hub(3, Limits(silent=1.0), lambda rank: "killed by signal 9" if process and process.poll() else "") as gang:
        other = join(gang, 2, told)
        process = subprocess.Popen([sys.executable, "-c", MEMBER, gang.address], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "there\n"
        until(lambda: 1 in gang._beats and gang._beats[1][0].phase == "loading")
        begun = time.monotonic()
        process.send_signal(9 if stop == "kill" else 19)
        why = gang.told.wait()  # type: ignore[attr-defined]
        assert time.monotonic() - begun < 5
        assert why.startswith("rank 1 of 3 died in loading (killed by signal 9)" if stop == "kill" else
                              "rank 1 of 3 stalled in loading: no sign of life")  # fmt: skip
        assert told.wait() == why, "all ranks hear the same sentence"
        process.kill()
        process.wait()
        process.stdout.close()
        other.end()


def waits(pulse: Pulse, stack: ExitStack) -> None:
    stack.enter_context(pulse.waiting())


@pytest.mark.parametrize(
    ("acts", "named"),
    [
        ([(2, waits), (2, waits), (2, None)], "rank 2 of 3 stalled in step 2: no progress for"),
        ([(2, None), (2, waits), (2, waits)], "rank 0 of 3 stalled in step 2: no progress for"),
        ([(3, waits), (2, None), (3, None)], "rank 1 of 3 stalled in step 2: no progress for"),
        ([(3, waits), (3, waits), (2, waits)], "rank 2 of 3 stalled in step 2: no progress for"),
        ([(2, waits), (2, waits), (2, waits)], "ranks 0, 1, 2 of 3 stalled in step 2: no progress for"),
    ],
    ids=["one works", "rank 0 works", "one is behind", "one waits elsewhere", "all wait"],
)
def test_the_rank_that_others_wait_for_is_the_one_that_hangs(acts: list[tuple[int, Any]], named: str) -> None:
    with hub(3) as gang, ExitStack() as stack:
        members = [join(gang, rank) for rank in (1, 2)]
        for pulse, (step, act) in zip([gang.pulse, *(m.pulse for m in members)], acts, strict=True):
            pulse.step(step)
            if act:
                act(pulse, stack)
        assert gang.told.wait().startswith(named)  # type: ignore[attr-defined]
        for member in members:
            member.end()


def test_one_that_goes_on_slowly_and_one_that_waits_for_it_are_left_alone() -> None:
    with hub(2) as gang:
        member = join(gang, 1)
        member.pulse.step(1)
        gang.pulse.step(1)
        with gang.pulse.waiting():
            for _ in range(8):  # which is longer than the limit
                time.sleep(0.2)
                member.pulse.on()
            assert gang.told.why == []  # type: ignore[attr-defined]
        member.end()


def test_what_may_take_long_at_the_start_may_not_while_the_gang_serves() -> None:
    with hub(2, FAST._replace(starting=30.0)) as gang:
        member = join(gang, 1)
        gang.pulse.rest("serving")
        time.sleep(1.2)
        assert gang.told.why == []  # type: ignore[attr-defined]
        gang.serving()
        assert gang.told.wait().startswith("rank 1 of 2 stalled in starting")  # type: ignore[attr-defined]
        member.end()


def test_a_rank_that_fails_says_why_to_all() -> None:
    told = Told()
    with hub(3) as gang:
        other = join(gang, 2, told)
        failing = join(gang, 1)
        failing.fail("rank 1 is out of memory")
        assert gang.told.wait() == told.wait() == "rank 1 is out of memory"  # type: ignore[attr-defined]
        other.end()
        failing.end()


def test_a_rank_that_fails_waits_until_the_loss_of_rank_0_is_told() -> None:
    """What lost rank 0 breaks here too; this rank must not be gone before it has said whose fault it is."""
    said = list[str]()

    def slowly(why: str) -> None:
        time.sleep(0.3)
        said.append(why)

    with subprocess.Popen([sys.executable, "-c", HUB], stdout=subprocess.PIPE, text=True) as lead:
        assert lead.stdout is not None
        address = lead.stdout.readline().strip()
        failing = Member(1, address, "token", Pulse(), slowly, FAST)
        failing.start()
        lead.kill()
        failing.fail("rank 1 failed: connection closed by peer")
    assert said == ["rank 0 died"]


def test_one_that_never_comes_is_missed() -> None:
    with hub(2) as gang:
        assert gang.told.wait().startswith("rank 1 of 2 did not come within")  # type: ignore[attr-defined]
    with hub(2, describe=lambda rank: "exit code 3") as gang:
        assert gang.told.wait() == "rank 1 of 2 died before it had begun (exit code 3)"  # type: ignore[attr-defined]


def test_strangers_are_not_ranks() -> None:
    with hub(2, FAST._replace(absent=1.0)) as gang:
        stranger = Member(1, gang.address, "guess", Pulse(), Told(), FAST)
        stranger.start()
        assert "did not come" in gang.told.wait()  # type: ignore[attr-defined]
        stranger.end()


def test_without_rank_0_the_others_end() -> None:
    told = Told()
    with hub(2) as gang:
        member = join(gang, 1, told)
        until(lambda: 1 in gang._lines)
        gang._lines[1].socket.shutdown(2)
        assert told.wait() == "rank 0 died"
        member.end()
