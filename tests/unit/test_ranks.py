"""One engine over several ranks: the tokens of one rank, by orders of whole numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speculator.engine import Engine
from speculator.errors import ConfigError, SpeculatorError
from speculator.heads.save import save_head
from speculator.heads.shard import shard_record
from speculator.load import fingerprint, load_engine
from speculator.ranks.codec import Close, Codec, Kind, Landed, Open, Order
from speculator.ranks.engine import LeadEngine
from speculator.ranks.errors import RankLostError
from speculator.ranks.launch import Place
from speculator.ranks.process import check
from speculator.ranks.pulse import Pulse
from speculator.types import Bounds, Distribution, Draft, DraftShape, Feed, Rule, SamplingParams, Step
from target.experts import EXPERTS
from target.load import load_target
from target.parallel import TENSOR
from tests.e2e.tiny_pair import make_mtp_pair, make_pair
from tests.unit.engines import Driver, tiny_engine, tiny_head, tiny_record, tiny_target
from tests.unit.ranks import run_ranks
from tests.unit.ranks_programs import (
    CHAIN,
    PARAMS,
    PROMPTS,
    TREE,
    config_of,
    gang,
    rejected,
    rounds,
    votes,
    watched,
    wrong_way,
)
from tests.unit.stages_programs import logprobs, logprobs_of

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


@pytest.mark.parametrize("axis", [TENSOR, EXPERTS])
def test_log_probabilities_are_those_of_one_rank(axis: str, tmp_path: Path) -> None:
    """Up to the order of sums; of ranks with sessions of their own the third session lies on the second."""
    pair = make_mtp_pair(tmp_path / "pair")
    sets = {"target": str(pair.target), "head": "mtp", "engine.kv_tokens": 2000}
    alone = logprobs_of(load_engine(config_of("", **sets)))
    apart = {"parallel.tensor": 2, "parallel.attention_data": str(axis == EXPERTS).lower(), "engine.max_sessions": 2}
    given = sets | (apart if axis == EXPERTS else {})
    found = outcome(run_ranks(logprobs, 2, tmp_path, "", axis, given, limit=60))
    assert list(map(len, found)) == list(map(len, alone)) and min(map(sum, alone)) < -0.1
    for ours, theirs in zip(found, alone, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


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
    pages, captured, failed, mixed = one.value
    assert (pages, captured, failed) == (99, "", "no room for the first shape")
    assert mixed.startswith("memory to capture the next graph is there on some ranks only: rank 1: no")


KINDS = {
    "tensor": {},
    "stages": {"parallel.pipeline": 2},
    "experts": {"parallel.tensor": 2, "parallel.attention_data": "true", "engine.kv_tokens": 2000},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hangs", [True, False], ids=["hangs", "crawls"])
def test_a_thread_that_hangs_is_named_and_one_that_crawls_is_left_alone(kind: str, hangs: bool, tmp_path: Path) -> None:
    """In the middle of a pass, while rank 0 waits for longer than a rank may go without progress."""
    pair = (make_mtp_pair if kind == "experts" else make_pair)(tmp_path)
    sets = {"target": str(pair.target), "head": str(pair.head), **KINDS[kind]}
    endings = run_ranks(watched, 2, tmp_path / "ranks", str(tmp_path), kind, sets, 3 if hangs else -1, limit=90)
    assert not any(e.hung for e in endings) and not any(e.error for e in endings), endings
    if hangs:
        said = [(tmp_path / f"why-{rank}").read_text() for rank in (0, 1)]
        assert said[0] == said[1] and said[0].startswith("rank 1 of 2 stalled in step "), said
    else:
        assert endings[1].value == "followed" and len(endings[0].value[0]) >= 2, endings


@pytest.mark.parametrize("mode", ["off", "round"])
def test_every_wait_for_the_device_counts_as_waiting(mode: str, pair: Path) -> None:
    """Where collectives are recorded, a rank learns only there that another one has not come."""
    engine, entered = load_engine(config_of(str(pair), **{"graphs.mode": mode, "graphs.rows": 4})), list[None]()

    @contextmanager
    def waiting() -> Iterator[None]:
        entered.append(None)
        yield

    engine.waiting = waiting
    driver = Driver(engine)
    sessions = driver.start(PROMPTS, PARAMS, CHAIN)
    driver.rounds(sessions, 4, [CHAIN] * 3)
    steps = [driver._step(s, draft=s.draft, root=s.tokens[-1], propose=CHAIN) for s in sessions]
    before, flight = len(entered), engine.launch(steps)
    assert before > 3 and (flight is None) == (mode == "off")
    assert flight is None or (flight.collect() and len(entered) == before + 1)


def test_a_rank_that_goes_another_way_is_found_out(pair: Path, tmp_path: Path) -> None:
    lead, other = run_ranks(wrong_way, 2, tmp_path, str(pair), limit=60)
    assert other.error == "RankLostError" and "rank 1 went another way than rank 0" in other.text
    assert lead.value[0] == "RANK_LOST"


@pytest.mark.parametrize(
    ("rank", "size", "wanted", "text"),
    [
        ("5", "2", 2, "RANK=5 is none of 2 ranks"),
        ("one", "2", 2, "whole numbers, not by RANK=one"),
        ("-1", "2", 2, "whole numbers, not by RANK=-1"),
        ("0", "2", 1, "2 ranks were started .WORLD_SIZE., but the configuration wants 1"),
        ("0", "2", 2, "need MASTER_ADDR and MASTER_PORT"),
    ],
)
def test_a_place_that_cannot_be_is_refused(rank: str, size: str, wanted: int, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Place.of({"RANK": rank, "WORLD_SIZE": size}, wanted)


def test_a_place_is_read_from_the_environment() -> None:
    there = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "here", "MASTER_PORT": "1"}
    assert Place.of({}, 4) is None
    assert Place.of(there, 4) == (3, 4, 3) and Place.of({**there, "LOCAL_RANK": "1"}, 4) == (3, 4, 1)


class Unheard:
    """A channel without other ranks."""

    def send(self, order: Order) -> None:
        return None


@pytest.mark.parametrize("launched", [False, True])
def test_an_error_that_no_step_should_bring_ends_the_gang(launched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 cannot run the step again: the others may wait inside a collective of it."""

    def broken(*arguments: object) -> None:
        raise KeyError("row")

    target = tiny_target()
    whole, said = tiny_engine(target, None), list[str]()
    parts: Any = (whole.info, target, None, whole.cache)
    engine = LeadEngine(Unheard(), lambda why: said.append(why) or why, Pulse(), *parts)  # type: ignore[arg-type, func-returns-value]
    monkeypatch.setattr(Engine, "launch" if launched else "step", broken)
    monkeypatch.setattr(LeadEngine, "launches", True)
    for _ in range(2):
        with pytest.raises(RankLostError, match="rank 0 failed in a step: KeyError: 'row'"):
            (engine.launch if launched else engine.step)([Step(0, 0, (1,), Feed((1, 2), None))])
    assert len(said) == 1, "told once"


def headed(folder: Path, name: str, data: bytes, header: int) -> Path:
    (folder / name).mkdir()
    (folder / name / "config.json").write_text("{}")
    (folder / name / "model.safetensors").write_bytes(header.to_bytes(8, "little") + b" " * header + data)
    return folder / name


@pytest.mark.parametrize("header", [100, 1 << 16, 1 << 20])
def test_revisions_differ_where_only_numbers_do(header: int, tmp_path: Path) -> None:
    """Files of two revisions have the same names and sizes; names of many experts fill more than is read at once."""
    one, same, other = (headed(tmp_path, str(i), data, header) for i, data in enumerate((b"1", b"1", b"2")))
    assert fingerprint(one) == fingerprint(same) != fingerprint(other)


@pytest.mark.parametrize(
    ("sets", "text"),
    [
        ({"head": "nowhere"}, "nowhere"),
        ({"parallel.head": "shard", "parallel.tensor": 4}, "4 ranks do not divide 42 inner columns of the draft head"),
    ],
    ids=str,
)
def test_a_head_is_refused_before_any_rank_starts(sets: dict[str, Any], text: str, pair: Path, tmp_path: Path) -> None:
    target = load_target(pair / "target", torch.float32)
    sizes = {"vocab_size": target.config.vocab_size, "draft_vocab_size": target.config.vocab_size}
    save_head(tiny_head(target, "eagle3", intermediate_size=42, **sizes), tmp_path)
    given = {"head": str(tmp_path), "parallel.tensor": 2, "model.device": "cpu", **sets}
    with pytest.raises(SpeculatorError, match=text):
        check(config_of(str(pair), **given))


def test_a_step_that_all_ranks_refuse_leaves_them_in_step(pair: Path, tmp_path: Path) -> None:
    assert outcome(run_ranks(rejected, 2, tmp_path, str(pair), limit=60)) == ["DRAFT_NOT_FOUND", True]
