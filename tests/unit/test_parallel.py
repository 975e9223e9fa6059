"""Targets over several ranks: the same hidden states and logits as on one, from the shards of the same files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hybrid_models import hybrid_target

from speculator.sampling import gumbel_of
from target.config import load_config
from target.errors import CheckpointError, PlanError
from target.load import load_target
from target.parallel import TENSOR, Axis, check_divides, merge, shard_config
from target.readout import Readout, read_logits
from target.shards import Cut, ShardFiles, cut_of
from tests.unit.parallel_programs import grid, passes, question, questions, shard_passes, states, wrong_grid
from tests.unit.ranks import Ending, run_ranks
from tests.unit.targets import FAMILIES, SIZES, save_reference

CASES = [
    ("llama", 2, {"num_key_value_heads": 2}),
    ("llama", 4, {"num_key_value_heads": 2}),  # key-value heads repeated, a vocabulary of 53 padded to 56
    ("llama-biases", 2, {"num_key_value_heads": 2}),
    ("qwen3-biases", 2, {}),
    ("qwen2-window", 2, {}),
    ("qwen3_moe", 2, {}),
    ("deepseek_v3", 2, {}),
    ("deepseek_v2-greedy", 4, {}),
]


@pytest.mark.parametrize(("family", "size", "changes"), CASES, ids=lambda value: str(value))
def test_a_target_over_ranks_computes_what_one_rank_does(
    family: str, size: int, changes: dict[str, Any], tmp_path: Path
) -> None:
    save_reference(tmp_path / "model", family, **changes)
    whole = load_target(tmp_path / "model", torch.float32)
    endings = run_ranks(shard_passes, size, tmp_path / "ranks", str(tmp_path / "model"), size)
    assert [e.error + e.text for e in endings] == [""] * size
    outcomes = [ending.value for ending in endings]
    for ours, one in zip(outcomes[0][0], passes(whole), strict=True):
        torch.testing.assert_close(torch.tensor(ours), one, atol=2e-5, rtol=2e-4)
    assert all(values == outcomes[0][0] for values, _ in outcomes), "ranks must agree bit for bit"
    assert max(count for _, count in outcomes) < 0.8 * sum(p.numel() for p in whole.parameters())


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_a_rank_reads_its_shard_and_no_more(family: str, tmp_path: Path) -> None:
    save_reference(tmp_path, family, num_key_value_heads=4)
    config = load_config(tmp_path)
    whole = ShardFiles(tmp_path, config, Axis(TENSOR))
    for _ in whole.items():
        pass
    shards = [ShardFiles(tmp_path, config, Axis(TENSOR, rank, 4)) for rank in range(4)]
    pieces = [dict(files.items()) for files in shards]
    cuts = {name: cut_of(name, config.num_kv_heads, shards[0].axis) for name in pieces[0]}
    shared = sum(t.numel() * 4 for name, t in pieces[0].items() if cuts[name] is None)
    assert sum(files.bytes_read for files in shards) == whole.bytes_read + 3 * shared
    assert max(files.bytes_read for files in shards) < 0.45 * whole.bytes_read
    for name, tensor in whole.items():
        cut = cuts[name]
        parts = [piece[name] for piece in pieces]
        rebuilt = parts[0] if cut is None else torch.cat(parts, dim=cut.dim)[: len(tensor)]
        assert torch.equal(rebuilt, tensor), name


def test_rows_of_a_vocabulary_are_padded_and_other_sizes_must_divide() -> None:
    assert [Cut(0, i, 4, padded=True).span("t", 53) for i in range(4)] == [(0, 14), (14, 28), (28, 42), (42, 53)]
    assert Cut(0, 3, 4, padded=True).span("t", 9) == (9, 9)
    with pytest.raises(CheckpointError, match=r"t has 10 in dimension 1, which 4 ranks do not divide"):
        Cut(1, 0, 4).span("t", 10)


@pytest.mark.parametrize(
    ("changes", "size", "text"),
    [
        ({}, 3, r"3 ranks do not divide 4 attention heads and 56 inner columns of an MLP of LlamaForCausalLM"),
        ({"intermediate_size": 54}, 4, r"54 inner columns of an MLP"),
        ({"num_attention_heads": 12, "num_key_value_heads": 3, "head_dim": 8}, 4, r"3 key-value heads .* 4 ranks"),
    ],
)
def test_what_does_not_divide_is_named(changes: dict[str, Any], size: int, text: str, tmp_path: Path) -> None:
    kind, given = FAMILIES["llama"]
    sizes = {**SIZES, "architectures": ["LlamaForCausalLM"]}
    kind(**{**sizes, **given, **changes}).save_pretrained(tmp_path)
    with pytest.raises(PlanError, match=text):
        check_divides(load_config(tmp_path), size)


def test_hybrids_are_not_divided() -> None:
    hybrid = hybrid_target().config
    with pytest.raises(PlanError, match="has recurrent layers, which tensor parallelism does not divide"):
        check_divides(hybrid, 2)
    check_divides(hybrid, 1)


@pytest.mark.parametrize("kind", ["greedy", "best", "drawn", "ranked"])
@pytest.mark.parametrize("size", [2, 4])
def test_questions_about_logits_are_answered_without_gathering_them(size: int, kind: str, tmp_path: Path) -> None:
    save_reference(tmp_path / "model", "llama")
    whole = load_target(tmp_path / "model", torch.float32)
    logits = whole.logits(states(whole.config.hidden_size))[0]
    wanted = read_logits(logits, question(kind), gumbel_of)
    endings = run_ranks(questions, size, tmp_path / "ranks", str(tmp_path / "model"), size, kind)
    assert [e.error + e.text for e in endings] == [""] * size
    assert all(e.value == endings[0].value for e in endings), "ranks must agree bit for bit"
    for found, expected in zip(endings[0].value, wanted, strict=True):
        assert (found is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(torch.tensor(found, dtype=expected.dtype), expected, atol=2e-6, rtol=1e-5)


def test_equal_scores_of_two_ranks_give_the_smaller_column() -> None:
    part = Readout(
        *(torch.tensor([[value]]) for value in (3, 1.5, 1.5)), torch.tensor([2.0]), None, torch.tensor([True])
    )

    class Twice(Axis):
        def gather(self, x: torch.Tensor) -> torch.Tensor:
            later = x.clone()
            later[:, 0] = torch.tensor([7], dtype=torch.int32).view(torch.float32)
            return torch.stack((x, later))

    merged = merge(part, Twice(TENSOR, 0, 2))
    assert merged.columns.tolist() == [[3]]
    assert merged.total.item() == pytest.approx(2.0 + math.log(2))


def test_a_mesh_divides_ranks_along_named_axes(tmp_path: Path) -> None:
    assert run_ranks(grid, 4, tmp_path) == [
        Ending(value=[0, 0, 3.0, [1.0, 3.0]]),
        Ending(value=[1, 0, 3.0, [2.0, 4.0]]),
        Ending(value=[0, 1, 7.0, [1.0, 3.0]]),
        Ending(value=[1, 1, 7.0, [2.0, 4.0]]),
    ]


def test_a_mesh_of_another_size_is_refused_before_any_group(tmp_path: Path) -> None:
    endings = run_ranks(wrong_grid, 2, tmp_path)
    assert {(e.error, e.text) for e in endings} == {("PlanError", "a mesh of 3 tensor needs 3 ranks, and 2 run")}


def test_one_rank_holds_the_whole_config(tmp_path: Path) -> None:
    save_reference(tmp_path, "llama")
    config = load_config(tmp_path)
    assert shard_config(config, 1) == config
