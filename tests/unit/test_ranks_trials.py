"""What counts as a clean end of a gang: shell scripts that end in other ways are found out."""

from __future__ import annotations

import pytest

from speculator.bench.ranks_trials import Fault, trial

NOW = "echo 'fault now: rank 1, kill in target' >&2"
NAMED = "echo 'speculator: rank 1 of 2 died in target; all ranks end' >&2"
LOAD, SERVING = Fault(1, "load", 3, "kill"), Fault(1, "serving", 3, "kill")


@pytest.mark.parametrize(
    ("script", "fault", "wrong"),
    [
        (f"{NOW}; {NAMED}; exit 1", LOAD, ""),
        (f"{NOW}; {NAMED}; exit 0", LOAD, "it ended as if nothing had happened"),
        (f"{NOW}; exit 1", LOAD, "0 sentences, wanted one that names rank 1"),
        (f"{NOW}; {NAMED}; {NAMED}; exit 1", LOAD, "2 sentences, wanted one that names rank 1"),
        (f"{NOW}; {NAMED}; exit 1", LOAD._replace(rank=0), "1 sentences, wanted one that names rank 0"),
        (f"{NAMED}; exit 1", LOAD, "the fault never came"),
        (f"{NOW}; {NAMED}; sleep 60 >/dev/null 2>&1 & {NOW}; {NAMED}; exit 1", LOAD, "processes were left"),
        (f"{NOW}; {NAMED}; sleep 60", LOAD, "processes were left"),
        (f"{NOW}; sleep 0.8; {NAMED}; exit 1", LOAD, "it took 1 s"),
        (f"{NOW}; {NAMED}; exit 1", SERVING, "a session heard nothing"),
        ("exit 1", None, "no clean start: code 1, "),
        ("exit 0", None, "no clean start: code 0, "),
    ],
)
def test_ends_that_are_not_clean_are_found_out(script: str, fault: Fault | None, wrong: str) -> None:
    ending = trial(["sh", "-c", script], fault, limit=0.6)
    assert ending.wrong == wrong, ending
    assert ending.whole >= ending.seconds >= 0
