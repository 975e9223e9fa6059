"""Absorbed MLA: the planner, lazy metadata, the torch reference, and the Triton kernels where triton is installed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphs.tape import TapeRecorder
from speculator.bench.mla import _choices, _losses
from target.attention.flash import SchedulerMetadata
from target.attention.mla import MlaAttention, MlaMetadata, MlaPlan, PassShape, TorchSplits, parts
from target.attention.splits import BLOCK, Splits, aligned, empty_splits, fill_splits, gap
from target.batch import Batch
from target.errors import PlanError
from tests.unit.mla_scenes import RANK, ROPE, SCALE, SCENES, by_hand, run, scene

lengths = st.lists(st.sampled_from([0, 1, 63, 64, 65, 100, 640, 1000]) | st.integers(0, 9000), min_size=1, max_size=20)
many = settings(max_examples=60, deadline=None, derandomize=True)


def planned(stored: Sequence[int], pieces: int, grain: int = 1) -> Splits:
    plan = empty_splits(len(stored), pieces, torch.device("cpu"))
    fill_splits(plan, torch.tensor(stored), grain)
    return plan


def blocks_of(plan: Splits, stored: Sequence[int]) -> list[list[tuple[int, int, int, bool]]]:
    """Per part: (request, split, block, is_split), walked as a kernel walks a record."""
    counts, walked = [-(-n // BLOCK) for n in stored], []
    for first, last, from_block, to_block, split, head, tail, _ in plan.plan.tolist():
        part = []
        for request in range(first, last + 1):
            begin = from_block if request == first else 0
            end = to_block if request == last else counts[request]
            flag = bool(request == first and head or request == last and tail)
            part += [(request, split if request == first else 0, block, flag) for block in range(begin, end)]
        walked.append(part)
    return walked


# ---- the planner ----


@many
@given(stored=lengths, pieces=st.integers(1, 140), grain=st.integers(1, 4))
def test_every_block_belongs_to_one_part_and_splits_are_numbered_through(
    stored: list[int], pieces: int, grain: int
) -> None:
    plan = planned(stored, pieces, grain)
    walked = [one for part in blocks_of(plan, stored) for one in part]
    assert sorted((r, b) for r, _, b, _ in walked) == [
        (r, b) for r, n in enumerate(stored) for b in range(-(-n // BLOCK))
    ]
    spread = [0] * len(stored)
    for request in range(len(stored)):
        mine = [one for one in walked if one[0] == request]
        spread[request] = len({split for _, split, _, _ in mine})
        assert sorted({split for _, split, _, _ in mine}) == list(range(spread[request]))
        assert [split for _, split, _, _ in mine] == sorted(split for _, split, _, _ in mine)
        assert all(flag == (spread[request] > 1) for _, _, _, flag in mine)
    assert plan.splits.tolist() == [sum(spread[:r]) for r in range(len(stored) + 1)]


@many
@given(stored=lengths, pieces=st.integers(1, 140))
def test_no_part_is_overloaded(stored: list[int], pieces: int) -> None:
    start = gap(pieces, len(stored))
    total = max(sum(-(-n // BLOCK) + start for n in stored if n) - start, 0)
    for part in blocks_of(planned(stored, pieces), stored):
        cost = len(part) + start * len({request for request, *_ in part})
        assert cost <= max(-(-total // pieces), 1) + start
    assert len(blocks_of(planned(stored, pieces), stored)) == pieces


def test_grain_keeps_short_requests_together() -> None:
    assert planned([64 * 8], 132).splits.tolist() == [0, 8]
    assert planned([64 * 8], 132, grain=4).splits.tolist()[1] <= 3


@pytest.mark.parametrize(("tiles", "requests", "spread"), [(4, 32, 1), (2, 32, 2), (1, 32, 4), (8, 32, 1), (1, 66, 2)])
@pytest.mark.parametrize("stored", [512, 4096, 65536])
def test_equal_requests_are_cut_no_more_than_needed(tiles: int, requests: int, spread: int, stored: int) -> None:
    plan = planned([stored] * requests, aligned(132 // tiles, requests))
    assert plan.splits.diff().tolist() == [spread] * requests


def test_few_parts_are_given_up_for_whole_requests() -> None:
    assert [aligned(33, n) for n in (1, 5, 11, 32, 64, 25, 200)] == [33, 30, 33, 32, 32, 33, 33]


def test_parts_times_tiles_fill_the_device() -> None:
    assert [parts(132, pairs) for pairs in (1, 64, 65, 128, 1024, 64 * 133)] == [132, 132, 66, 66, 8, 1]


# ---- the torch reference ----


@pytest.mark.parametrize("name", SCENES)
@pytest.mark.parametrize("processors", [1, 4, 13])
def test_the_reference_computes_attention(name: str, processors: int) -> None:
    s = scene(**SCENES[name])
    got = run(s, MlaAttention(s.cache, RANK, "torch", processors))
    torch.testing.assert_close(got, by_hand(s), rtol=1e-4, atol=1e-5)


@many
@given(
    rows=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 6)), min_size=1, max_size=5),
    page_size=st.sampled_from([2, 16, 64]),
    offset=st.sampled_from([0, 1, 7]),
    tree=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_batch(rows: list[tuple[int, int]], page_size: int, offset: int, tree: bool, seed: int) -> None:
    s = scene(*zip(*rows, strict=True), page_size=page_size, offset=offset, tree=tree, seed=seed)  # type: ignore[misc]
    got = run(s, MlaAttention(s.cache, RANK, "torch", 5))
    torch.testing.assert_close(got, by_hand(s), rtol=1e-4, atol=1e-5)


# ---- lazy metadata ----


def test_metadata_is_empty_until_a_pass_uses_it() -> None:
    s = scene([100], [1])
    plan = MlaAttention(s.cache, RANK, "torch").plan(s.batch)
    assert plan.metadata == MlaMetadata()
    run(s, MlaAttention(s.cache, RANK, "torch"), plan)
    assert plan.metadata.shape == PassShape(1, 1, 3, RANK + ROPE, 16, False)


@pytest.mark.parametrize("to", [64, 65, 700])
def test_a_stale_plan_ignores_what_was_appended_and_a_fresh_one_does_not(to: int) -> None:
    """The plan of 30 tokens has one block; lengths are grown in place, as a recorded pass sees it."""
    s = scene([to], [1], room=8)
    attention = MlaAttention(s.cache, RANK, "torch")
    plan, kept = attention.plan(s.batch), s.cache.layers[1].clone()
    s.batch.context.fill_(29)
    first = run(s, attention, plan)
    s.batch.context.fill_(to)
    s.cache.layers[1].copy_(kept)
    fresh = run(s, attention)
    torch.testing.assert_close(fresh, by_hand(s), rtol=1e-4, atol=1e-5)
    stale = run(s, attention, plan)
    assert (stale - fresh).abs().max() > 0.01
    assert torch.equal(stale, first)  # as if nothing had been appended


def test_planning_again_gives_the_same_bits() -> None:
    s = scene([300, 1000, 2], [2, 3, 1])
    attention = MlaAttention(s.cache, RANK, "torch")
    plan = attention.plan(s.batch)
    first = run(s, attention, plan)
    assert torch.equal(first, run(s, attention, plan)) and torch.equal(first, run(s, attention))


def test_metadata_of_another_shape_is_refused() -> None:
    one, two = scene([100], [1]), scene([100], [2], heads=4)
    attention = MlaAttention(one.cache, RANK, "torch")
    plan = attention.plan(one.batch)
    run(one, attention, plan)
    with pytest.raises(PlanError, match="planned for queries 1, heads 3 and cannot serve a pass of queries 2, heads 4"):
        attention.run(MlaPlan(two.batch, plan.metadata), 1, two.q, two.latent, SCALE)


def test_nothing_is_derived_from_a_static_batch_before_it_runs() -> None:
    s = scene([400], [2])
    attention = MlaAttention(s.cache, RANK, "torch")
    plan = attention.plan(s.batch)
    s.batch.context.zero_()  # what a builder leaves there between plan and replay is nobody's business
    s.batch.context.fill_(400)
    torch.testing.assert_close(run(s, attention, plan), by_hand(s), rtol=1e-4, atol=1e-5)


class Recorded:
    """A pass over static tensors on the tape, with a plan that was or was not used by the warm-up."""

    def __init__(self, start: int, used: bool) -> None:
        s = scene([800, 700], [2, 2], page_size=64)
        self.scene = s._replace(batch=s.batch._replace(static=True))
        self.kept, self.tape = s.cache.layers[1].clone(), TapeRecorder()
        self.attention = MlaAttention(s.cache, RANK, "torch")
        self.set(start)
        plan = self.attention.plan(s.batch)
        run(self.scene, self.attention, plan if used else None)
        self.out, self.recording = self.tape.record(lambda: run(self.scene, self.attention, plan))

    def set(self, context: int) -> None:
        self.scene.batch.context.fill_(context)
        self.scene.cache.layers[1].copy_(self.kept)

    def compare(self, context: int) -> tuple[Tensor, Tensor]:
        """(replayed, eager) at a length."""
        self.set(context)
        self.recording.replay()
        replayed = self.out.clone()
        self.set(context)
        return replayed, run(self.scene, self.attention)


def test_a_recorded_pass_plans_again_at_every_replay() -> None:
    recorded = Recorded(29, used=False)
    for context in (29, 62, 63, 64, 128, 700, 3):
        replayed, eager = recorded.compare(context)
        assert torch.equal(replayed, eager)


def test_a_recorded_pass_with_a_used_plan_does_not() -> None:
    """The broken twin of the test above."""
    replayed, eager = Recorded(29, used=True).compare(700)
    assert (replayed - eager).abs().max() > 0.01


# ---- wrong input ----


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda s: MlaAttention(s.cache, 25), "no layer of the cache holds one latent of rank 25"),
        (lambda s: MlaAttention(s.cache, RANK, "cuda"), "unknown MLA backend 'cuda': auto, torch, triton or flash_mla"),
        (lambda s: MlaAttention(s.cache, RANK).plan(s.batch._replace(longest=0)), "how long its longest row"),
        (lambda s: run(s._replace(q=s.q[..., :-1]), MlaAttention(s.cache, RANK)), "queries of 23 over latents of 24"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_sentence(make, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(PlanError, match=words):
        make(scene([9], [1]))


def test_without_a_device_the_choice_is_torch() -> None:
    assert isinstance(MlaAttention(scene([9], [1]).cache, RANK).backend, TorchSplits)


# ---- adapters ----


class DenseFlashMla:
    """What FlashMLA computes: query t of T sees the first stored - T + t + 1 tokens; where that is none, NaN."""

    def __call__(self, q: Tensor, pages: Tensor, table: Tensor, stored: Tensor, scale: float, causal: bool) -> Tensor:
        assert (table.dtype, stored.dtype, causal) == (torch.int32, torch.int32, q.shape[1] > 1)
        out = torch.full((*q.shape[:3], 512), torch.nan)
        for r, t in product(range(q.shape[0]), range(q.shape[1])):
            keys = pages[table[r].long()].flatten(0, 2)[: max(0, int(stored[r]) - q.shape[1] + t + 1)].float()
            if len(keys):
                out[r, t] = (q[r, t].float() @ keys.T * scale).softmax(-1) @ keys[:, :512]
        return out.to(q.dtype)


DEEPSEEK = dict(rank=512, rope=64, page_size=64, dtype=torch.bfloat16, scale=576**-0.5)


@pytest.mark.parametrize("name", ["one token", "a chain", "ragged rows", "padded rows", "a chain above the context"])
def test_flash_mla_gets_every_row_as_its_mask_wants_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("target.attention.flash.find_flash_mla", lambda: DenseFlashMla)
    s = scene(**{**SCENES[name], **DEEPSEEK})
    got = run(s, MlaAttention(s.cache, 512, "flash_mla"))
    torch.testing.assert_close(got.float(), by_hand(s), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(page_size=16), "reads pages of 64 tokens, not 16"),
        (dict(rank=256), r"takes latents of 512 \+ 64, not 256 \+ 64"),
        (dict(dtype=torch.float32), "computes in 16 bits, not in torch.float32"),
        ({}, "needs the package flash_mla, or a build named by SPECULATOR_FLASHMLA"),
    ],
)
def test_flash_mla_says_what_it_cannot_read(
    changes: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SPECULATOR_FLASHMLA", raising=False)
    s = scene([9], [1], **{**DEEPSEEK, **changes})
    with pytest.raises(PlanError, match=words):
        MlaAttention(s.cache, s.rank, "flash_mla")


def test_flash_mla_refuses_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("target.attention.flash.find_flash_mla", lambda: DenseFlashMla)
    s = scene([9], [3], tree=True, **DEEPSEEK)
    with pytest.raises(PlanError, match="no tree mask"):
        MlaAttention(s.cache, 512, "flash_mla").plan(s.batch)


@pytest.mark.parametrize("place", ["nothing here", "."])
def test_a_build_that_is_not_there(place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPECULATOR_FLASHMLA", str(tmp_path / place))
    with pytest.raises(PlanError, match="is neither a library nor a folder with a _flashmla_C"):
        MlaAttention(scene([9], [1], **DEEPSEEK).cache, 512, "flash_mla")


def test_a_file_that_is_no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "_flashmla_C.so").write_text("text")
    monkeypatch.setenv("SPECULATOR_FLASHMLA", str(tmp_path))
    with pytest.raises(PlanError, match="cannot be loaded here"):
        MlaAttention(scene([9], [1], **DEEPSEEK).cache, 512, "flash_mla")


def test_scheduler_metadata_stays_where_it_is() -> None:
    kept = SchedulerMetadata(8, torch.device("cpu"))
    address = kept.values.data_ptr()
    assert not kept.filled
    kept.refresh(torch.arange(1, 9, dtype=torch.int32))
    kept.refresh(torch.tensor([7, 7, 7], dtype=torch.int32))
    assert kept.filled and kept.values.data_ptr() == address
    assert kept.values.tolist() == [7, 7, 7, 0, 0, 0, 0, 0]  # nothing of the longer plan is left
    with pytest.raises(PlanError, match="a plan of 9 numbers does not fit the 8 of its storage"):
        kept.refresh(torch.zeros(9, dtype=torch.int32))


# ---- the kernels, interpreted ----


def on_the_interpreter(test):  # type: ignore[no-untyped-def]
    numpy_grumbles = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
    return numpy_grumbles(pytest.mark.usefixtures("interpreted")(test))


@pytest.fixture
def interpreted() -> None:
    if find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs triton and TRITON_INTERPRET=1 from the start")
    numpy = pytest.importorskip("numpy")
    if tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4):
        pytest.skip("triton's interpreter converts arrays in a way numpy 2.4 forbids")


@on_the_interpreter
@pytest.mark.parametrize("name", [name for name in SCENES if name != "a prompt chunk"])
@pytest.mark.parametrize("processors", [1, 4, 13])
def test_the_kernels_compute_attention(name: str, processors: int) -> None:
    s = scene(**SCENES[name])
    got = run(s, MlaAttention(s.cache, RANK, "triton", processors))
    torch.testing.assert_close(got, by_hand(s), rtol=1e-4, atol=1e-5)


@on_the_interpreter
@pytest.mark.parametrize("tree", [False, True])
def test_blocks_through_the_copy_engine(tree: bool) -> None:
    """Powers of two in half precision over pages of whole blocks: the other way to read blocks below the context."""
    s = scene([200, 64, 63], [3, 1, 2], rank=32, rope=16, page_size=128, tree=tree, dtype=torch.float16)
    got = run(s, MlaAttention(s.cache, 32, "triton", 4))
    torch.testing.assert_close(got.float(), by_hand(s), rtol=2e-2, atol=2e-2)


@on_the_interpreter
@many
@given(stored=lengths, pieces=st.integers(1, 140), grain=st.integers(1, 4), offset=st.sampled_from([0, 9]))
def test_the_planning_kernel_computes_the_same_integers(
    stored: list[int], pieces: int, grain: int, offset: int
) -> None:
    from target.kernels.mla import Config, launch_plan

    counts = torch.tensor([min(n, 2) for n in stored])
    context = torch.tensor(stored) - counts
    none = torch.empty(0, dtype=torch.int64)
    batch = Batch(none, none, context, counts, none, offset=offset)
    plan = empty_splits(len(stored), pieces, torch.device("cpu"))
    launch_plan(plan, batch, Config(64, 8, 2, grain))
    expected = planned([n and n + offset for n in stored], pieces, grain)
    assert torch.equal(plan.plan, expected.plan) and torch.equal(plan.splits, expected.splits)


@on_the_interpreter
@pytest.mark.parametrize(("requests", "rows", "pieces"), [(2, 5, 40), (3, 50, 11), (3, 345, 5)])
def test_results_in_many_pieces_are_joined(requests: int, rows: int, pieces: int) -> None:
    """Request 0 is complete, the last has nothing; an empty piece holds NaN. Every way to cut the work up is taken."""
    from target.kernels.mla import launch_combine

    generator = torch.Generator().manual_seed(rows)
    splits = torch.tensor([0, 1] + [pieces + 1] * (requests - 1), dtype=torch.int32)
    partial = torch.randn(pieces + 1 + requests, rows, 24, generator=generator)
    lse = torch.randn(pieces + 1 + requests, rows, generator=generator) * 20
    lse[3], partial[3] = -torch.inf, torch.nan
    out = torch.full((requests, rows, 24), 7.0)
    launch_combine(partial, lse, splits, out)
    weights = (lse[1 : pieces + 1].double() * 0.6931471805599453).softmax(0)
    expected = (partial[1 : pieces + 1].nan_to_num().double() * weights[..., None]).sum(0).float()
    assert bool((out[0] == 7.0).all()) and bool((out[2:] == 0.0).all())
    torch.testing.assert_close(out[1], expected, rtol=1e-5, atol=1e-6)


def test_masks_that_do_not_lie_row_by_row() -> None:
    """They are copied; in a static batch, where a copy would go stale, they are refused."""
    s = scene([9, 5], [3, 3], tree=True)
    assert s.batch.ancestors is not None
    crooked = s._replace(batch=s.batch._replace(ancestors=s.batch.ancestors.t().contiguous().t()))
    attention = MlaAttention(s.cache, RANK, "torch")
    torch.testing.assert_close(run(crooked, attention), run(s, attention))
    assert attention.plan(crooked.batch).batch.ancestors.is_contiguous()  # type: ignore[union-attr]
    with pytest.raises(PlanError, match="must be contiguous"):
        attention.plan(crooked.batch._replace(static=True))


# ---- what is chosen ----


def test_the_table_of_kernels_covers_every_batch_and_its_first_line_that_holds_wins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernels = pytest.importorskip("target.kernels.mla")
    assert all(isinstance(kernels.chosen(n, rows), kernels.Config) for n in (1, 32, 300) for rows in (1, 64, 2048))
    assert all(config.kernel in kernels.HOPPER_KERNELS for _, _, config in kernels.CHOICES)
    table = ((256, 8, kernels.SEESAW), (0, 16, kernels.HOPPER._replace(grain=2)), (0, 0, kernels.HOPPER))
    monkeypatch.setattr(kernels, "CHOICES", table)
    asked = [(8, 256), (16, 255), (7, 256), (1, 1)]
    assert [kernels.chosen(*one) for one in asked] == [table[0][2], table[1][2], table[2][2], table[2][2]]


def test_few_rows_are_joined_by_more_programs() -> None:
    kernels = pytest.importorskip("target.kernels.mla")
    for rows, rank in ((1, 512), (128, 512), (1024, 512), (8192, 512), (8192, 24)):
        together, chunk, width = kernels.combine_tile(rows, rank)
        assert together * chunk * width <= 4096 and -(-rows // together) * -(-rank // width) >= min(rows, 2048)


def test_a_variant_s_loss_is_taken_over_the_cells_where_it_ran() -> None:
    cells = [{"a": (10.0, 5.0), "b": (20.0, 5.0), "c": (1.0, 1.0)}, {"a": (30.0, 10.0), "b": (15.0, 10.0)}]
    assert _losses(cells[1:]) == {"a": 0.5, "b": 0.0}
    assert set(_losses(cells)) == {"a", "b"}  # c did not run everywhere
    rows = [{"heads": 4, "queries": 2, "batch": 1, "times": {"a": (1.0, 1.0), "b": "wrong"}}]
    assert list(_choices(rows)) == ["rows    8 batch  1: a +0%"]
    assert list(_choices([{**rows[0], "times": {"b": "wrong"}}])) == ["rows    8 batch  1: nothing ran everywhere"]
