"""What ranks send each other to choose tokens: a few numbers of a row, and logits only where a rule has to see all."""

from __future__ import annotations

from pathlib import Path

import pytest

from speculator.load import load_engine
from speculator.types import DraftShape
from tests.e2e.tiny_pair import make_pair
from tests.unit.ranks import run_ranks
from tests.unit.ranks_programs import config_of
from tests.unit.ranks_reading import said, widest

SIZE = 2
CHAIN, TREE = [3], [3, 6, 2]
MODES = {
    "off": {},
    "piecewise": {"graphs.mode": "piecewise", "graphs.rows": 4, "graphs.prompt_tokens": 8},
    "round": {"graphs.mode": "round", "graphs.rows": 4, "graphs.prompt_tokens": 8},
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    make_pair(folder)
    return folder


def sent(way: str, mode: str, shape: list[int], pair: Path, folder: Path) -> tuple[int, int]:
    """The most numbers of a row that a rank sent, and those that it holds of the logits; tokens are those of one."""
    engine = load_engine(config_of(str(pair)))
    alone, rows = said(engine, way, DraftShape(*shape)), -(-engine.info.vocab_size // SIZE)
    lead, other = run_ranks(widest, SIZE, folder, str(pair), SIZE, way, shape, MODES[mode], limit=120)
    assert lead.error + lead.text + other.error + other.text == ""
    tokens, most, replayed = lead.value
    assert tokens == alone and sum(len(produced) for produced, _ in alone) > 20
    assert other.value == most
    assert mode == "off" or replayed > 20
    return most, rows


@pytest.mark.parametrize(
    ("way", "mode", "shape"),
    [
        ("greedy", "off", CHAIN),
        ("noise", "off", TREE),
        ("noise", "piecewise", CHAIN),
        ("greedy", "round", CHAIN),
        ("noise", "round", CHAIN),
        ("greedy rules", "off", CHAIN),
        ("top-k", "off", CHAIN),
        ("top-k", "piecewise", CHAIN),
        ("min-p", "off", TREE),
    ],
)
def test_tokens_are_chosen_from_a_few_numbers_of_each_rank(
    way: str, mode: str, shape: list[int], pair: Path, tmp_path: Path
) -> None:
    most, rows = sent(way, mode, shape, pair, tmp_path)
    assert 0 < most < rows / 4


@pytest.mark.parametrize("way", ["top-p", "rejection"])
def test_rules_that_have_to_see_all_logits_gather_them(way: str, pair: Path, tmp_path: Path) -> None:
    most, rows = sent(way, "off", CHAIN, pair, tmp_path)
    assert most == rows
