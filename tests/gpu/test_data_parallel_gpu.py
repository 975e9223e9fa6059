"""Ranks with sessions of their own over NCCL, where several GPUs are at hand: the tokens of one, eager and replayed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from speculator.load import load_engine
from speculator.ranks.data import DataLead, follower
from speculator.ranks.team import Team
from target.experts import EXPERTS
from tests.e2e.tiny_pair import make_mtp_pair
from tests.unit.data_parallel_programs import play, shapes_of
from tests.unit.ranks import run_ranks
from tests.unit.ranks_programs import config_of

SIZES = [
    pytest.param(size, marks=pytest.mark.skipif(torch.cuda.device_count() < size, reason=f"needs {size} CUDA devices"))
    for size in (2, 4)
]
LIMIT = 90.0  # seconds of a gang: one that hangs must not take the time of all tests
pytestmark = pytest.mark.gpu


def on_gpus(rank: int, size: int, rows: tuple[int, ...], sets: dict[str, object]) -> Any:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    team = Team.build(size, device, 60.0, lambda why: why, axis=EXPERTS)
    engine = load_engine(config_of("", **sets), None, team)
    if rank:
        follower(engine, team).run()
        return "followed"
    assert isinstance(engine, DataLead)
    found = play(engine, rows, shapes_of(False))
    engine.end()
    return [found, {name: list(counts) for name, counts in engine.passes_run().items()}]


def settings(pair: Any, mode: str) -> dict[str, object]:
    return {"target": str(pair.target), "head": str(pair.head), "device": "cuda", "dtype": "float32",
            "graphs.mode": mode, "graphs.rows": 4, "engine.kv_tokens": 8192, "engine.memory_share": 0.5,
            "policy.mode": "off"}  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["off", "split", "piecewise"])
@pytest.mark.parametrize("rows", [(0, 4, 5), (4, 5, 6)], ids=["spread", "all on rank 1"])
def test_gpus_commit_the_tokens_of_one(rows: Any, mode: str, size: int, tmp_path: Path) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    pair = make_mtp_pair(tmp_path / "pair")
    alone = play(load_engine(config_of("", **settings(pair, "off"))), (0, 1, 2), shapes_of(False))
    endings = run_ranks(on_gpus, size, tmp_path / "ranks", size, rows, settings(pair, mode), limit=LIMIT, afresh=True)
    assert [e.error + e.text + "hung" * e.hung for e in endings] == [""] * size
    found, passes = endings[0].value
    assert found == alone
    assert mode == "off" or passes["target verify"][0] > 5
