"""Ranks that share only experts: the tokens of one process, whoever has which sessions."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from speculator.errors import ConfigError, DraftNotFoundError, NumericalError, SpeculatorError
from speculator.load import load_engine
from speculator.ranks.process import check
from speculator.ranks.returns import outcome_of, outcome_words
from speculator.ranks.shares import Passes, Share
from speculator.types import Draft, Extent, Feed, Step, StepResult
from target.errors import PlanError
from target.experts import EXPERTS, check_experts
from target.load import load_target
from target.parallel import Axis
from tests.e2e.tiny_pair import make_mtp_pair
from tests.unit.data_parallel_programs import capture, fail, gang, mixture, play, refuse, rejection_sessions, shapes_of
from tests.unit.engines import tiny_config
from tests.unit.hybrid_models import hybrid_target
from tests.unit.ranks import run_ranks
from tests.unit.ranks_programs import config_of
from tests.unit.targets import save_reference
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


@pytest.mark.parametrize(("mode", "rows"), [("split", (0, 4, 5)), ("piecewise", (4, 5, 6))])
def test_ranks_replay_together(mode: str, rows: Any, pair: Any, tmp_path: Path) -> None:
    """A rank that has nothing to do replays too."""
    sets = sets_of(pair, **{"graphs.mode": mode, "graphs.rows": 2, "graphs.prompt_tokens": 8})
    found, passes, _ = outcome(run_ranks(gang, 2, tmp_path, "", 2, rows, False, [sets], limit=120))
    assert found == alone(pair)
    assert passes["target verify"][0] > 5, passes
    assert passes["prompt"][0] > 2 or mode == "split", passes


def test_a_rank_of_chains_replays_the_graphs_of_trees(pair: Any, tmp_path: Path) -> None:
    """Session 1 drafts chains alone on rank 0, while those on rank 1 draft trees."""
    sets = sets_of(pair, **{"graphs.mode": "split", "graphs.rows": 2, "draft.branching": 2, "draft.nodes": 6})
    found, passes, _ = outcome(run_ranks(gang, 2, tmp_path, "", 2, (4, 0, 5), True, [sets], limit=120))
    assert found == alone(pair, trees=True)
    assert passes["target verify"][0] > 5, passes


def test_grouped_query_targets_with_experts(tmp_path: Path) -> None:
    """Qwen3-MoE, decoding without a head."""
    save_reference(tmp_path / "target", "qwen3_moe", max_position_embeddings=512)
    sets = {"target": str(tmp_path / "target"), "head": "", "parallel.tensor": 2}
    one = play(load_engine(config_of("", **sets)), (0, 1, 2), [None] * 3)
    found, _, _ = outcome(run_ranks(gang, 2, tmp_path, "", 2, (0, 4, 5), None, [sets], limit=60))
    assert found == one


def test_capacities_differ(pair: Any, tmp_path: Path) -> None:
    """Each rank has the pages that it has; what all of them record must fit the smallest."""
    graphs = {"graphs.mode": "split", "graphs.rows": 2}
    sets = [sets_of(pair, **graphs, **{"engine.kv_tokens": tokens}) for tokens in (2048, 1000)]
    found, _, pages = outcome(run_ranks(gang, 2, tmp_path, "", 2, (0, 1, 5), False, sets, limit=120))
    assert found == alone(pair)
    assert pages == [129, 64]


# the vote before passes are recorded: rank 1's cache holds one page, a draft of 16 levels takes two


def small(pair: Any, *tokens: int) -> list[dict[str, Any]]:
    return [sets_of(pair, **{"draft.depth": 16, "graphs.rows": 1, "engine.kv_tokens": count}) for count in tokens]


def test_without_the_vote_one_rank_waits_for_ever(pair: Any, tmp_path: Path) -> None:
    lead, other = run_ranks(capture, 2, tmp_path, "", small(pair, 2048, 16), False, limit=12)
    assert lead.hung, "rank 0 records alone"
    assert other.value is None, "rank 1 left that shape out and waits for work, until rank 0 is killed"


def test_with_the_vote_all_ranks_say_who_lacks_what(pair: Any, tmp_path: Path) -> None:
    lead, other = run_ranks(capture, 2, tmp_path, "", small(pair, 2048, 16), True, limit=60)
    assert lead.error == other.error == "ConfigError" and lead.text == other.text
    assert "a batch of 1 x 17 tokens fits on some ranks only: rank 1: no, room for 16 tokens where 32 are needed" in (
        lead.text
    )


def test_what_no_rank_holds_is_left_out_by_all(pair: Any, tmp_path: Path) -> None:
    endings = run_ranks(capture, 2, tmp_path, "", small(pair, 16, 16), True, limit=60)
    assert [ending.value for ending in endings] == [0, 0], endings


# what goes wrong on one rank


def test_a_step_that_one_rank_refuses_leaves_all_in_step(pair: Any, tmp_path: Path) -> None:
    failed, again, texts = outcome(run_ranks(refuse, 2, tmp_path, "", sets_of(pair), limit=60))
    assert failed == "DRAFT_NOT_FOUND"
    assert again == ["ok", "DRAFT_NOT_FOUND"], "the draft of the other rank is still held"
    one = load_engine(config_of("", target=str(pair.target), head=str(pair.head)))
    assert texts == [s.produced for s in rejection_sessions(one, (0, 1))]


@pytest.mark.parametrize("of_device", [True, False])
def test_a_rank_that_fails_ends_the_others(of_device: bool, pair: Any, tmp_path: Path) -> None:
    lead, other = run_ranks(fail, 2, tmp_path, "", sets_of(pair), of_device, limit=60)
    assert other.error == "RankLostError" and "rank 1 failed in a step" in other.text
    assert "an illegal access" in other.text
    assert lead.value == "RANK_LOST"


# the sizes, before any rank starts


@pytest.mark.parametrize(
    ("sets", "text"),
    [
        ({"parallel.tensor": 3}, "3 ranks do not divide 4 experts"),
        ({"graphs.mode": "round"}, "graphs.mode round is not for ranks with sessions of their own"),
        ({"parallel.head": "shard"}, "each drafts alone, with a whole head"),
        ({"policy.measure": "on"}, "do not measure rounds"),
        ({"engine.invariant": "true"}, "sums of one order"),
    ],
    ids=str,
)
def test_what_they_do_not_have_is_refused(sets: dict[str, Any], text: str, pair: Any) -> None:
    with pytest.raises(ConfigError, match=re.escape(text)):
        check(config_of("", **sets_of(pair, **{"parallel.attention_data": "true", "model.device": "cpu"}) | sets))


def test_ranks_of_one_are_refused() -> None:
    with pytest.raises(ConfigError, match="needs ranks that share experts"):
        config_of("", target="", head="", **{"parallel.attention_data": "true"})


def test_targets_without_experts_and_hybrids_are_refused() -> None:
    with pytest.raises(PlanError, match="data parallelism of a dense target is 2 servers"):
        check_experts(tiny_config(), 2)
    with pytest.raises(PlanError, match="recurrent layers"):
        check_experts(hybrid_target().config, 2)


# the arithmetic of one layer


@pytest.mark.parametrize("inner", [8, 3], ids=["grouped", "dense"])
def test_divided_experts_compute_what_whole_ones_do(inner: int, tmp_path: Path) -> None:
    """Batches of 5 tokens, 1 and none; `width` is 6."""
    endings = run_ranks(mixture, 3, tmp_path, inner, limit=60)
    assert [e.error + e.text for e in endings] == [""] * 3
    assert [ending.value[0] for ending in endings] == [5, 1, 0]
    assert max(ending.value[1] for ending in endings) < 1e-5
    assert all("7 tokens joins a pass of 6" in ending.value[2] for ending in endings)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_a_rank_reads_its_own_experts(family: str, tmp_path: Path) -> None:
    save_reference(tmp_path, family)
    whole = load_target(tmp_path, torch.float32)
    parts = [load_target(tmp_path, torch.float32, axis=Axis(EXPERTS, rank, 2)) for rank in range(2)]
    wholes = dict(whole.named_parameters())
    for name, tensor in wholes.items():
        held = [dict(part.named_parameters())[name] for part in parts]
        assert (
            torch.equal(torch.cat(held), tensor) if ".experts." in name else all(torch.equal(t, tensor) for t in held)
        )


def stack_experts(path: Path) -> None:
    """Store all experts of a layer in one tensor each way."""
    tensors, stacks = load_file(path), dict[str, dict[int, dict[str, torch.Tensor]]]()
    for name in [name for name in tensors if ".experts." in name]:
        base, expert, part, _ = name.rsplit(".", 3)
        stacks.setdefault(base, {}).setdefault(int(expert), {})[part] = tensors.pop(name)
    for base, experts in stacks.items():
        each = [experts[e] for e in range(len(experts))]
        tensors[f"{base}.gate_up_proj"] = torch.stack([torch.cat((e["gate_proj"], e["up_proj"])) for e in each])
        tensors[f"{base}.down_proj"] = torch.stack([e["down_proj"] for e in each])
    save_file(tensors, path, {"format": "pt"})


def test_experts_in_one_tensor_are_cut(tmp_path: Path) -> None:
    save_reference(tmp_path, "qwen3_moe")
    whole = load_target(tmp_path, torch.float32)
    stack_experts(tmp_path / "model.safetensors")
    parts = [load_target(tmp_path, torch.float32, axis=Axis(EXPERTS, rank, 2)) for rank in range(2)]
    for i, layer in enumerate(whole.layers):
        for name in ("gate_up", "down"):
            held = [getattr(part.layers[i].mlp.experts, name) for part in parts]
            assert torch.equal(torch.cat(held), getattr(layer.mlp.experts, name))


# results on their way


numbers = st.integers(0, 2**31)
reals = st.floats(-50.0, 0.0)


@st.composite
def results(draw: st.DrawFn) -> StepResult:
    made = draw(st.lists(st.tuples(numbers, reals), min_size=1, max_size=4))
    nodes = draw(st.lists(st.tuples(numbers, st.integers(-1, 5), reals), max_size=6))
    tokens, logprobs = zip(*made, strict=True)
    draft = Draft(*map(tuple, zip(*nodes, strict=True)), draft_id=draw(st.integers(1, 2**40))) if nodes else None
    return StepResult(tokens, logprobs, tuple(range(draw(st.integers(0, len(made) - 1)))), draft)


@settings(max_examples=60, deadline=None)
@given(st.lists(results(), max_size=3), st.integers(3, 5))
def test_results_come_out_as_they_went_in(own: list[StepResult], rows: int) -> None:
    words = outcome_words(own, (4, 6), rows)
    assert len(words) == len(outcome_words([], (4, 6), rows)), "the size follows from the order alone"
    assert outcome_of(words, (4, 6), len(own)) == own


@pytest.mark.parametrize("kind", [NumericalError, DraftNotFoundError])
def test_refusals_come_out_as_they_went_in(kind: type[SpeculatorError]) -> None:
    found = outcome_of(outcome_words(kind("the draft of Zoë " + "x" * 300), (4, 6), 2), (4, 6), 1)
    assert type(found) is kind and found.message.startswith("the draft of Zoë xxx")


def test_every_rank_comes_to_the_same_passes() -> None:
    feed, chain, tree = Feed((1, 2, 3), None), Draft((5, 6), (-1, 0)), Draft((5, 6), (-1, -1))
    steps = [
        Step(0, 0, (), Feed((1,), 2)),
        Step(5, 0, (), feed),
        Step(1, 4, (), None, 9, chain),
        Step(2, 4, (), None, 9),
    ]
    found = {Share(rank, 2, 4).passes(steps) for rank in range(2)}
    assert found == {Passes(Extent(1, 3, 3), Extent(1, 3, 3))}
    steps.append(steps[2]._replace(row=4, draft=tree))
    steps.append(steps[2]._replace(row=3, draft=Draft()))
    assert Share(1, 2, 4).passes(steps).verify == Extent(2, 3, 6, trees=True)
    assert [step.row for step in Share(1, 2, 4).own(steps)] == [1, 0]
