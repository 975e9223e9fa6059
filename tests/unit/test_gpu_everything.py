"""The runner of GPU tests and benchmarks, with jobs that need no GPU."""

from __future__ import annotations

import sys
import time
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

from speculator.bench.ranks import _parser
from tests.gpu.everything import SHARE, Board, Job, jobs

GPU_TESTS = sorted(Path(__file__).parents[1].glob("gpu/test_*_gpu.py"))
SEVERAL = [path for path in GPU_TESTS if "device_count" in path.read_text(encoding="utf-8")]


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
    assert {path.stem for path in GPU_TESTS} <= set(names)


class Counted(int):
    """A number of devices that notes how many are asked for."""

    asked: set[int]

    def __lt__(self, other: int) -> bool:
        self.asked.add(other)
        return super().__lt__(other)


@pytest.mark.parametrize("path", SEVERAL, ids=lambda path: path.stem)
def test_a_file_gets_the_devices_that_its_skip_rules_ask_for(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    none = Counted(0)
    none.asked = set()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: none)
    spec = spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    spec.loader.exec_module(module_from_spec(spec))
    assert none.asked
    for devices in (1, 2, 3, 4, 8):
        wanted = max((size for size in none.asked if size <= devices), default=min(none.asked))
        given = {job.name: job.devices for job in jobs(tmp_path, devices)}
        assert given[path.stem] == wanted, f"{devices} devices, and {path.name} has tests for {sorted(none.asked)}"


@pytest.mark.parametrize("devices, gangs", [(1, [2, 2]), (2, [2, 2]), (4, [4, 2, 4])])
def test_gangs_are_measured_on_as_many_devices_as_there_are(devices: int, gangs: list[int], tmp_path: Path) -> None:
    found = [job for job in jobs(tmp_path, devices) if "ranks" in job.command]
    assert [job.devices for job in found] == gangs
    assert [job.name for job in found] == ["bench_ranks", *(f"bench_stages_{size}" for size in gangs[1:])]
    for job in found:
        parsed = _parser().parse_args(job.command[job.command.index("ranks") + 1 :])
        assert parsed.device == "cuda"
        assert max(parsed.ranks or [parsed.pipeline]) == job.devices
