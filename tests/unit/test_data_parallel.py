"""Ranks that share only experts: the tokens of one process, whoever has which sessions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from speculator.load import load_engine
from tests.e2e.tiny_pair import make_mtp_pair
from tests.unit.data_parallel_programs import gang, play, shapes_of
from tests.unit.ranks import run_ranks
from tests.unit.ranks_programs import config_of
from tests.unit.test_ranks import outcome


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_mtp_pair(tmp_path_factory.mktemp("pair"))


def sets_of(pair: Any, **more: Any) -> dict[str, Any]:
    return {"target": str(pair.target), "head": str(pair.head), "parallel.tensor": 2} | more


def alone(pair: Any, trees: bool = False) -> Any:
    return play(load_engine(config_of("", target=str(pair.target), head=str(pair.head))), (0, 1, 2), shapes_of(trees))


@pytest.mark.parametrize(
    ("size", "rows", "trees"),
    [(2, (0, 4, 5), False), (2, (0, 1, 2), False), (2, (4, 5, 6), False), (4, (0, 5, 12), False), (2, (1, 4, 5), True)],
    ids=["spread", "all on rank 0", "all on rank 1", "four ranks", "trees"],
)
def test_ranks_commit_the_tokens_of_one_process(size: int, rows: Any, trees: bool, pair: Any, tmp_path: Path) -> None:
    found, _, _ = outcome(run_ranks(gang, size, tmp_path, "", size, rows, trees, [sets_of(pair)], limit=60))
    assert found == alone(pair, trees)
    assert sum(map(sum, (accepted for _, accepted in found))) > 3
