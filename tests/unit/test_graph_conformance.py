"""The conformance kit against a backend of somebody else: right ones pass, each broken one fails where it should."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.kit_runs import OPTIONS, THIRD_PARTY, run_kit

TWINS = "test_a_broken_twin_is_rejected"
TREES = "test_trees_see_their_ancestors_alone"
LAZY, REFRESH = "nothing in this backend is initialised on first use", "this backend's refresh does nothing"


def name(variant: str) -> str:
    return variant if ":" in variant else f"lazyattention.backend:{variant}"


@pytest.mark.parametrize(
    ("variant", "skipped", "reasons"),
    [
        ("Heads", {}, []),
        ("Latent", {TREES: 3}, ["it has no trees"]),
        ("Planless", {TWINS: 5}, [LAZY, REFRESH]),
        ("Eager", {TWINS: 3}, [LAZY]),
        ("OnTheHost", {TWINS: 3}, [LAZY]),
        ("Declared", {}, []),
        ("tests.unit.kit_backends:Sdpa", {}, []),
        ("tests.unit.kit_backends:Mla", {}, []),
    ],
)
def test_right_backends_pass(variant: str, skipped: dict[str, int], reasons: list[str], tmp_path: Path) -> None:
    """A test is skipped only where the backend cannot show what it is about, and says so."""
    run = run_kit(tmp_path, "--backend", name(variant))
    assert run.status == 0, run.text
    assert run.named("skipped") == set(skipped) and run.count("skipped") == sum(skipped.values())
    assert run.count("passed") > 40
    assert all(reason in run.text for reason in reasons)


@pytest.mark.parametrize(
    ("variant", "test", "told"),
    [
        ("SharesMetadata", "test_r1_states_share_nothing", "R1 is broken: .*plan.metadata is plan.metadata"),
        ("SharesMetadata", "test_r1_a_pass_recorded_after_a_warm_up", "recorded after a warm-up gives other numbers"),
        (
            "SharesMetadata",
            "test_r1_a_pass_run_after_a_recording",
            "R1 is broken: .*after one of its shape was recorded",
        ),
        ("SharesMetadata", "test_r1_two_recordings_of_one_shape", "R1 is broken: .*the second of two recordings"),
        ("BorrowsBuffers", "test_r2_states_keep_their_contents", "R2 is broken: .*after states of other shapes"),
        ("CountsInPlace", "test_r2_passes_leave_their_inputs", "R2 is broken: .*`context` is not what it was"),
        (
            "CopiesLengths",
            "test_r3_replays_read_what_was_refreshed",
            r"R3 is broken: .*recorded at lengths \(5, 0, 12\)",
        ),
        ("NarrowsTheTable", "test_r4_host_decisions_hold", "R4 is broken: .*recorded where the longest row is 13"),
        ("ForgetsToRefresh", "test_r5_eager_steps_see_each_other", "R5 is broken: .*draft step 2 after a refresh"),
        (
            "ForgetsToRefresh",
            "test_r5_recorded_steps_see_each_other",
            "R5 is broken: .*step 2 of a recorded draft loop",
        ),
        ("Lagging", "test_r5_recorded_steps_see_each_other", "R5 is broken: .* of a recorded draft loop"),
        ("Hopeful", "test_r5_recorded_steps_see_each_other", "CaptureError: .*on the host"),
        ("ReadsTheHost", "test_r5_replays_in_turn", "CaptureError: .*reads a value on the host"),
        ("ReadsUnused", "test_the_longest_rows", "the numbers are wrong, NaN or infinite in layer 0"),
        ("OffByOne", "test_lengths_around_page_borders", r"the numbers are wrong, .* pages of 16, contexts \[0, 1, 15"),
    ],
)
def test_each_mistake_fails_the_test_that_is_about_it(variant: str, test: str, told: str, tmp_path: Path) -> None:
    run = run_kit(tmp_path, "--backend", name(variant), "-k", test)
    assert run.status == 1 and run.named("failed") == {test}
    assert re.search(told, run.text.replace("\n", " ")), run.text
    assert "Traceback" not in run.text and "site-packages" not in run.text
    assert f"start with test_{'numbers' if 'numbers are' in told else 'rules'}.py::{test}" in run.text


def test_a_subtle_mistake_fails_nothing_else(tmp_path: Path) -> None:
    run = run_kit(tmp_path, "--backend", name("BorrowsBuffers"), "-k", "not broken_twin")
    assert run.named("failed") == {"test_r2_states_keep_their_contents"} and run.count("passed") > 30


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "name the backend to test: pytest --pyargs graphs.conformance --backend package.module:Backend"),
        (["--backend", "lazyattention.backend"], "name the backend to test"),
        (["--backend", "nowhere:Backend"], "--backend nowhere:Backend: No module named 'nowhere'"),
        (["--backend", name("Missing")], "has no attribute 'Missing'"),
        (["--backend", name("Heads"), "--device", "abacus"], "--device is cpu or cuda, got abacus"),
    ],
)
def test_wrong_options_are_one_sentence(arguments: list[str], told: str, tmp_path: Path) -> None:
    run = run_kit(tmp_path, *arguments)
    assert run.status == 4 and told in run.text and run.text.count("\n") < 4


def test_the_kit_runs_from_anywhere(tmp_path: Path) -> None:
    """As users start it: a new process, in a folder that knows nothing of this project."""
    project = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(project), str(THIRD_PARTY)])
    command = [sys.executable, "-m", "pytest", *OPTIONS, "--pyargs", "graphs.conformance", "-k", "r1 or r3"]
    done = subprocess.run(
        [*command, "--backend", name("Heads")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "failed" not in done.stdout
