"""One start-up of a gang of ranks that is broken on purpose, or left alone, and how it ends.

Owns: what is broken when, and what counts as a clean end: every process gone within the limit, one sentence that names
the rank, sessions that hear UNAVAILABLE. Must never import torch.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from speculator.client import Client, Stopping
from speculator.errors import SpeculatorError
from speculator.ranks.faults import FAULTS, NOW, VARIABLE

LIMIT = 30.0  # seconds from the fault to the end of all processes
PATIENCE = 3  # limits that a start may take in all
# phase -> what ranks call it, how often at most it is entered before the fault
PHASES = {
    "meeting": ("meeting", 1),
    "load": ("target|head", 50),
    "warm-up": ("warm-up", 10),
    "capture": ("graphs", 10),
    "serving": ("step", 40),
}
SERVING = "serving"
READY = "listening on "
TOKENS = 64


class Fault(NamedTuple):
    """What goes wrong: `kind` on `rank`, at the given time of a phase."""

    rank: int
    when: str
    times: int
    kind: str

    @property
    def text(self) -> str:
        return f"{self.rank}:{PHASES[self.when][0]}:{self.times}:{self.kind}"


class Ending(NamedTuple):
    """How a gang ended; `wrong` is empty where it was clean."""

    fault: Fault | None
    seconds: float  # from the fault, or from being told to go, until every process was gone
    whole: float  # since the start
    code: int | None
    said: str
    status: str  # what a session heard, "" when none was open
    wrong: str


class Heard:
    """What a gang says on stderr, and when its fault came."""

    def __init__(self, stream: Any) -> None:
        self.sentences, self.fault_at = list[str](), 0.0
        self._thread = threading.Thread(target=self._read, args=(stream,), daemon=True)
        self._thread.start()

    def _read(self, stream: Any) -> None:
        with stream:
            for line in stream:
                if line.startswith(NOW):
                    self.fault_at = time.monotonic()
                elif line.startswith("speculator: "):
                    self.sentences.append(line.rstrip("\n"))

    def end(self) -> None:
        self._thread.join(1.0)


def random_faults(count: int, ranks: int, seed: int) -> Iterator[Fault]:
    """Faults of all kinds and phases in turn, on random ranks at random times."""
    generator = random.Random(seed)
    for i in range(count):
        when = list(PHASES)[i % len(PHASES)]
        kind = list(FAULTS)[(i // len(PHASES)) % len(FAULTS)]
        yield Fault(generator.randrange(ranks), when, generator.randint(1, PHASES[when][1]), kind)


def trial(command: Sequence[str], fault: Fault | None, limit: float = LIMIT) -> Ending:
    """Start a gang by `command` (which serves on a free port), break it or tell it to go, and see how it ends."""
    begun = time.monotonic()
    with _gang(command, fault, PATIENCE * limit) as (gang, heard):
        status = _use(gang, once=fault is None)
        told = time.monotonic()
        code = _wait(gang, limit)
        left = _left(gang.pid, limit)
        ended = time.monotonic()
    seconds = max(0.0, ended - (told if fault is None else heard.fault_at or ended))
    hung = left or ended - begun > PATIENCE * limit
    wrong = _wrong(fault, None if hung else code, heard, status) or _late(seconds, limit)
    return Ending(fault, seconds, ended - begun, code, " | ".join(heard.sentences), status, wrong)


@contextmanager
def _gang(
    command: Sequence[str], fault: Fault | None, patience: float
) -> Iterator[tuple[subprocess.Popen[str], Heard]]:
    """A process group of its own, which is killed after so many seconds, and in any case at the end."""
    environ = {**os.environ, VARIABLE: fault.text if fault else ""}
    gang = subprocess.Popen(
        command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    heard, timer = Heard(gang.stderr), threading.Timer(patience, _kill, (gang.pid,))
    timer.start()
    try:
        yield gang, heard
    finally:
        timer.cancel()
        _kill(gang.pid)
        heard.end()


def _wait(gang: subprocess.Popen[str], limit: float) -> int | None:
    try:
        return gang.wait(limit)
    except subprocess.TimeoutExpired:
        return None


def _use(gang: subprocess.Popen[str], once: bool) -> str:
    """Generate on the gang, once it listens, until it is gone or `once`: the status that a session then gets."""
    assert gang.stdout is not None
    with gang.stdout:
        address = next((line.split(READY)[1].strip() for line in gang.stdout if READY in line), "")
        status = _generate(address, once) if address else ""
        if once:
            gang.terminate()
        return status


def _generate(address: str, once: bool) -> str:
    try:
        with Client(address, patience=0.0) as client:
            while True:
                for _ in client.generate([5, 6, 7, 8], stopping=Stopping(max_new_tokens=TOKENS)):
                    pass
                if once:
                    return "OK"
    except SpeculatorError as error:
        return error.status


def _kill(group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _left(group: int, limit: float) -> bool:
    """Whether a process of the gang is still there after so many seconds; it is killed."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.02)
    _kill(group)
    return True


def _wrong(fault: Fault | None, code: int | None, heard: Heard, status: str) -> str:
    """What is not clean; `code` None is a gang that had to be killed, all or in part."""
    if code is None:
        return "processes were left"
    if fault is None:
        return "" if (code, status, heard.sentences) == (0, "OK", []) else f"no clean start: code {code}, {status}"
    if not heard.fault_at:
        return "the fault never came"
    if code == 0:
        return "it ended as if nothing had happened"
    if len(heard.sentences) != 1 or f"rank {fault.rank}" not in heard.sentences[0]:
        return f"{len(heard.sentences)} sentences, wanted one that names rank {fault.rank}"
    wanted = ("UNAVAILABLE",) if fault.when == SERVING else ("", "UNAVAILABLE")
    return "" if status in wanted else f"a session heard {status or 'nothing'}"


def _late(seconds: float, limit: float) -> str:
    return f"it took {seconds:.0f} s" if seconds > limit else ""


def serve_command(
    target: Path, head: Path, ranks: int, device: str = "cpu", graphs: str = "piecewise", stages: int = 1
) -> list[str]:
    """A gang on this machine, with recorded passes; of `stages` times so many ranks."""
    sets = ["server.metrics_port=0", "engine.max_sessions=2", "engine.max_context=256", "graphs.rows=1",
            "graphs.prompt_tokens=16", "parallel.silent_s=4", "parallel.stalled_s=10",
            "parallel.starting_s=20", "policy.mode=off"]  # fmt: skip
    flags = ["--tensor-parallel", str(ranks), "--device", device, "--port", "0", "--threads", "1"]
    flags += ["--graphs", graphs if stages == 1 else "split", "--pipeline-parallel", str(stages)]
    models = ["--target", str(target), "--head", str(head), "--depth", "2"]
    return [sys.executable, "-m", "speculator", "serve", *flags, *models, *(x for s in sets for x in ("--set", s))]
