"""Runs GPU tests and benchmarks side by side on the devices of a machine: `python tests/gpu/everything.py --out DIR`.

Each job has a log of its own that is written as it goes, a time limit, and the devices it needs; tests share a device,
a benchmark has one to itself. What is not done when the time is up is ended and says so.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SHARE = 3  # tests that share a device, unless the command says otherwise
# what takes longest to compile starts first
LONG = (
    "test_skinny_gpu",
    "test_fused_gpu",
    "test_mla_gpu",
    "test_round_gpu",
    "test_lm_head_gpu",
    "test_gqa_gpu",
    "test_invariant_gpu",
    "test_pdl_gpu",
)
# no sharing: the numbers of devices that tests of a file use
ALONE = {
    "test_agreement_gpu": (2,),
    "test_ranks_gpu": (2, 4),
    "test_stages_gpu": (2, 4),
    "test_data_parallel_gpu": (2, 4),
    "test_memory_gpu": (1,),
}
SPECULATOR = (sys.executable, "-m", "speculator")
# an 8B-shaped pair on a card that its KV cache fills up to 95 %
FULL_CARD = "--synthetic llama-8b --sessions 32 --waves 0 --memory-share 0.95 --kv-tokens 1000000000".split()


@dataclass(frozen=True)
class Job:
    """A command, the most seconds it may take, and what it needs of a device: a share (0) or that many to itself."""

    name: str
    command: tuple[str, ...]
    seconds: int
    devices: int = 0


@dataclass
class Running:
    job: Job
    devices: list[int]
    process: subprocess.Popen[Any]
    began: float = field(default_factory=time.monotonic)


def jobs(out: Path, devices: int = 1) -> list[Job]:
    """Long tests first, then the benchmarks; FlashMLA's and FlashAttention-3's where their folders are given.

    A job that can use more devices gets as many as it can of those there are, and never fewer than it needs.
    """
    pytest = (sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--tb=short", "--maxfail=15", "-p", "no:cacheprovider")
    found = sorted(path.stem for path in (ROOT / "tests" / "gpu").glob("test_*_gpu.py"))
    found.sort(key=lambda name: (name not in ALONE, LONG.index(name) if name in LONG else len(LONG)))
    tests = [Job(name, (*pytest, f"tests/gpu/{name}.py"), 420, _most(ALONE.get(name, (0,)), devices)) for name in found]
    sizes = [size for size in (1, 2, 4) if size <= max(2, devices)]
    benches = [
        _bench("skinny", 400, "--write", str(out / "products.json")),
        _bench("mla", 240, "--variants", *_peer("--flash-mla", "SPECULATOR_FLASHMLA"), out=out / "mla_variants.json"),
        _bench("mla", 200, *_peer("--flash-mla", "SPECULATOR_FLASHMLA"), out=out / "mla.json"),
        _bench("gqa", 120, *_peer("--flash3", "SPECULATOR_FLASH3"), out=out / "gqa.json"),
        _bench("round", 300, "--graphs", "split", "round", out=out / "round.json"),
        _bench("hybrid", 240, "--shape", "hybrid-4b", out=out / "hybrid.json"),
        _bench("graphs", 120, out=out / "graphs.json"),
        _bench("graphs", 200, *FULL_CARD, out=out / "graphs_8b.json"),
        _gangs("ranks", sizes[-1], "--ranks", *map(str, sizes), out=out),
        *(_gangs(f"stages_{size}", size, "--pipeline", str(size), out=out) for size in sizes[1:]),
        Job("bench_layer", (sys.executable, "-m", "speculator.bench.layer", "--json", str(out / "layer.json")), 240, 1),
        Job("invariant", (*SPECULATOR, "invariant", "--json", str(out / "invariant.json")), 200, 1),
    ]
    return tests + benches


def _most(sizes: Sequence[int], devices: int) -> int:
    """The largest of the sizes that so many devices hold, else the smallest."""
    return max((size for size in sizes if size <= devices), default=min(sizes))


def _gangs(name: str, devices: int, *options: str, out: Path) -> Job:
    """`bench ranks` on so many devices."""
    command = (*SPECULATOR, "bench", "ranks", "--device", "cuda", *options, "--json", str(out / f"{name}.json"))
    return Job(f"bench_{name}", command, 400, devices)


def _bench(name: str, seconds: int, *options: str, out: Path | None = None) -> Job:
    report = ("--json", str(out)) if out else ()
    return Job(f"bench_{out.stem if out else name}", (*SPECULATOR, "bench", name, *options, *report), seconds, 1)


def _peer(option: str, variable: str) -> tuple[str, ...]:
    return (option, os.environ[variable]) if variable in os.environ else ()


class Board:
    """Starts what fits, ends what takes too long."""

    def __init__(self, waiting: Sequence[Job], devices: Sequence[int], out: Path, deadline: float, share: int) -> None:
        self.waiting, self.out, self.deadline, self.share = list(waiting), out, deadline, share
        self.load = dict.fromkeys(devices, 0.0)  # 1 is a full device
        self.running: list[Running] = []
        self.failed = 0

    def run(self) -> int:
        """How many jobs failed or did not end."""
        while self.waiting or self.running:
            late = time.monotonic() > self.deadline
            for one in list(self.running):
                self._look(one, late)
            if late and self.waiting:
                self._say(f"not started: {', '.join(job.name for job in self.waiting)}")
                self.failed += len(self.waiting)
                self.waiting.clear()
            self._start()
            time.sleep(0.2)
        return self.failed

    def _look(self, one: Running, late: bool) -> None:
        took = time.monotonic() - one.began
        code = one.process.poll()
        if code is None and (late or took > one.job.seconds):
            os.killpg(one.process.pid, signal.SIGKILL)
            one.process.wait()
            code = -9
        if code is None:
            return
        self.running.remove(one)
        for device in one.devices:
            self.load[device] -= self._needs(one.job)
        self.failed += code != 0
        self._say(f"{one.job.name}: {'ended for its time' if code == -9 else f'exit {code}'} after {took:.0f} s")

    def _start(self) -> None:
        for job in list(self.waiting):
            free = [
                d for d, load in sorted(self.load.items(), key=lambda item: item[1]) if load + self._needs(job) <= 1.01
            ]
            wanted = max(1, job.devices)
            if len(self.load) < wanted:
                self.waiting.remove(job)
                self._say(f"{job.name}: left out, needs {wanted} devices")
            elif len(free) >= wanted:
                self.waiting.remove(job)
                self._launch(job, free[:wanted])

    def _launch(self, job: Job, devices: list[int]) -> None:
        for device in devices:
            self.load[device] += self._needs(job)
        shown = ",".join(map(str, devices))
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": shown, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        with (self.out / f"{job.name}.txt").open("w") as log:
            process = subprocess.Popen(
                job.command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
            )
        self.running.append(Running(job, devices, process))

    def _needs(self, job: Job) -> float:
        return 1.0 if job.devices else 1 / self.share

    def _say(self, line: str) -> None:
        print(line, flush=True)
        with (self.out / "summary.txt").open("a") as file:
            file.write(line + "\n")


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--out", type=Path, required=True, help="folder for logs and figures")
    p.add_argument("--seconds", type=float, default=3600, help="for everything")
    p.add_argument("--devices", type=int, nargs="+", help="default: all")
    p.add_argument("--share", type=int, default=SHARE, help="tests that share a device (default: %(default)s)")
    p.add_argument("--only", nargs="+", default=[""], help="jobs whose names hold one of these")
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    devices = args.devices or list(range(_devices()))
    picked = [job for job in jobs(args.out, len(devices)) if any(part in job.name for part in args.only)]
    return min(1, Board(picked, devices, args.out, time.monotonic() + args.seconds, args.share).run())


def _devices() -> int:
    import torch

    return torch.cuda.device_count() or 1


if __name__ == "__main__":
    sys.exit(main())
