"""Starts the ranks of one machine, and reads where a rank stands from its environment.

Owns: the variables (those of torch's `env://`, so torchrun and others can start ranks too) and the child processes.
Must never import torch.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

from speculator.errors import ConfigError

ADDRESS, TOKEN, LEADER = "SPECULATOR_GANG", "SPECULATOR_GANG_TOKEN", "SPECULATOR_GANG_PID"
KILLED = 2.0  # seconds for a process that was killed to be gone


class Place(NamedTuple):
    """Where a process stands among the ranks; `local` numbers those of one machine."""

    rank: int
    size: int
    local: int

    @classmethod
    def of(cls, environ: Mapping[str, str], wanted: int) -> Place | None:
        """None when nobody started ranks. ConfigError when it is none of as many as the configuration wants."""
        if "RANK" not in environ or "WORLD_SIZE" not in environ:
            return None
        said = {name: environ.get(name, environ["RANK"]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        if wrong := [f"{name}={value}" for name, value in said.items() if not value.isdecimal()]:
            raise ConfigError(f"ranks are counted by whole numbers, not by {wrong[0]}")
        place = cls(*map(int, said.values()))
        if place.size != wanted:
            raise ConfigError(f"{place.size} ranks were started (WORLD_SIZE), but the configuration wants {wanted}")
        if place.rank >= place.size:
            raise ConfigError(f"RANK={place.rank} is none of {place.size} ranks (WORLD_SIZE), which are counted from 0")
        if place.size > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= set(environ):
            raise ConfigError("ranks that were started by env:// need MASTER_ADDR and MASTER_PORT")
        return place


def variables(size: int, address: str, token: str) -> dict[str, str]:
    """What the ranks of this machine share."""
    own = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    interface = {} if "GLOO_SOCKET_IFNAME" in os.environ else {"GLOO_SOCKET_IFNAME": "lo"}
    return {**own, **interface, ADDRESS: address, TOKEN: token, LEADER: str(os.getpid())}


def kill_leader() -> None:
    """Kill rank 0, where it started this process and is still there: it may hang instead of being gone."""
    if os.environ.get(LEADER) == str(os.getppid()):
        os.kill(os.getppid(), signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Children:
    """Ranks 1 and on as processes of the same command; this process is rank 0."""

    def __init__(self) -> None:
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, command: Sequence[str], shared: Mapping[str, str]) -> None:
        for rank in range(1, int(shared["WORLD_SIZE"])):
            environ = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            self._processes[rank] = subprocess.Popen(
                command, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
            )

    def describe(self, rank: int) -> str:
        """How a rank's process ended; "" while it runs."""
        process = self._processes.get(rank)
        code = None if process is None else process.poll()
        if code is None:
            return ""
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def end(self, patience: float) -> None:
        """Wait for all, then kill who is left."""
        for process in self._processes.values():
            try:
                process.wait(patience)
            except subprocess.TimeoutExpired:
                patience = 0.0
        self.kill()

    def kill(self) -> None:
        for process in self._processes.values():
            if process.poll() is None:
                process.kill()
                with suppress(subprocess.TimeoutExpired):  # a driver may hold it for a while
                    process.wait(KILLED)


def own_command() -> list[str]:
    """The command that this process runs."""
    return [sys.executable, "-m", "speculator", *sys.argv[1:]]
