"""The watch on a gang of ranks: one that dies or stalls ends all of them, with one sentence that names it.

Owns: a connection from every rank to rank 0, what travels on it, and the verdict. Must never import torch, and never
end a process itself: `lost` is told, once, on the watch's own thread, and decides. A process that is gone closes its
connection at once; one that is stopped falls silent; one whose device thread hangs beats on without going on, while the
others wait for it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import selectors
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

from speculator.ranks.pulse import Beat, Pulse, State

log = logging.getLogger(__name__)

BEAT_SECONDS = 0.25
LAST_WORDS = 0.2  # between saying something and hanging up: a closed line may swallow what was not read yet
SUSPICION = 0.5  # how long a rank that failed waits for the verdict: it may have failed because another one died
Lost = Callable[[str], None]
Message = dict[str, Any]


class Limits(NamedTuple):
    """After how many seconds a rank counts as lost."""

    silent: float = 10.0  # without any sign of life
    stalled: float = 15.0  # without going on while the gang serves: nothing computed, no collective passed
    starting: float = 60.0  # the same before, where a tensor read and a shape recorded are progress too
    absent: float = 120.0  # not there after the start


class Line:
    """One connection: messages as lines of JSON."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(2.0)
        self.socket, self._rest, self.heard = connection, b"", time.monotonic()

    def send(self, **message: Any) -> None:
        with contextlib.suppress(OSError):  # a line that is down is noticed where it is read
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[Message] | None:
        """What has arrived; None when the other end is gone."""
        try:
            data = self.socket.recv(65536)
        except TimeoutError:
            return []
        except OSError:
            return None
        if not data:
            return None
        self.heard = time.monotonic()
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.close()


class Watch(ABC):
    """What both ends share: a thread that looks around until the gang has ended, and tells `lost` at most once."""

    def __init__(self, pulse: Pulse, lost: Lost, limits: Limits) -> None:
        self.pulse, self.limits, self._told = pulse, limits, lost
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._main, name="gang", daemon=True)
        self.why = ""  # the gang was lost
        self._patience = self.limits.starting

    def start(self) -> None:
        self._thread.start()

    def serving(self) -> None:
        """From here on nothing takes as long as it may at the start."""
        self._patience = self.limits.stalled

    def _main(self) -> None:
        while not self._ended.is_set():
            self._look()
        self._leave()

    def end(self) -> None:
        """This rank ends in order; the watch with it."""
        with self._lock:
            self._ended.set()
        if self._thread.ident is not None and threading.current_thread() is not self._thread:
            self._thread.join(2.0)

    @abstractmethod
    def _look(self) -> None:
        """Hear and judge, for a moment."""

    @abstractmethod
    def _leave(self) -> None:
        """The last thing that the thread does."""

    def _lose(self, why: str) -> None:
        with self._lock:
            if self._ended.is_set():
                return
            self._ended.set()
        self.why = why
        self._announce(why)
        self._told(why)

    def _announce(self, why: str) -> None:
        """Tell the other ranks, where that is this end's task."""
        return None


class Hub(Watch):
    """Rank 0's end: listens at `address`, where a rank says who it is and the `token` that proves it.

    `describe` may know more of how a rank's process ended ("" where nothing), also of one that never came.
    """

    def __init__(
        self,
        size: int,
        pulse: Pulse,
        lost: Lost,
        token: str,
        *,
        host: str = "127.0.0.1",
        describe: Callable[[int], str] = lambda rank: "",
        limits: Limits | None = None,
    ) -> None:
        super().__init__(pulse, lost, limits or Limits())
        self.size, self._token, self._describe = size, token, describe
        self._listener = socket.create_server((host, 0))
        self.address = f"{host}:{self._listener.getsockname()[1]}"
        self._begun = time.monotonic()
        self._lines: dict[int, Line] = {}
        self._beats: dict[int, tuple[Beat, float]] = {}
        self._suspect: tuple[str, float] | None = None  # what a rank that failed says
        self._events = selectors.DefaultSelector()
        self._events.register(self._listener, selectors.EVENT_READ)
        self._next = 0.0

    def fail(self, why: str) -> str:
        """Rank 0 itself cannot go on; why the gang ends, which may be the loss of another rank."""
        time.sleep(2 * SUSPICION)
        self._lose(why)
        return self.why

    def _look(self) -> None:
        for key, _ in self._events.select(BEAT_SECONDS):
            if key.fileobj is self._listener:
                self._greet()
            else:
                self._hear(key.data)
        self._judge()

    def _greet(self) -> None:
        with contextlib.suppress(OSError):
            line = Line(self._listener.accept()[0])
            self._events.register(line.socket, selectors.EVENT_READ, line)

    def _hear(self, line: Line) -> None:
        messages = line.receive()
        rank = next((rank for rank, held in self._lines.items() if held is line), None)
        for message in messages or ():
            rank = self._take(rank, line, message)
        if messages is None:
            self._drop(rank, line)

    def _take(self, rank: int | None, line: Line, message: Message) -> int | None:
        if "rank" in message and message.get("token") == self._token:
            rank = int(message["rank"])
            self._lines[rank] = line
        elif rank is not None and "beat" in message:
            self._beats[rank] = Beat(*message["beat"]), time.monotonic()
        elif rank is not None and "failed" in message:
            self._suspect = self._suspect or (str(message["failed"]), time.monotonic())
        return rank

    def _drop(self, rank: int | None, line: Line) -> None:
        self._events.unregister(line.socket)
        line.close()
        if rank is not None and self._suspect and self._suspect[0].startswith(f"rank {rank} "):
            self._lose(self._suspect[0])
        elif rank is not None:
            more = self._why_ended(rank)
            self._lose(f"rank {rank} of {self.size} died {self._where(rank)}{more}")

    def _why_ended(self, rank: int) -> str:
        """Asked for a moment: a connection closes before the process can be waited for."""
        for _ in range(10):
            if text := self._describe(rank):
                return f" ({text})"
            time.sleep(0.02)
        return ""

    def _where(self, rank: int) -> str:
        held = self._beats.get(rank)
        return f"in {held[0].phase}" if held else "before it had begun"

    def _judge(self) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + BEAT_SECONDS
        for line in self._lines.values():
            line.send(alive=True)
        for rank in range(1, self.size):
            why = self._missing(rank, now) if rank not in self._lines else self._silent(rank, now)
            if why:
                self._lose(why)
                return
        if self._suspect and now - self._suspect[1] > SUSPICION:
            self._lose(self._suspect[0])
        elif len(self._lines) == self.size - 1 and (hung := self._hung(now)):
            self._lose(hung)

    def _missing(self, rank: int, now: float) -> str:
        if text := self._describe(rank):
            return f"rank {rank} of {self.size} died before it had begun ({text})"
        waited = now - self._begun
        return f"rank {rank} of {self.size} did not come within {waited:.0f} s" if waited > self.limits.absent else ""

    def _silent(self, rank: int, now: float) -> str:
        silence = now - self._lines[rank].heard
        if silence <= self.limits.silent:
            return ""
        return f"rank {rank} of {self.size} stalled {self._where(rank)}: no sign of life for {silence:.0f} s"

    def _hung(self, now: float) -> str:
        """The ranks that others wait for in vain: who work and do not go on, or, if none works, who are behind."""
        beats = {0: self.pulse.beat}
        beats |= {rank: beat._replace(seconds=beat.seconds + now - at) for rank, (beat, at) in self._beats.items()}
        late = {rank: beat for rank, beat in beats.items() if beat.seconds > self._patience}
        blamed = {rank: beat for rank, beat in late.items() if beat.state == State.WORKS}
        if not blamed and len(late) == self.size and any(beat.state == State.WAITS for beat in late.values()):
            blamed = late
        return self._stalled(blamed) if blamed else ""

    def _stalled(self, blamed: dict[int, Beat]) -> str:
        least = min(beat.step for beat in blamed.values())
        who = [rank for rank, beat in blamed.items() if beat.step == least]
        ranks = f"rank {who[0]} of {self.size}" if len(who) == 1 else f"ranks {', '.join(map(str, who))} of {self.size}"
        beat = blamed[who[0]]
        return f"{ranks} stalled in {beat.phase}: no progress for {beat.seconds:.0f} s"

    def _announce(self, why: str) -> None:
        for line in self._lines.values():
            line.send(lost=why)
        time.sleep(LAST_WORDS)

    def _leave(self) -> None:
        if not self.why:
            for line in self._lines.values():
                line.send(end=True)
            time.sleep(LAST_WORDS)
        for key in list(self._events.get_map().values()):
            if key.data is not None:
                key.data.close()
        self._listener.close()
        self._events.close()


class Member(Watch):
    """Another rank's end. ConnectionError when rank 0 cannot be reached."""

    def __init__(self, rank: int, address: str, token: str, pulse: Pulse, lost: Lost, limits: Limits | None = None):
        super().__init__(pulse, lost, limits or Limits())
        host, _, port = address.rpartition(":")
        self.rank, self.told = rank, False  # told: rank 0 said that the gang is lost
        self._line = Line(socket.create_connection((host, int(port)), timeout=10.0))
        self._line.socket.settimeout(BEAT_SECONDS)
        self._line.send(rank=rank, token=token)
        self._next = 0.0

    def fail(self, why: str) -> None:
        """Tell rank 0 that this rank cannot go on, and wait a moment for its word, or for that on its own loss."""
        self._line.send(failed=why)
        self._thread.join(2.0)  # which has heard the verdict, and told it, when it ends

    def _look(self) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + BEAT_SECONDS
            self._line.send(beat=list(self.pulse.beat))
        messages = self._line.receive()
        if messages is None:
            self._lose("rank 0 died")
        for message in messages or ():
            self._take(message)
        if now - self._line.heard > self.limits.silent:
            self._lose(f"rank 0 stalled: no sign of life for {now - self._line.heard:.0f} s")

    def _take(self, message: Message) -> None:
        if "end" in message:
            self.end()
        elif "lost" in message:
            self.told = True
            self._lose(str(message["lost"]))

    def _leave(self) -> None:
        self._line.close()
