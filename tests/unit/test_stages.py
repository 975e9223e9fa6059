"""A target in stages: the tokens, accepted drafts and log-probabilities of one process, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from speculator.load import load_engine
from tests.e2e.tiny_pair import make_eagle_pair, make_mtp_pair, make_pair
from tests.unit.ranks import run_ranks
from tests.unit.ranks_programs import config_of
from tests.unit.stages_programs import groups_alone, in_turns, left_behind, play, refused, shapes_of, stage


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    make_pair(folder)
    return folder


def values(endings: list[Any]) -> list[Any]:
    assert [e.error + e.text for e in endings] == [""] * len(endings)
    assert not any(e.hung for e in endings)
    return [e.value for e in endings]


def alone(folder: str, trees: bool, **sets: object) -> Any:
    found = play(load_engine(config_of(folder, **sets)), shapes_of(trees))
    assert max(found[4][1]) == 3, "a path of a tree must have been kept"
    return [[list(part) for part in parts] for parts in found]


@pytest.mark.parametrize(("size", "trees"), [(2, False), (2, True), (3, True)])
def test_stages_commit_what_one_process_does(size: int, trees: bool, pair: Path, tmp_path: Path) -> None:
    ranks = values(run_ranks(stage, size, tmp_path, str(pair), (size, 1), trees, {}, limit=60))
    assert ranks[0][2] == alone(str(pair), trees)


def test_a_stage_holds_its_layers_alone(pair: Path, tmp_path: Path) -> None:
    """Six layers on four stages; the head's one is in the cache of the last, and its taps are 2, 3 and 4."""
    engine = load_engine(config_of(str(pair)))
    ranks = values(run_ranks(stage, 4, tmp_path, str(pair), (4, 1), False, {}, limit=60))
    assert [held[0] for held, *_ in ranks] == [[0, 1], [2, 3], [4], [5]]
    assert [held[1] for held, *_ in ranks] == [2, 2, 1, 1 + 1]
    assert engine.head is not None and not engine.head.record.own_embed
    twice = engine.model.embed.weight.numel() + 3 * engine.model.norm.weight.numel()  # the head borrows the embedding
    assert sum(held[2] for held, *_ in ranks) == sum(p.numel() for p in engine.model.parameters()) + twice


def test_stages_of_several_ranks(pair: Path, tmp_path: Path) -> None:
    """Sums of two ranks round otherwise than one, so that log-probabilities may differ in their last places."""
    sets = {"graphs.mode": "split", "graphs.rows": 3, "draft.branching": 2, "draft.nodes": 6}
    ranks = values(run_ranks(stage, 4, tmp_path, str(pair), (2, 2), True, sets, limit=120))
    whole = alone(str(pair), True)
    both = (ranks[0][2], whole)
    ours, theirs = ([p for part in (parts.pop(7), parts.pop(3)) for step in part for p in step] for parts in both)
    assert ranks[0][2] == whole
    assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize("head", ["mtp", "eagle"])
def test_other_heads_on_the_last_stage(head: str, tmp_path: Path) -> None:
    """Features of an MTP module and of EAGLE-1 are the target's last states, so no taps travel."""
    pair = make_mtp_pair(tmp_path / "pair") if head == "mtp" else make_eagle_pair(tmp_path / "pair")
    folder, sets = str(tmp_path / "pair"), {"target": str(pair.target), "head": str(pair.head)}
    ranks = values(run_ranks(stage, 2, tmp_path, folder, (2, 1), False, sets, limit=60))
    assert ranks[0][2] == alone(folder, False, **sets)


def test_without_a_head_stages_decode_plainly(pair: Path, tmp_path: Path) -> None:
    ranks = values(run_ranks(stage, 2, tmp_path, str(pair), (2, 1), False, {"head": ""}, limit=60))
    assert ranks[0][2] == alone(str(pair), False, head="")
    model = load_engine(config_of(str(pair), head="")).model
    whole, norm = sum(p.numel() for p in model.parameters()), model.norm.weight.numel()
    assert sum(held[2] for held, *_ in ranks) == whole + norm, "only a head wants the embedding on the last stage"


@pytest.mark.parametrize("trees", [False, True])
def test_each_stage_replays_its_own_graphs(trees: bool, pair: Path, tmp_path: Path) -> None:
    sets = {"graphs.mode": "split", "graphs.rows": 3, "draft.branching": 2 if trees else 1, "draft.nodes": 6 * trees}
    ranks = values(run_ranks(stage, 2, tmp_path, str(pair), (2, 1), trees, sets, limit=120))
    assert ranks[0][2] == alone(str(pair), trees, **sets)
    for _, passes, *_ in ranks:
        assert passes["target verify"][0] > 20, passes
    assert set(ranks[0][1]) == {"prompt", "target verify"} and "draft decode" in ranks[1][1]


def test_a_step_that_the_last_stage_refuses_leaves_all_able_to_go_on(pair: Path, tmp_path: Path) -> None:
    first, _ = values(run_ranks(refused, 2, tmp_path, str(pair), limit=60))
    assert first == ["DRAFT_NOT_FOUND", "the distribution of draft 1000000 is no longer held; propose again", True]


@pytest.mark.parametrize("sizes", [(2, 1), (3, 1), (2, 2)])
def test_steps_of_other_sessions_overtake_nobody(sizes: tuple[int, int], pair: Path, tmp_path: Path) -> None:
    """Two groups of sessions under way at once; what each commits is what it does alone."""
    engine = load_engine(config_of(str(pair)))
    texts = [produced for produced, _ in groups_alone(engine, [[]] * 3)]
    first, *_ = values(run_ranks(in_turns, sizes[0] * sizes[1], tmp_path, str(pair), sizes, texts, limit=60))
    assert first == groups_alone(engine, texts) and max(first[1][1]) == 3


def test_a_step_left_under_way_holds_nobody_up(pair: Path, tmp_path: Path) -> None:
    ranks = values(run_ranks(left_behind, 4, tmp_path, str(pair), limit=60))
    assert ranks == ["ended", *["followed"] * 3]
