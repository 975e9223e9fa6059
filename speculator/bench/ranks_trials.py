"""`speculator bench ranks --starts N`: gangs that lose a rank while they start or serve, and how they end.

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
from pathlib import Path
from typing import Any, NamedTuple

from speculator.client import Client, Stopping
from speculator.errors import ConfigError, SpeculatorError
from speculator.ranks.faults import FAULTS, VARIABLE

LIMIT = 30.0  # seconds from the fault to the end of all processes
PHASES = {"load": ("target", 12), "head": ("head", 4), "capture": ("graphs", 8), "serving": ("a step", 40)}
READY = "listening on "


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

    fault: Fault
    seconds: float  # since the start
    code: int | None
    said: str
    status: str  # what a session heard, "" when none was open
    wrong: str


def random_faults(count: int, ranks: int, seed: int) -> Iterator[Fault]:
    """Faults of all kinds and phases in turn, on random ranks at random times."""
    generator = random.Random(seed)
    for i in range(count):
        when = list(PHASES)[i % len(PHASES)]
        kind = list(FAULTS)[(i // len(PHASES)) % len(FAULTS)]
        yield Fault(generator.randrange(ranks), when, generator.randint(1, PHASES[when][1]), kind)


def trial(command: Sequence[str], fault: Fault, limit: float = LIMIT) -> Ending:
    """Start a gang by `command` (which serves on a free port), break it, and see how it ends."""
    begun = time.monotonic()
    environ = {**os.environ, VARIABLE: fault.text}
    gang = subprocess.Popen(
        command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    said: list[str] = []
    reading = threading.Thread(target=_read, args=(gang.stderr, said), daemon=True)
    reading.start()
    patience = threading.Timer(3 * limit, os.killpg, (gang.pid, signal.SIGKILL))
    patience.start()
    status = _use(gang)
    patience.cancel()
    try:
        code: int | None = gang.wait(limit)
    except subprocess.TimeoutExpired:
        code = None
    if time.monotonic() - begun > 3 * limit:  # it had to be killed
        code = None
    reading.join(1.0)
    left = _left(gang.pid)
    sentences = [line for line in said if line.startswith("speculator: ")]
    wrong = _wrong(fault, code, sentences, status, left)
    return Ending(fault, time.monotonic() - begun, code, " | ".join(sentences), status, wrong)


def _read(stream: Any, lines: list[str]) -> None:
    with stream:
        lines.extend(line.rstrip("\n") for line in stream)


def _use(gang: subprocess.Popen[str]) -> str:
    """Generate on the gang, once it listens, until it is gone: the status that a session then gets."""
    assert gang.stdout is not None
    with gang.stdout:
        address = next((line.split(READY)[1].strip() for line in gang.stdout if READY in line), "")
        return _generate(address) if address else ""


def _generate(address: str) -> str:
    try:
        with Client(address, patience=0.0) as client:
            while True:
                for _ in client.generate([5, 6, 7, 8], stopping=Stopping(max_new_tokens=64)):
                    pass
    except SpeculatorError as error:
        return error.status


def _left(group: int) -> bool:
    """Whether a process of the gang is still there; it is killed."""
    for _ in range(40):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.05)
    os.killpg(group, signal.SIGKILL)
    return True


def _wrong(fault: Fault, code: int | None, said: Sequence[str], status: str, left: bool) -> str:
    if code is None or left:
        return "processes were left"
    if code == 0:
        return "it ended as if nothing had happened"
    if len(said) != 1 or f"rank {fault.rank}" not in said[0]:
        return f"{len(said)} sentences, wanted one that names rank {fault.rank}"
    return "" if status in ("", "UNAVAILABLE") else f"a session heard {status}"


def serve_command(target: Path, head: Path, ranks: int, stages: int = 1) -> list[str]:
    """A gang on this machine's CPU, with recorded passes; of `stages` times so many ranks."""
    sets = ["server.metrics_port=0", "engine.max_sessions=2", "engine.max_context=256", "graphs.rows=1",
            "graphs.prompt_tokens=16", "parallel.silent_s=4"]  # fmt: skip
    flags = ["--tensor-parallel", str(ranks), "--device", "cpu", "--port", "0", "--threads", "1"]
    flags += ["--graphs", "piecewise" if stages == 1 else "split", "--pipeline-parallel", str(stages)]
    models = ["--target", str(target), "--head", str(head), "--depth", "2"]
    return [sys.executable, "-m", "speculator", "serve", *flags, *models, *(x for s in sets for x in ("--set", s))]


def run_trials(command: Sequence[str], count: int, ranks: int, seed: int) -> list[Ending]:
    """`count` starts, each printed as it ends. ConfigError where faults would be of no kind."""
    if count < 1:
        raise ConfigError("--starts must be at least 1.")
    endings = []
    for fault in random_faults(count, ranks, seed):
        endings.append(trial(command, fault))
        ending = endings[-1]
        print(f"{fault.text:28} {ending.seconds:5.1f} s  {ending.wrong or 'clean'}: {ending.said}", flush=True)
    return endings
