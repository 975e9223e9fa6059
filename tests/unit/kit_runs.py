"""Runs of the conformance kit in a process of their own, as users run it, from a folder outside this project."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.unit.ranks import PRELOADED

THIRD_PARTY = Path(__file__).resolve().parents[1] / "thirdparty"
INSTALLED = any(point.value == "graphs.conformance.entry" for point in entry_points(group="pytest11"))
# where the project is used without being installed, pytest does not find the kit by itself
ENTRY = () if INSTALLED else ("-p", "graphs.conformance.entry")
OPTIONS = (*ENTRY, *"-p no:cacheprovider -p no:asyncio -p no:hypothesispytest -rsf".split())


class KitRun(NamedTuple):
    """What came of it: pytest's exit status, what it printed, and each test's outcome."""

    status: int
    text: str
    outcomes: dict[str, str]

    def named(self, outcome: str) -> set[str]:
        """Tests with this outcome, parameters left out."""
        return {re.sub(r"\[.*", "", test) for test, found in self.outcomes.items() if found == outcome}

    def count(self, outcome: str) -> int:
        return list(self.outcomes.values()).count(outcome)


class Outcomes(dict[str, str]):
    """A pytest plugin: the outcome of every test by its name."""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.skipped or report.failed:
            self[report.nodeid.split("::")[-1]] = report.outcome


def run_kit(folder: Path, *arguments: str, limit: float = 120.0) -> KitRun:
    """`pytest --pyargs graphs.conformance` with these arguments."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    folder.mkdir(parents=True, exist_ok=True)
    process = context.Process(target=_child, args=(folder, arguments))
    process.start()
    process.join(limit)
    assert not process.is_alive(), f"the kit still runs after {limit} seconds"
    return KitRun(**json.loads((folder / "run.json").read_text()))


def _child(folder: Path, arguments: Sequence[str]) -> None:
    os.chdir(folder)
    sys.path.insert(0, str(THIRD_PARTY))
    outcomes = Outcomes()
    given: list[Any] = [*OPTIONS, "--pyargs", "graphs.conformance", *arguments]
    with open("printed", "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        status = int(pytest.main(given, plugins=[outcomes]))
    run = KitRun(status, Path("printed").read_text(), dict(outcomes))
    Path("run.json").write_text(json.dumps(run._asdict()))
