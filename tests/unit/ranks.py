"""Programs run as several processes over gloo, with a limit after which whoever is left counts as hung."""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

Program = Callable[..., Any]  # program(rank, *arguments) -> what json can hold


# One server imports all this, and processes are forks of it: starting one costs milliseconds instead of seconds.
PRELOADED = ["torch", "torch.distributed", "torch._dynamo", "tests.unit.ranks"]


LAST_WORDS = 5.0  # seconds before a rank is killed


class Ending(NamedTuple):
    """How one rank ended: what it returned, or the name and text of what it raised; `hung` when it had to be killed."""

    value: Any = None
    error: str = ""
    text: str = ""
    hung: bool = False


def run_ranks(
    program: Program, size: int, folder: Path, *arguments: Any, limit: float = 20.0, afresh: bool = False
) -> list[Ending]:
    """Run `program` on `size` ranks of one gloo group; ranks still running after `limit` seconds are killed.

    Shortly before they say where they are. `afresh` is for GPUs: a fork may inherit a driver that it cannot use.
    """
    context: Any = multiprocessing.get_context("spawn" if afresh else "forkserver")
    if not afresh:
        context.set_forkserver_preload(PRELOADED)
    folder.mkdir(parents=True, exist_ok=True)
    given = (size, folder, arguments, limit)
    ranks = [context.Process(target=_rank, args=(program, rank, *given)) for rank in range(size)]
    for process in ranks:
        process.start()
    _join(ranks, time.monotonic() + limit)
    return [_ending(process, folder / f"{rank}.json") for rank, process in enumerate(ranks)]


def _join(ranks: Sequence[Any], deadline: float) -> None:
    for process in ranks:
        process.join(max(deadline - time.monotonic(), 0))


def _ending(process: Any, report: Path) -> Ending:
    hung = process.is_alive()
    if hung:
        process.kill()
        process.join()
    return Ending(**json.loads(report.read_text())) if report.exists() else Ending(hung=hung)


def _rank(program: Program, rank: int, size: int, folder: Path, arguments: Sequence[Any], limit: float) -> None:
    if limit > 2 * LAST_WORDS:
        faulthandler.dump_traceback_later(limit - LAST_WORDS)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(str(folder / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    try:
        ending = Ending(value=program(rank, *arguments))
    except Exception as error:
        ending = Ending(error=type(error).__name__, text=str(error))
    (folder / f"{rank}.json").write_text(json.dumps(ending._asdict()))
    os._exit(0)  # without the farewell of the process group, which waits for ranks that are gone
