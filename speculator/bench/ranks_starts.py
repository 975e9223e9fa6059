"""`speculator bench ranks --starts N`: many start-ups of gangs that lose a rank, or none, as a table and a report.

Owns: which start is broken how, and what a run of them adds up to. Must never judge a single end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from speculator.bench.provenance import provenance
from speculator.bench.ranks_pair import write_pair
from speculator.bench.ranks_trials import LIMIT, Ending, Fault, random_faults, serve_command, trial
from speculator.errors import ConfigError

CLEAN = 10  # one start in so many is left alone
MODES = ("piecewise", "round")


class Start(NamedTuple):
    """One start-up; `fault` None is left alone."""

    ranks: int
    graphs: str
    fault: Fault | None


class Cell(NamedTuple):
    """All starts of one phase and kind."""

    when: str
    kind: str
    starts: int
    slowest: float  # seconds
    wrong: int


def plan(count: int, sizes: Sequence[int], seed: int) -> Iterator[Start]:
    """`count` starts over gangs of `sizes` and both ways of recording. ConfigError where there is nothing to break."""
    if count < 1:
        raise ConfigError("--starts must be at least 1.")
    if not sizes:
        raise ConfigError("--starts needs --ranks of 2 or more: one rank alone loses none.")
    faults = {size: random_faults(count, size, seed + size) for size in sizes}
    for i in range(count):
        size, graphs = sizes[i % len(sizes)], MODES[(i // len(sizes)) % len(MODES)]
        yield Start(size, graphs, None if i % CLEAN == CLEAN - 1 else next(faults[size]))


def run_starts(count: int, sizes: Sequence[int], seed: int, device: str) -> dict[str, Any]:
    """The whole report; each start is printed as it ends."""
    starts, endings = list(plan(count, sizes, seed)), list[Ending]()
    with TemporaryDirectory() as folder:
        target, head = write_pair(Path(folder))[1:]
        for number, start in enumerate(starts, 1):
            endings.append(trial(serve_command(target, head, start.ranks, device, start.graphs), start.fault))
            print(f"{number:3} {_line(start, endings[-1])}", flush=True)
    return report(starts, endings, device)


def _line(start: Start, ending: Ending) -> str:
    what = start.fault.text if start.fault else "left alone"
    how = f"{ending.seconds:5.1f} s of {ending.whole:5.1f}  {ending.wrong or 'clean'}"
    return f"{start.ranks} ranks, {start.graphs:9} {what:28} {how} {ending.said}".rstrip()


def report(starts: Sequence[Start], endings: Sequence[Ending], device: str) -> dict[str, Any]:
    """Every start and the table of them."""
    cells = [cell._asdict() for cell in table(endings)]
    rows = [_row(start, ending) for start, ending in zip(starts, endings, strict=True)]
    wrong = sum(bool(ending.wrong) for ending in endings)
    says = "random models; seconds run from the fault, or from SIGTERM, until the last process of the gang was gone"
    return {"bench": "ranks starts", "says": says, "device": device, "limit_s": LIMIT, "wrong": wrong,
            "slowest_s": max(cell["slowest"] for cell in cells), "provenance": provenance(), "table": cells,
            "starts": rows}  # fmt: skip


def table(endings: Sequence[Ending]) -> list[Cell]:
    """By phase and kind, in the order in which they first came."""
    groups: dict[tuple[str, str], list[Ending]] = {}
    for ending in endings:
        key = (ending.fault.when, ending.fault.kind) if ending.fault else ("all", "left alone")
        groups.setdefault(key, []).append(ending)
    return [_cell(*key, group) for key, group in groups.items()]


def _cell(when: str, kind: str, group: Sequence[Ending]) -> Cell:
    slowest = round(max(ending.seconds for ending in group), 2)
    return Cell(when, kind, len(group), slowest, sum(bool(ending.wrong) for ending in group))


def _row(start: Start, ending: Ending) -> dict[str, Any]:
    fault = start.fault._asdict() if start.fault else None
    seconds = {"seconds": round(ending.seconds, 2), "whole_s": round(ending.whole, 2)}
    said = {"code": ending.code, "said": ending.said, "status": ending.status, "wrong": ending.wrong}
    return {"ranks": start.ranks, "graphs": start.graphs, "fault": fault, **seconds, **said}


def show(found: dict[str, Any]) -> None:
    """The table on a terminal."""
    print(f"{'phase':10} {'kind':11} {'starts':>6} {'slowest end':>12} {'wrong':>6}")
    for cell in found["table"]:
        print(f"{cell['when']:10} {cell['kind']:11} {cell['starts']:6} {cell['slowest']:10.2f} s {cell['wrong']:6}")
    print(f"{len(found['starts'])} starts, {found['wrong']} wrong ends, the slowest took {found['slowest_s']:.1f} s")
