"""One engine over several ranks: the tokens of one rank, by orders of whole numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speculator.errors import ConfigError
from speculator.heads.shard import shard_record
from speculator.load import load_engine
from speculator.ranks.codec import Close, Codec, Kind, Landed, Open, Order
from speculator.types import Bounds, Distribution, Draft, DraftShape, Feed, Rule, SamplingParams, Step
from tests.e2e.tiny_pair import make_mtp_pair, make_pair
from tests.unit.engines import tiny_record
from tests.unit.ranks import run_ranks
from tests.unit.ranks_programs import CHAIN, TREE, config_of, gang, rejected, rounds, votes, wrong_way

tokens = st.integers(0, 2**31)
reals = st.floats(0.0, 100.0)
sampling = st.builds(
    SamplingParams, reals, st.integers(0, 10**6), reals, reals, reals, st.integers(0, 2**64 - 1), st.sampled_from(Rule)
)
shapes = st.builds(
    DraftShape, st.integers(0, 16), st.integers(0, 63), st.integers(1, 16), st.lists(st.integers(-1, 9)).map(tuple)
)
weighed = st.lists(st.tuples(tokens, st.floats(-50.0, 0.0)), min_size=1, max_size=3).map(
    lambda pairs: Distribution([t for t, _ in pairs], [p for _, p in pairs])
)


@st.composite
def drafts(draw: st.DrawFn) -> Draft:
    drafted = draw(st.lists(st.tuples(tokens, st.integers(-1, 62)), max_size=5))
    q = draw(st.none() | st.tuples(*[weighed] * len(drafted)))
    return Draft(tuple(t for t, _ in drafted), tuple(p for _, p in drafted), q=q, draft_id=draw(st.integers(0, 2**40)))


feeds = st.builds(Feed, st.lists(tokens, min_size=1), st.none() | tokens)
pages = st.lists(st.integers(0, 9), max_size=8).map(tuple)
steps = st.builds(
    Step,
    st.integers(0, 3),
    tokens,
    pages,
    st.none() | feeds,
    tokens,
    st.none() | drafts(),
    st.none() | shapes,
    st.none() | st.builds(Bounds, tokens, st.frozensets(tokens, max_size=2)),
    st.booleans(),
)
changes = (
    st.builds(Open, st.integers(0, 3), sampling, st.booleans())
    | st.builds(Close, st.integers(0, 3))
    | st.just(Landed())
)
orders = st.builds(
    Order, st.lists(changes, max_size=3), st.lists(steps, max_size=4), st.integers(0, 2**32), st.sampled_from(Kind)
)


@settings(max_examples=60, deadline=None)
@given(st.lists(orders, max_size=5))
def test_orders_come_out_as_they_went_in(told: list[Order]) -> None:
    sender, receiver = Codec(), Codec()
    for order in told:
        assert receiver.decode(sender.encode(order)) == order


def test_a_page_table_travels_once() -> None:
    codec, table = Codec(), tuple(range(1, 500))
    first = codec.encode(Order(steps=[Step(2, 0, table)]))
    again = codec.encode(Order(steps=[Step(2, 9, (*table, 500))]))
    assert len(first) > 500 and len(again) < 20
    assert len(codec.encode(Order([Open(2, SamplingParams(), True)], [Step(2, 0, table)]))) > 500


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    make_pair(folder)
    return folder


def outcome(endings: list[Any]) -> Any:
    assert [e.error + e.text for e in endings] == [""] * len(endings)
    assert not any(e.hung for e in endings)
    assert [e.value for e in endings[1:]] == ["followed"] * (len(endings) - 1)
    return endings[0].value


@pytest.mark.parametrize(("size", "trees"), [(2, False), (4, False), (2, True)])
def test_ranks_commit_the_tokens_of_one(size: int, trees: bool, pair: Path, tmp_path: Path) -> None:
    alone = rounds(load_engine(config_of(str(pair))), [TREE] * 3 if trees else [CHAIN, DraftShape(2), CHAIN])
    found, _ = outcome(run_ranks(gang, size, tmp_path, str(pair), size, trees, limit=60))
    assert found == alone
    assert sum(map(len, alone[0])) > 20


def test_latent_targets_with_experts_and_an_mtp_head(tmp_path: Path) -> None:
    pair = make_mtp_pair(tmp_path / "pair")
    folder, sets = str(tmp_path / "pair"), {"target": str(pair.target), "head": str(pair.head)}
    alone = rounds(load_engine(config_of(folder, **sets)), [CHAIN, DraftShape(2), CHAIN])
    for head in ("replicate", "shard"):
        given = {**sets, "parallel.head": head}
        found, _ = outcome(run_ranks(gang, 2, tmp_path / head, folder, 2, False, given, limit=60))
        assert found == alone


def test_a_head_that_is_divided_drafts_what_a_whole_one_does(pair: Path, tmp_path: Path) -> None:
    alone = rounds(load_engine(config_of(str(pair))), [CHAIN, DraftShape(2), CHAIN])
    sets = {"parallel.head": "shard"}
    found, _ = outcome(run_ranks(gang, 4, tmp_path, str(pair), 4, False, sets, limit=60))
    assert found == alone


def test_a_head_that_does_not_divide_is_named() -> None:
    with pytest.raises(ConfigError, match=r"4 ranks do not divide 6 attention heads of the draft head: set"):
        shard_record(tiny_record("eagle3", num_heads=6), 4)
    with pytest.raises(ConfigError, match=r"4 ranks do not divide 42 inner columns"):
        shard_record(tiny_record("eagle3", intermediate_size=42), 4)


@pytest.mark.parametrize("mode", ["piecewise", "round"])
def test_collectives_are_recorded(mode: str, pair: Path, tmp_path: Path) -> None:
    sets = {"graphs.mode": mode, "graphs.rows": 2, "graphs.prompt_tokens": 8}
    alone = rounds(load_engine(config_of(str(pair))), [CHAIN, DraftShape(2), CHAIN])
    found, passes = outcome(run_ranks(gang, 2, tmp_path, str(pair), 2, False, sets, limit=120))
    assert found == alone
    assert sum(replayed for replayed, _ in passes.values()) > 20


def test_facts_of_one_rank_become_decisions_of_all(tmp_path: Path) -> None:
    one, other = run_ranks(votes, 2, tmp_path, limit=60)
    assert one.value == other.value, (one, other)
    pages, captured, failed, mixed, other_weights = one.value
    assert other_weights == "rank 1 has another revision of the target than rank 0: give all ranks the same"
    assert (pages, captured, failed) == (99, "", "no room for the first shape")
    assert mixed.startswith("memory to capture the next graph is there on some ranks only: rank 1: no")


def test_a_rank_that_goes_another_way_is_found_out(pair: Path, tmp_path: Path) -> None:
    lead, other = run_ranks(wrong_way, 2, tmp_path, str(pair), limit=60)
    assert other.error == "RankLostError" and "rank 1 went another way than rank 0" in other.text
    assert lead.value[0] == "RANK_LOST"


def test_a_step_that_all_ranks_refuse_leaves_them_in_step(pair: Path, tmp_path: Path) -> None:
    assert outcome(run_ranks(rejected, 2, tmp_path, str(pair), limit=60)) == ["DRAFT_NOT_FOUND", True]
