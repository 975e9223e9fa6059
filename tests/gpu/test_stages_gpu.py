"""Stages over NCCL, where several GPUs are at hand: the tokens of one GPU, recorded passes, several steps under way."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from speculator.bench.ranks import main as bench
from speculator.bench.ranks_trials import Fault, serve_command, trial
from speculator.load import load_engine
from speculator.ranks.engine import Follower
from speculator.ranks.team import Team
from tests.e2e.tiny_pair import make_pair
from tests.unit.ranks import run_ranks
from tests.unit.ranks_programs import config_of
from tests.unit.stages_programs import play, shapes_of, two_groups

SIZES = [
    pytest.param(size, marks=pytest.mark.skipif(torch.cuda.device_count() < size, reason=f"needs {size} CUDA devices"))
    for size in (2, 4)
]
LIMIT = 90.0  # seconds of a gang: one that hangs must not take the time of all tests
pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    make_pair(folder)
    return folder


def settings(mode: str, trees: bool = True) -> dict[str, Any]:
    return {"device": "cuda", "dtype": "float32", "graphs.mode": mode, "graphs.rows": 4, "engine.kv_tokens": 8192,
            "engine.memory_share": 0.5, "policy.mode": "off", "draft.branching": 1 + trees,
            "draft.nodes": 6 * trees}  # fmt: skip


def on_gpus(rank: int, folder: str, size: int, sets: dict[str, Any], texts: list[list[int]]) -> Any:
    torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    team = Team.build(1, device, 60.0, lambda why: why, pipeline=size)
    engine = load_engine(config_of(folder, **{**sets, "parallel.pipeline": size}), None, team)
    if rank:
        Follower(engine, team.channel).run()
        return {name: list(counts) for name, counts in engine.passes_run().items()}
    found = two_groups(engine, texts, 2) if texts else play(engine, shapes_of(bool(sets["draft.nodes"])))
    engine.end()  # type: ignore[attr-defined]
    return found


def plain(found: Any) -> Any:
    """As JSON brings it."""
    return [[list(part) for part in parts] for parts in found]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["off", "split"])
@pytest.mark.parametrize("trees", [False, True])
def test_stages_commit_the_tokens_of_one_gpu(size: int, mode: str, trees: bool, pair: Path, tmp_path: Path) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    alone = plain(play(load_engine(config_of(str(pair), **settings(mode, trees))), shapes_of(trees)))
    endings = run_ranks(on_gpus, size, tmp_path, str(pair), size, settings(mode, trees), [], limit=LIMIT, afresh=True)
    assert [e.error + e.text + "hung" * e.hung for e in endings] == [""] * size
    assert endings[0].value == alone
    assert mode == "off" or all(e.value["target verify"][0] > 20 for e in endings[1:])


@pytest.mark.parametrize("size", SIZES)
def test_two_groups_under_way_overtake_nobody(size: int, pair: Path, tmp_path: Path) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    engine = load_engine(config_of(str(pair), **settings("split")))
    texts = [produced for produced, _ in two_groups(engine, [[]] * 3, 0)]
    wanted = two_groups(engine, texts, 0)
    endings = run_ranks(on_gpus, size, tmp_path, str(pair), size, settings("split"), texts, limit=LIMIT, afresh=True)
    assert [e.error + e.text + "hung" * e.hung for e in endings] == [""] * size
    assert endings[0].value == wanted


@pytest.mark.parametrize("size", SIZES)
def test_a_lost_stage_ends_all(size: int, pair: Path) -> None:
    command = serve_command(pair / "target", pair / "eagle3", 1, "cuda", stages=size)
    ending = trial(command, Fault(size - 1, "serving", 5, "kill"))
    assert ending.wrong == "", ending
    assert ending.status == "UNAVAILABLE"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 CUDA devices")
def test_the_bench_runs(tmp_path: Path) -> None:
    os.environ.setdefault("SPECULATOR_COMMIT", "test")
    report = tmp_path / "stages.json"
    flags = ["--shape", "llama-tiny", "--device", "cuda", "--batches", "1", "--rounds", "5", "--context", "64"]
    assert bench([*flags, "--depth", "3", "--pipeline", "2", "--limit", "90", "--json", str(report)]) == 0
    assert report.exists()
