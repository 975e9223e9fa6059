"""The runner of GPU tests and benchmarks, with jobs that need no GPU."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from tests.gpu.everything import SHARE, Board, Job, jobs


def python(name: str, text: str, seconds: int = 20, devices: int = 0) -> Job:
    return Job(name, (sys.executable, "-c", text), seconds, devices)


def board(tmp_path: Path, *waiting: Job, seconds: float = 60, devices: int = 2) -> Board:
    return Board(waiting, range(devices), tmp_path, time.monotonic() + seconds, SHARE)


def test_each_job_has_its_log_and_failures_count(tmp_path: Path) -> None:
    show = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"
    run = board(
        tmp_path, python("a", show, devices=1), python("b", show, devices=1), python("c", "raise SystemExit(3)")
    )
    assert run.run() == 1
    assert {(tmp_path / f"{name}.txt").read_text() for name in "ab"} == {"0\n", "1\n"}, "a device each"
    assert "c: exit 3" in (tmp_path / "summary.txt").read_text()


def test_what_takes_too_long_is_ended_and_keeps_what_it_wrote(tmp_path: Path) -> None:
    slow = "import time; print('began', flush=True); time.sleep(60)"
    assert board(tmp_path, python("slow", slow, seconds=2)).run() == 1
    assert (tmp_path / "slow.txt").read_text() == "began\n"
    assert "slow: ended for its time" in (tmp_path / "summary.txt").read_text()


def test_what_cannot_start_in_time_or_anywhere_is_named(tmp_path: Path) -> None:
    first, second = python("first", "import time; time.sleep(60)", devices=1), python("second", "", devices=1)
    assert board(tmp_path, first, second, python("wide", "", devices=4), seconds=2, devices=1).run() == 2
    said = (tmp_path / "summary.txt").read_text()
    assert "not started: second" in said and "wide: left out, needs 4 devices" in said


def test_every_gpu_test_file_is_a_job(tmp_path: Path) -> None:
    names = [job.name for job in jobs(tmp_path)]
    assert len(names) == len(set(names))
    assert {"bench_graphs", "bench_graphs_8b", "bench_mla"} <= set(names)
    assert {path.stem for path in Path(__file__).parents[1].glob("gpu/test_*_gpu.py")} <= set(names)
