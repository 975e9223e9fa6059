"""`speculator bench round`: forced acceptance, the ledger, the floor, and the whole command on a tiny shape.

Owns: that its figures are what they say. Must never assert a time.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path

import engines
import pytest
import torch

from graphs.errors import CaptureError
from speculator.bench import round as bench
from speculator.bench import round_vllm
from speculator.bench.round_compiled import Peer, Size
from speculator.bench.round_floor import head_bytes, pass_bytes, round_bytes, target_bytes
from speculator.bench.round_forced import Depths, bend, conditional
from speculator.bench.round_ledger import (
    ATTENTION,
    ELEMENTWISE,
    GAPS,
    OTHER,
    PRODUCTS,
    SAMPLING,
    Kernel,
    in_milliseconds,
    ledger_of,
    median,
    part_of,
    profiled,
)
from speculator.bench.round_peers import compare
from speculator.bench.round_play import MODES, WRAP, Rows, play, recorded
from speculator.bench.synthetic import SHAPES
from speculator.errors import ConfigError
from speculator.passes import Verified
from speculator.recorded import Sizes
from speculator.sampling import gumbel_of
from speculator.tree import pack
from speculator.types import Draft, DraftShape
from target.batch import Batch
from target.readout import Asked, read_logits

CPU = torch.device("cpu")
CHAIN, TREE = DraftShape(3), DraftShape(3, 6, 2)


# ---- forced acceptance


@pytest.mark.parametrize("mean", [1.0, 2.0, 3.3, 4.0])
def test_drawn_depths_have_the_mean_even_over_few_rounds(mean: float) -> None:
    depths = Depths(mean, 3, CPU)
    assert float(depths.drawn.double().mean()) + 1 == pytest.approx(mean, abs=0.01)
    assert float(depths.drawn[:40].double().mean()) + 1 == pytest.approx(mean, abs=0.15)


def test_a_mean_that_no_draft_can_have_is_refused() -> None:
    assert conditional(4.0, 3) == pytest.approx(1.0)
    for mean in (0.5, 4.5):
        with pytest.raises(ValueError, match="commit 1 to 4 tokens"):
            conditional(mean, 3)


def test_two_runs_are_asked_the_same() -> None:
    depths = Depths(2.5, 3, CPU)
    first = [depths.next(2).tolist() for _ in range(5)]
    depths.restart()
    assert [depths.next(2).tolist() for _ in range(5)] == first


def batch_of(drafts: list[Draft]) -> Batch:
    tree = pack(drafts, [9] * len(drafts), CPU)
    context = torch.full((len(drafts),), 20)
    return Batch(
        tree.tokens, context[:, None] + tree.depths, context, tree.counts, torch.zeros(len(drafts), 1),
        None if tree.chain else tree.ancestors,
    )  # fmt: skip


def walk(draft: Draft, best: list[int]) -> int:
    """Levels that greedy verification accepts; `best` is the target's choice after each node, the root first."""
    here, levels = -1, 0
    while True:
        fits = [i for i, p in enumerate(draft.parents) if p == here and draft.tokens[i] == best[here + 1]]
        if not fits:
            return levels
        here, levels = fits[0], levels + 1


@pytest.mark.parametrize("levels", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "drafts",
    [
        [Draft((1, 2, 3), (-1, 0, 1)), Draft((4, 4, 4), (-1, 0, 1))],
        [Draft((1, 2, 3, 4, 5, 6), (-1, -1, 0, 1, 3, 3)), Draft((7, 8, 9), (-1, 0, 1))],
    ],
)
def test_bent_logits_accept_exactly_so_many_levels(drafts: list[Draft], levels: int) -> None:
    batch = batch_of(drafts)
    for seed in range(5):
        logits = torch.randn(2, batch.tokens.shape[1], 12, generator=torch.Generator().manual_seed(seed)) - 50
        logits[0, 0, 1] = 100.0  # the target would have accepted
        bent = bend(Verified(logits, logits), batch, torch.tensor([levels, levels])).logits
        assert bent.isfinite().all()
        assert [walk(draft, bent[i].argmax(-1).tolist()) for i, draft in enumerate(drafts)] == [levels, levels]


@pytest.mark.parametrize("levels", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "drafts",
    [
        [Draft((1, 2, 3, 4, 5, 6), (-1, -1, 0, 1, 3, 3)), Draft((7, 8, 9), (-1, 0, 1))],
        [Draft((1, 0, 0), (-1, 0, 1)), Draft((0, 9, 11), (-1, 0, 1))],
    ],
)
def test_bent_readings_accept_exactly_so_many_levels(drafts: list[Draft], levels: int) -> None:
    batch = batch_of(drafts)
    for seed in range(5):
        logits = torch.randn(2, batch.tokens.shape[1], 12, generator=torch.Generator().manual_seed(seed))
        logits[0, 0, 1] = 100.0  # the target would have accepted
        flat = logits.flatten(0, 1)
        verified = Verified(logits, lambda: logits, lambda asked: read_logits(flat, asked, gumbel_of))  # noqa: B023
        bent = bend(verified, batch, torch.tensor([levels, levels])).read(Asked())
        assert bent is not None
        said = bent.columns.view_as(batch.tokens).tolist()
        assert all(0 <= token < 12 for row in said for token in row)
        assert [walk(draft, said[i]) for i, draft in enumerate(drafts)] == [levels, levels]


def tiny_engine(rows: int = 4):
    target = engines.tiny_target()
    return engines.tiny_engine(target, engines.tiny_head(target, "eagle3"), rows=rows)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [CHAIN, TREE])
def test_rounds_of_every_mode_commit_the_forced_tokens(mode: str, shape: DraftShape) -> None:
    engine, depths = tiny_engine(), Depths(2.5, 3, CPU)
    before = engine.passes
    with recorded(engine, mode, Sizes(2, 130, 4, shape), depths):
        played = play(engine, 2, 16, shape, 24, depths)
    assert played.replayed == (mode != "off")
    assert played.committed == pytest.approx(2.5, abs=0.25)
    assert played.ledger is not None and played.ledger.kernels > 0
    assert 16 <= played.context < 16 + WRAP
    assert engine.passes is before and engine.rounds is None


def test_every_mode_commits_the_same_number_of_tokens() -> None:
    committed = []
    for mode in MODES:
        engine, depths = tiny_engine(), Depths(3.0, 3, CPU)
        with recorded(engine, mode, Sizes(2, 130, 4, CHAIN), depths):
            committed.append(play(engine, 2, 16, CHAIN, 8, depths).committed)
    assert len(set(committed)) == 1


def test_an_engine_is_as_before_when_recording_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise CaptureError("no graph today")

    engine = tiny_engine()
    before = engine.passes
    monkeypatch.setattr("speculator.round.Rounds.capture", fail)
    with pytest.raises(CaptureError), recorded(engine, "round", Sizes(1, 130, 4, CHAIN), Depths(2, 3, CPU)):
        raise AssertionError("not reached")
    assert engine.passes is before and engine.rounds is None


@pytest.mark.parametrize("mode", MODES)
def test_long_plays_stay_in_their_pages(mode: str) -> None:
    """By the device's own count too, which a recorded round goes on from."""
    engine, depths = tiny_engine(), Depths(4.0, 3, CPU)
    with recorded(engine, mode, Sizes(1, 130, 4, CHAIN), depths):
        rows = Rows(engine, 1, 16, CHAIN)
        for _ in range(80):
            rows.round()
            assert 16 <= rows.cached[0] < 16 + WRAP
            assert int(engine.rows.cached[0]) < 16 + WRAP + 4
        rows.close()
    assert rows.committed > WRAP


# ---- the ledger


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("nvjet_tst_64x8_64x16_4x1_v_bz_TNT", PRODUCTS),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64", PRODUCTS),
        ("void cublasLt::splitKreduce_kernel<32, 16, int>", PRODUCTS),
        ("product_kernel", PRODUCTS),
        ("sum_kernel", PRODUCTS),
        ("gated_kernel", PRODUCTS),
        ("read_kernel", PRODUCTS),
        ("merge_kernel", SAMPLING),
        ("written_kernel", SAMPLING),
        ("floor_kernel", SAMPLING),
        ("judge_tree_kernel", SAMPLING),
        ("split_kernel", ATTENTION),
        ("combine_kernel", ATTENTION),
        ("void flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits>", ATTENTION),
        ("norm_kernel", ELEMENTWISE),
        ("rope_write_kernel", ELEMENTWISE),
        ("silu_mul_kernel", ELEMENTWISE),
        ("Memcpy DtoH (Device -> Pinned)", ELEMENTWISE),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<long>>", ELEMENTWISE),
        ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::ArgMaxOps<float>>>", SAMPLING),
        ("void at::native::sbtopk::gatherTopK<float>", SAMPLING),
        ("void at::native::(anonymous namespace)::cunn_SoftMaxForward<4, float>", SAMPLING),
        ("zz_unknown", OTHER),
    ],
)
def test_kernels_are_told_apart_by_name(name: str, part: str) -> None:
    assert part_of(name) == part


def test_overlapping_kernels_are_busy_once_and_the_rest_is_gaps() -> None:
    found = ledger_of([Kernel("gemm", 0, 10), Kernel("norm_kernel", 5, 20), Kernel("argmax", 40, 50)])
    assert (found.busy, found.span, found.kernels) == (30, 50, 3)
    assert (found.parts[PRODUCTS], found.parts[ELEMENTWISE], found.parts[SAMPLING]) == (10, 15, 10)
    told = in_milliseconds(found, 0.06)
    assert told[GAPS] == pytest.approx(0.03) and told[PRODUCTS] == pytest.approx(0.01)


def test_the_median_round_is_taken_part_by_part() -> None:
    found = median([ledger_of([Kernel("gemm", 0, end)]) for end in (1, 5, 100)])
    assert found.parts[PRODUCTS] == 5 and found.busy == 5


def test_the_profiler_s_operators_come_out_as_parts() -> None:
    x = torch.randn(64, 64)
    found = profiled(lambda: (x @ x).argmax(-1), 3, CPU)
    assert found is not None and found.span is None
    assert found.parts[PRODUCTS] > 0 and found.parts[SAMPLING] > 0 and found.parts[ATTENTION] == 0


# ---- the floor


def test_the_floor_of_an_8b_pass_is_what_it_reads() -> None:
    from target.config import parse_config
    from target.decoder import Decoder

    with torch.device("meta"):
        models = {name: Decoder(parse_config(raw)).to(torch.bfloat16) for name, (raw, _) in SHAPES.items()}
    assert target_bytes(models["llama-3.1-8b"]) == pytest.approx(15.01e9, rel=1e-3)
    tied = models["llama-3.2-1b"]
    assert target_bytes(tied) == 2 * sum(p.numel() for p in tied.parameters())
    assert target_bytes(models["llama-3.1-70b-tp4"]) == pytest.approx(70.6e9 * 2 / 4, rel=0.02)


def test_a_round_reads_the_head_once_a_level_and_the_context_with_it() -> None:
    engine = tiny_engine()
    head = engine.head
    assert head is not None and head.lm_head is not None
    vocabulary = head.lm_head.weight.numel() * 4
    one, two = head_bytes(head, 1), head_bytes(head, 2)
    layers = sum(p.numel() * 4 for p in head.layers.parameters())
    assert two - one == pytest.approx(layers + vocabulary, rel=0.02)
    fc = head.fc.weight.numel() * 4
    assert one == pytest.approx(layers + vocabulary + fc, rel=0.02)
    assert pass_bytes(engine, 2, 100) - pass_bytes(engine, 1, 100) == 100 * 6 * 2 * 2 * 8 * 4
    more = round_bytes(engine, CHAIN, 1, 100) - round_bytes(engine, CHAIN, 1, 0)
    assert more == 100 * (6 + 3) * 2 * 2 * 8 * 4


# ---- peers


def test_the_peer_s_decoder_is_one_that_attends_to_what_came_before() -> None:
    torch.manual_seed(0)
    peer = Peer(Size.of({**SHAPES["llama-tiny"][0], "num_hidden_layers": 2}), 16).eval()
    tokens = torch.randint(0, 512, (1, 6))
    with torch.no_grad():
        for parameter in peer.blocks.parameters():
            parameter.mul_(6)  # so that what a token attends to decides what follows
    with torch.inference_mode():
        whole = peer(tokens, torch.arange(6))
        parts = [peer(tokens[:, t : t + 1], torch.arange(t, t + 1)) for t in range(6)]
        assert torch.equal(whole, torch.cat(parts, dim=1))
        other = torch.cat((tokens[:, :5], tokens[:, 5:] + 1), dim=1)
        assert torch.equal(peer(other, torch.arange(6))[:, :5], whole[:, :5])


def test_a_peer_is_compared_to_the_same_work_alone() -> None:
    passes = [{"queries": 1, "context": 512, "ms": 4.0}, {"queries": 8, "context": 512, "ms": 5.0}]
    rounds = [
        {"draft": "chain 7", "rows": 8, "context": 512, "ms": 6.0},
        {"draft": "chain 7", "rows": 8, "context": 512, "ms": 5.5},
        {"draft": "tree 32, depth 6", "rows": 8, "context": 512, "ms": 1.0},
        {"draft": "chain 7", "rows": 8, "context": 512, "error": "x"},
    ]
    peers = [
        {"peer": "c", "queries": 8, "context": 512, "ms": 10.0},
        {"peer": "v", "depth": 0, "rows": 1, "context": 512, "ms": 6.0},
        {"peer": "v", "depth": 0, "rows": 8, "context": 512, "ms": 6.0},
        {"peer": "v", "depth": 7, "rows": 8, "context": 512, "ms": 11.0},
        {"peer": "v", "depth": 7, "rows": 1, "context": 512, "ms": 11.0},
        {"peer": "v", "error": "none"},
    ]
    compare(peers, passes, rounds)
    assert [peer.get("ratio") for peer in peers] == [2.0, 1.5, None, 2.0, None, None]


STAND_IN = """
import json, pathlib, time
__version__ = "0.0-stand-in"
class SamplingParams:
    def __init__(self, **kw): self.tokens = kw["max_tokens"]
class LLM:
    def __init__(self, model, speculative_config, max_model_len, **kw):
        assert json.loads((pathlib.Path(model) / "config.json").read_text())["model_type"] == "llama"
        if speculative_config:
            head = json.loads((pathlib.Path(speculative_config["model"]) / "config.json").read_text())
            assert head["draft_vocab_size"] == 256
        self.room = max_model_len
    def generate(self, prompts, params, use_tqdm):
        assert len(prompts[0]["prompt_token_ids"]) + params.tokens <= self.room
        time.sleep(params.tokens * 1e-4)
"""


@pytest.mark.parametrize("below", ["", "site"])
def test_vllm_runs_from_a_folder_in_a_process_of_its_own(tmp_path: Path, below: str) -> None:
    package = tmp_path / below / "vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(STAND_IN)
    raw, vocab = SHAPES["llama-tiny"]
    job = {"batches": [1, 2], "contexts": [16], "accept": 3.0, "depth": 3}
    found = round_vllm.vllm_rounds(raw, vocab, job, tmp_path)
    assert [(row["rows"], row["depth"], row["context"]) for row in found] == [(1, 3, 16), (2, 3, 16)]
    assert all(row["ms"] > 0 and row["peer"] == "vLLM 0.0-stand-in" for row in found)
    assert "vllm" not in sys.modules


def test_a_vllm_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    raw, vocab = SHAPES["llama-tiny"]
    job = {"batches": [1], "contexts": [16], "accept": 3.0, "depth": 0}
    (found,) = round_vllm.vllm_rounds(raw, vocab, job, tmp_path)
    assert "No module named 'vllm'" in found["error"]


# ---- the command

QUICK = ["--shape", "llama-tiny", "--device", "cpu", "--batches", "2", "--contexts", "24", "--rounds", "3",
         "--depth", "2", "--tree", "4", "2", "2", "--accept", "2"]  # fmt: skip


def test_the_command_writes_a_report_a_plot_and_says_synthetic(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("speculator.bench.round_policy.SETTLE", 4)
    monkeypatch.setattr("speculator.bench.round_policy.ROUNDS", 8)
    out = tmp_path / "round.json", tmp_path / "round.png"
    asked = ["--peer", "--policy-accept", "2", "--policy-batches", "2", "--json", str(out[0]), "--plot", str(out[1])]
    assert bench.main([*QUICK, *asked]) == 0
    report = json.loads(out[0].read_text())
    assert report["synthetic"] is True and report["provenance"]["commit"]
    (shape,) = report["shapes"]
    assert "acceptance forced to 2 tokens" in shape["says"] and "random weights" in shape["says"]
    assert len(shape["rounds"]) == 2 * 3 and not any("error" in row for row in shape["rounds"])
    for row in [*shape["rounds"], *shape["passes"]]:
        assert row["of_floor"] == pytest.approx(row["ms"] / row["floor_ms"], rel=0.02)
    assert {row["queries"] for row in shape["passes"]} == {1, 8, 64}
    assert [row["rows"] for row in shape["policy"]] == [2]
    assert all(row["ratio"] > 0 for row in shape["policy"])
    assert sum("ratio" in row for row in shape["peers"]) == 3
    assert out[1].read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert printed.lower().count("synthetic") >= 4 and "ledger" in printed


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--depth", "0", "--tree", "0", "0", "0"], "no round to time"),
        (["--accept", "9"], "--accept must be between 1 and 3"),
        (["--policy-accept", "9"], "--policy-accept must be between 1 and 3"),
        (["--batches", "0"], "must be at least 1"),
        (["--set", "engine.page_size"], "section.key=value"),
    ],
)
def test_wrong_arguments_get_a_sentence(more: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        bench.main([*QUICK, *more])
    assert words in caught.value.message


def test_a_cache_that_is_too_small_is_said_before_anything_runs() -> None:
    engine = tiny_engine()
    with pytest.raises(ConfigError, match="needs 100000 tokens of KV cache, memory holds"):
        bench._check_room(engine, 100000)


def test_a_recording_that_fails_is_told_in_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise CaptureError("no graph today")

    monkeypatch.setattr("speculator.round.Rounds.capture", fail)
    engine = tiny_engine()
    args = Namespace(rounds=2)
    settings = [bench.Setting("round", CHAIN, 1, 16)]
    (row,) = bench._one_recording(engine, args, settings, Depths(2, 3, CPU), 1e9)
    assert row["error"] == "no graph today" and row["graphs"] == "round"
