"""Fused pieces of layers on a CUDA device: numbers, bits of a row, kernels of a layer, recorded layers."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from graphs.recorder import CudaRecorder
from target.attention.base import bind
from target.batch import Batch
from target.cache import PagedCache
from target.config import RopeConfig, parse_config
from target.decoder import Decoder, DecoderLayer, cache_layer_shape
from target.fused import FUSED, FUSED_PDL, GATED, GATED_ROWS, fuse, fuse_where_possible
from target.pdl import pdl_on
from target.products import Config
from tests.gpu.sync import no_waiting
from tests.unit.targets import twins
from tests.unit.test_fused import (
    FAMILIES,
    NORMED,
    ROPES,
    TURNS,
    check_beside,
    check_gated,
    check_norms,
    check_silu_mul,
    check_tables,
    check_turned,
    noise,
    parity,
    run_fused,
    turn_of,
)
from tests.unit.test_gqa import SCENES, Scene, scene

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(find_spec("triton") is None, reason="needs triton"),
]
GPU = torch.device("cuda")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LLAMA: dict[str, Any] = dict(
    architectures=["LlamaForCausalLM"], vocab_size=256, hidden_size=4096, intermediate_size=14336,
    num_hidden_layers=1, num_attention_heads=32, num_key_value_heads=8, rms_norm_eps=1e-5, rope_theta=500000.0,
    max_position_embeddings=4096,
)  # fmt: skip
QWEN3 = {**LLAMA, "architectures": ["Qwen3ForCausalLM"], "intermediate_size": 12288, "head_dim": 128}


@pytest.fixture(autouse=True, scope="module")
def full_float32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


# ---- numbers ----


@pytest.mark.parametrize("shape", [*NORMED, (1, 1, 4096), (2, 8, 8192), (3, 1, 16384)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_round_as_torch_does(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_norms(shape, dtype, GPU)


@pytest.mark.parametrize(("count", "size"), [(1, 48), (3, 64), (0, 32), (5, 4096), (64, 8192)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_embedding_and_a_hidden_state_are_normed_side_by_side(count: int, size: int, dtype: torch.dtype) -> None:
    check_beside(count, size, dtype, GPU)


@pytest.mark.parametrize("config", ROPES, ids=lambda config: config.kind)
@pytest.mark.parametrize(("dim", "interleaved"), [(128, False), (64, True), (48, False)])
def test_rotary_tables(config: RopeConfig, dim: int, interleaved: bool) -> None:
    check_tables(config, dim, interleaved, GPU)


@pytest.mark.parametrize("shape", [(3, 2, 96), (1, 3000), (0, 4), (64, 28672)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_silu_mul(shape, dtype, GPU)


@pytest.mark.parametrize(
    ("rows", "inner", "size"), [(1, 56, 48), (17, 130, 40), (64, 1000, 520), (70, 64, 33), (8, 14336, 4096)]
)
@pytest.mark.parametrize("config", [GATED, Config(32, 32, tma=False), Config(64, 64, stages=6)])
def test_a_product_that_ends_in_silu(rows: int, inner: int, size: int, config: Config) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        check_gated(rows, inner, size, True, config, dtype, GPU)
        check_gated(rows, inner, size, False, config, dtype, GPU)


def test_a_row_of_a_product_has_the_same_bits_whatever_shares_the_call() -> None:
    from target.kernels.silu import launch_gated

    x = noise(70, 4096, dtype=torch.bfloat16, device=GPU)
    weight = noise(2 * 512, 4096, dtype=torch.bfloat16, device=GPU, seed=1)
    whole = launch_gated(x, weight, None, GATED)
    for rows in (1, 2, 8, 17, 33, 64):
        assert torch.equal(launch_gated(x[:rows], weight, None, GATED), whole[:rows])


@pytest.mark.parametrize("name", SCENES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_takes_a_qkv_product(name: str, dtype: torch.dtype) -> None:
    s = scene(**SCENES[name], dtype=dtype, device="cuda")
    check_turned(s, turn_of(s, normed=True, share=0.5), None)


@pytest.mark.parametrize("kind", TURNS)
@pytest.mark.parametrize("queries", [1, 8, 64, 70])
@pytest.mark.parametrize("window", [None, 40])
def test_every_turn_of_a_large_model(kind: str, queries: int, window: int | None) -> None:
    for tree in (False, True) if queries <= 64 else (False,):
        s = scene([700, 0, 63, 64], [queries, 1, 0, queries], heads=32, kv_heads=8, dim=128, page_size=64,
                  dtype=torch.bfloat16, device="cuda", tree=tree)  # fmt: skip
        check_turned(s, turn_of(s, **TURNS[kind]), window)


@pytest.mark.parametrize("queries", [1, 8, 64])
def test_a_row_has_the_same_bits_whoever_else_is_there(queries: int) -> None:
    """And again and again: whichever split arrives last joins them in one order."""
    s = scene([3000, 3, 290, 1024], [queries] * 4, heads=32, kv_heads=8, dim=128, page_size=64,
              dtype=torch.bfloat16, device="cuda", room=5000)  # fmt: skip
    turn = turn_of(s, normed=True)
    together = run_fused(s, turn)
    for _ in range(20):
        assert torch.equal(run_fused(s, turn), together)
    for r in range(4):
        one, b = slice(r, r + 1), s.batch
        longest = int(b.context[r]) + queries
        alone = Batch(b.tokens[one], b.positions[one], b.context[one], b.counts[one], b.pages[one], longest=longest)
        row = Scene(s.cache, alone._replace(static=True), s.q[one], s.k[one], s.v[one])
        assert torch.equal(run_fused(row, turn._replace(cos=turn.cos[one], sin=turn.sin[one]))[0], together[r])


@pytest.mark.parametrize("family", [*FAMILIES, "deepseek_v3"])
def test_a_model_computes_the_same(family: str, tmp_path: Path) -> None:
    parity(twins(tmp_path, family, torch.float32, "cuda"), torch.float32, "cuda")


# ---- a layer ----


class Layer:
    """One fused layer of a large model over its own cache; `rows` sessions of `queries` tokens each."""

    def __init__(self, raw: dict[str, Any], rows: int, queries: int) -> None:
        from target.attention.triton import TritonAttention

        config = parse_config(raw)
        with torch.device("cuda"):
            model = Decoder(config).to(torch.bfloat16).requires_grad_(False)
            self.cache = PagedCache([[cache_layer_shape(config)]], 64 * rows + 1, 64, torch.bfloat16, "cuda")
            pages = torch.arange(1, 64 * rows + 1).view(rows, 64)
            self.context, counts = torch.full((rows,), 512), torch.full((rows,), queries)
            self.x, self.more = (torch.randn(rows, queries, config.hidden_size).to(torch.bfloat16) for _ in range(2))
        self.layer = model.layers[0]
        assert isinstance(self.layer, DecoderLayer)
        fuse(model)
        self.cache.layers[0].normal_()
        self.model, self.attention = model, TritonAttention(self.cache)
        positions = self.context[:, None] + torch.arange(queries, device="cuda")
        self.batch = Batch(positions, positions, self.context, counts, pages, longest=4096, static=True)
        self.turn = model.rope(positions, torch.bfloat16)

    def run(self) -> Tensor:
        x, more = self.layer.advance(self.x, self.more, *self.turn, bind(self.attention, self.batch))  # type: ignore[operator]
        return torch.stack((x, more))


@pytest.mark.parametrize("raw", [LLAMA, QWEN3], ids=["llama", "qwen3"])
@pytest.mark.parametrize(("rows", "queries"), [(1, 1), (1, 8), (8, 8), (1, GATED_ROWS)])
@torch.inference_mode()
def test_a_layer_is_seven_kernels_or_eight(raw: dict[str, Any], rows: int, queries: int) -> None:
    """Products count once: what cuBLAS launches to add up runs of K is its own, and has `splitKreduce` in its name."""
    layer = Layer(raw, rows, queries)
    attend = bind(layer.attention, layer.batch)
    for _ in range(2):
        layer.layer.advance(layer.x, layer.more, *layer.turn, attend)  # type: ignore[operator]
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU], acc_events=True) as seen:
        layer.layer.advance(layer.x, layer.more, *layer.turn, attend)  # type: ignore[operator]
        torch.cuda.synchronize()
    kernels = [event.name for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    ours = [name for name in kernels if name in ("norm_kernel", "split_kernel", "gated_kernel")]
    assert ours == ["norm_kernel", "split_kernel", "norm_kernel", "gated_kernel"], kernels
    apart = LLAMA["num_attention_heads"] // LLAMA["num_key_value_heads"] * queries > 16
    assert len([name for name in kernels if "splitkreduce" not in name.lower()]) == 7 + apart, kernels


@pytest.mark.parametrize("queries", [1, 8, 64])
@torch.inference_mode()
def test_a_recorded_layer_follows_its_lengths_without_asking_the_host(queries: int) -> None:
    layer, recorder = Layer(LLAMA, 2, queries), CudaRecorder()
    recorder.warm(layer.run)
    out, recording = recorder.record(layer.run)
    for contexts in ([512, 0], [63, 4000], [100, 1023]):
        layer.context.copy_(torch.tensor(contexts))
        expected = layer.run().clone()
        with no_waiting():
            recording.replay()
        assert torch.equal(out, expected) and out.isfinite().all()
    recording.release()
    recorder.close()


def test_fused_where_the_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECULATOR_FUSED", "on")
    layer = Layer(LLAMA, 1, 1)
    assert fuse_where_possible(GPU, layer.model) == 5
    assert layer.layer.mlp.pieces is (FUSED_PDL if pdl_on(GPU) else FUSED)
    monkeypatch.setenv("SPECULATOR_FUSED", "off")
    assert fuse_where_possible(GPU, layer.model) == 0
