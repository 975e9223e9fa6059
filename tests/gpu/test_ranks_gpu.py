"""Ranks over NCCL, where several GPUs are at hand: the tokens of one GPU, recorded rounds, and clean ends."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from speculator.bench.ranks import main as bench
from speculator.bench.ranks_trials import Fault, serve_command, trial
from speculator.load import load_engine
from speculator.ranks.engine import Follower, LeadEngine
from speculator.ranks.team import Team
from speculator.types import DraftShape
from target.parallel import ParallelDecoder
from tests.e2e.tiny_pair import make_pair
from tests.unit.ranks import run_ranks
from tests.unit.ranks_programs import CHAIN, config_of, rounds

SIZES = [
    pytest.param(size, marks=pytest.mark.skipif(torch.cuda.device_count() < size, reason=f"needs {size} CUDA devices"))
    for size in (2, 4)
]
SHAPES = [CHAIN, DraftShape(2), CHAIN]
LIMIT = 90.0  # seconds of a gang: one that hangs must not take the time of all tests
pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    make_pair(folder)
    return folder


def on_gpus(rank: int, folder: str, size: int, sets: dict[str, object]) -> Any:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    team = Team.build(size, device, 60.0, lambda why: why)
    engine = load_engine(config_of(folder, **sets), None, team)
    assert isinstance(engine.model, ParallelDecoder)
    if rank:
        Follower(engine, team.channel).run()
        return "followed"
    assert isinstance(engine, LeadEngine)
    found = rounds(engine, SHAPES)
    engine.end()
    return [found, {name: list(counts) for name, counts in engine.passes_run().items()}]


def settings(mode: str, head: str) -> dict[str, object]:
    return {"device": "cuda", "dtype": "float32", "graphs.mode": mode, "graphs.rows": 4, "engine.kv_tokens": 8192,
            "engine.memory_share": 0.5, "parallel.head": head, "policy.mode": "off"}  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("mode", "head"), [("off", "replicate"), ("round", "replicate"), ("round", "shard")])
def test_gpus_commit_the_tokens_of_one(size: int, mode: str, head: str, pair: Path, tmp_path: Path) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    alone = rounds(load_engine(config_of(str(pair), **settings("off", "replicate"))), SHAPES)
    endings = run_ranks(on_gpus, size, tmp_path, str(pair), size, settings(mode, head), limit=LIMIT, afresh=True)
    assert [e.error + e.text + "hung" * e.hung for e in endings] == [""] * size
    found, passes = endings[0].value
    assert found == alone
    assert mode == "off" or sum(replayed for replayed, _ in passes.values()) > 20


@pytest.mark.parametrize("size", SIZES)
def test_a_lost_gpu_rank_ends_all(size: int, pair: Path) -> None:
    command = serve_command(pair / "target", pair / "eagle3", size, "cuda")
    ending = trial(command, Fault(size - 1, "serving", 5, "kill"))
    assert ending.wrong == "", ending
    assert ending.status == "UNAVAILABLE"


@pytest.mark.parametrize("size", SIZES)
def test_the_bench_runs(size: int, tmp_path: Path) -> None:
    os.environ.setdefault("SPECULATOR_COMMIT", "test")
    report = tmp_path / "ranks.json"
    flags = ["--shape", "llama-tiny", "--device", "cuda", "--batches", "1", "--rounds", "5", "--context", "64"]
    flags += ["--depth", "3", "--accept", "2", "--ranks", "1", str(size), "--limit", "90"]
    assert bench([*flags, "--json", str(report)]) == 0
    assert report.exists()
