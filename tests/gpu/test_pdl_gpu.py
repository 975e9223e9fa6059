"""Programmatic dependent launch on a CUDA device: the same bits as in order, recorded, also among kernels of torch.

Each chain hands on what it just wrote, and its input changes before every replay, so a kernel that does not wait reads
what lay there before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from graphs.recorder import CudaRecorder
from target.attention.base import bind
from target.batch import Batch
from target.cache import PagedCache
from target.config import parse_config
from target.decoder import Decoder, cache_layer_shape
from target.fused import fuse
from target.pdl import pdl_possible
from target.products import (
    MOST_BLOCKS,
    TILES,
    Config,
    Entry,
    FastProduct,
    FixedProduct,
    Product,
    Table,
    choose_products,
)
from target.readout import Asked
from tests.gpu.sync import no_waiting

GPU = torch.device("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(find_spec("triton") is None, reason="needs triton"),
    pytest.mark.skipif(not pdl_possible(GPU) if torch.cuda.is_available() else True, reason="needs capability 9.0"),
]
SIZE = 2048
Chain = Callable[[Tensor, bool], Tensor]


def noise(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(*shape, generator=generator, device="cuda") * scale).to(torch.bfloat16)


@pytest.fixture
def recorder() -> Iterator[CudaRecorder]:
    found = CudaRecorder()
    yield found
    found.close()


def check(chain: Chain, recorder: CudaRecorder, rows: int = 8, replays: int = 50) -> None:
    """Eager and recorded, early and in order."""
    x = noise(rows, SIZE)
    recorder.warm(lambda: chain(x, True))
    out, recording = recorder.record(lambda: chain(x, True))
    for seed in range(replays):
        x.copy_(noise(rows, SIZE, seed=seed))
        expected = chain(x, False).clone()
        assert torch.equal(chain(x, True), expected)
        recording.replay()
        assert torch.equal(out, expected) and expected.isfinite().all(), seed
    recording.release()


def norm(x: Tensor, pdl: bool) -> Tensor:
    from target.kernels.norm import launch_norm

    return launch_norm(x, x, torch.ones(SIZE, dtype=x.dtype, device=x.device), 1e-5, pdl=pdl)[1]


def square(x: Tensor, config: Config, seed: int = 1) -> Tensor:
    from target.kernels.skinny import multiply

    if not ARRIVED:
        ARRIVED.append(torch.zeros(MOST_BLOCKS, dtype=torch.int32, device="cuda"))
    return multiply(x, weights(SIZE, SIZE, seed), None, config, ARRIVED[0])


WEIGHTS: dict[tuple[int, int, int], Tensor] = {}
ARRIVED: list[Tensor] = []


def weights(n: int, k: int, seed: int) -> Tensor:
    if (n, k, seed) not in WEIGHTS:
        WEIGHTS[n, k, seed] = noise(n, k, seed=seed, scale=k**-0.5)
    return WEIGHTS[n, k, seed]


@pytest.mark.parametrize("rows", [1, 8, 64])
@pytest.mark.parametrize(
    "config",
    [Config(32, 256), Config(64, 128, split=4), Config(64, 128, split=4, joined=True), Config(16, 128, tma=False),
     Config(64, 64, ahead=0), Config(128, 64, warps=8, ahead=256)],
)  # fmt: skip
def test_norms_and_products_by_turns(config: Config, rows: int, recorder: CudaRecorder) -> None:
    def chain(x: Tensor, pdl: bool) -> Tensor:
        for turn in range(6):
            x = square(norm(x, pdl), config._replace(pdl=pdl), turn)
        return x

    check(chain, recorder, rows)
    assert not ARRIVED[0].any()


def test_products_one_after_the_other(recorder: CudaRecorder) -> None:
    def chain(x: Tensor, pdl: bool) -> Tensor:
        for turn in range(12):
            parts = dict(split=1 + turn % 2, joined=turn % 4 == 1)
            x = square(x, Config(32, 128, **parts, pdl=pdl and turn % 3 > 0), turn % 4)
        return x

    check(chain, recorder)


def test_silu_inside_and_after_a_product(recorder: CudaRecorder) -> None:
    from target.kernels.silu import launch_gated, launch_silu_mul

    def chain(x: Tensor, pdl: bool) -> Tensor:
        config, both = Config(64, 128, stages=3, pdl=pdl), weights(2 * SIZE, SIZE, 9)
        for _ in range(3):
            x = launch_gated(norm(x, pdl), both, None, config)
            wide = torch.cat((norm(x, pdl), square(norm(x, pdl), config)), -1)
            x = norm(launch_silu_mul(wide, pdl), pdl)
        return x

    check(chain, recorder)


@pytest.mark.parametrize("best", [1, 4])
def test_what_is_read_of_the_vocabulary(best: int, recorder: CudaRecorder) -> None:
    from target.kernels.lm_head import launch_read

    table = weights(32000, SIZE, 5)

    def chain(x: Tensor, pdl: bool) -> Tensor:
        for _ in range(3):
            found = launch_read(norm(x, pdl), table, Asked(best=best), Config(64, 128, stages=3, pdl=pdl))
            x = norm(F.embedding(found.columns[:, 0], table) + found.total[:, None].to(x.dtype), pdl)
        return x

    check(chain, recorder)


def test_what_a_draft_step_begins_with(recorder: CudaRecorder) -> None:
    from target.kernels.norm import launch_beside
    from target.kernels.turn import launch_turn

    table, ones = weights(1000, SIZE, 6), torch.ones(SIZE, dtype=torch.bfloat16, device="cuda")
    inverse = torch.rand(32, device="cuda")

    def chain(x: Tensor, pdl: bool) -> Tensor:
        for _ in range(3):
            tokens = x[:, :4].float().argmax(-1)
            wide = launch_beside(tokens, table, ones, 1e-5, norm(x, pdl), ones, 1e-5, pdl)
            cos, sin = launch_turn(tokens * 100, inverse, 1.0, False, x.dtype, pdl)
            x = norm(wide[:, :SIZE] + wide[:, SIZE:] * cos.sum(-1) + sin.sum(-1), pdl)
        return x

    check(chain, recorder)


def test_between_memory_that_is_set_and_copied(recorder: CudaRecorder) -> None:
    """What is no kernel is waited for as ever."""
    kept = torch.empty(8, SIZE, dtype=torch.bfloat16, device="cuda")

    def chain(x: Tensor, pdl: bool) -> Tensor:
        for turn in range(4):
            made = norm(x, pdl)
            kept.zero_()
            kept[:4].copy_(made[:4])
            x = square(kept, Config(32, 128, pdl=pdl), turn) + made
        return x

    check(chain, recorder)


def test_behind_a_fork_and_a_join(recorder: CudaRecorder) -> None:
    from target.kernels.norm import launch_norm

    aside, ones = torch.cuda.Stream(), torch.ones(SIZE, dtype=torch.bfloat16, device="cuda")

    def chain(x: Tensor, pdl: bool) -> Tensor:
        for turn in range(4):
            x, here = norm(x, pdl), torch.cuda.current_stream()
            aside.wait_stream(here)
            with torch.cuda.stream(aside):
                other = square(x, Config(32, 128, pdl=pdl), turn)
            mine = square(x, Config(64, 128, split=4, pdl=pdl), turn + 1)
            here.wait_stream(aside)
            other.record_stream(here)
            x = launch_norm(mine, other, ones, 1e-5, pdl=pdl)[1]
        return x

    check(chain, recorder)


# ---- a pass ----

LLAMA: dict[str, Any] = dict(
    architectures=["LlamaForCausalLM"], vocab_size=256, hidden_size=2048, intermediate_size=8192,
    num_hidden_layers=4, num_attention_heads=32, num_key_value_heads=8, rms_norm_eps=1e-5, rope_theta=500000.0,
    max_position_embeddings=8192,
)  # fmt: skip
QWEN3 = {**LLAMA, "architectures": ["Qwen3ForCausalLM"], "head_dim": 128}
OURS = Config(32, 256, pdl=True)
SOME = {(2048, 2048): OURS, (2048, 4096): OURS, (2048, 8192): OURS._replace(split=2, ahead=128)}
PRODUCTS: dict[str, Callable[[bool], Product]] = {
    "torch's products": lambda pdl: F.linear,
    "torch's and ours": lambda pdl: FastProduct(
        Table("", {shape: Entry(config, dict.fromkeys(TILES, config)) for shape, config in SOME.items()}, pdl)
    ),
    "fixed order": lambda pdl: FixedProduct(Table("", {}, pdl)),
}


class Pass:
    """Four fused layers over a cache, in order or early."""

    def __init__(self, raw: dict[str, Any], rows: int, queries: int, columns: int = 64) -> None:
        config = parse_config(raw)
        with torch.device("cuda"):
            self.model = Decoder(config).to(torch.bfloat16).requires_grad_(False)
            shape = cache_layer_shape(config)
            self.cache = PagedCache([[shape] * 4], columns * rows + 1, 64, torch.bfloat16, "cuda")
            pages = torch.arange(1, columns * rows + 1).view(rows, columns)
            self.context, self.tokens = torch.full((rows,), 512), torch.zeros(rows, queries, dtype=torch.int64)
            self.counts, self.steps = torch.full((rows,), queries), torch.arange(queries)
        self.pages, self.longest = pages, 64 * columns
        for parameter in self.model.parameters():
            if parameter.dim() > 1:
                parameter.data.copy_(noise(*parameter.shape, seed=parameter.shape[0], scale=parameter.shape[1] ** -0.5))
        self.reset()

    def reset(self) -> None:
        for i, layer in enumerate(self.cache.layers):
            layer.copy_(noise(*layer.shape, seed=i))

    def take(self, product: Product, pdl: bool) -> None:
        from target.attention.triton import TritonAttention

        fuse(self.model, pdl=pdl)
        choose_products(self.model, product)
        self.attention = TritonAttention(self.cache, pdl=pdl)

    def run(self) -> Tensor:
        positions = self.context[:, None] + self.steps  # written by the launch before, as in a round
        batch = Batch(self.tokens, positions, self.context, self.counts, self.pages, longest=self.longest, static=True)
        return self.model(self.tokens, positions, bind(self.attention, batch)).final

    def turn(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        room = self.longest - self.steps.shape[0]
        self.tokens.copy_(torch.randint(0, 256, self.tokens.shape, generator=generator))
        self.context.copy_(torch.randint(0, room, self.context.shape, generator=generator))
        self.counts.copy_(torch.randint(0, self.steps.shape[0] + 1, self.counts.shape, generator=generator))


@pytest.mark.parametrize("raw", [LLAMA, QWEN3], ids=["llama", "qwen3"])
@pytest.mark.parametrize(("rows", "queries"), [(1, 1), (1, 8), (4, 8), (1, 64)])
@pytest.mark.parametrize("products", PRODUCTS)
@torch.inference_mode()
def test_a_recorded_pass_of_four_layers(
    products: str, rows: int, queries: int, raw: dict[str, Any], recorder: CudaRecorder
) -> None:
    """200 replays with other tokens, lengths and numbers of tokens; results and what they leave in the cache."""
    found = Pass(raw, rows, queries)
    found.take(PRODUCTS[products](False), False)
    expected = []
    for seed in range(200):
        found.turn(seed)
        expected.append(found.run().clone())
    stored = [layer.clone() for layer in found.cache.layers]
    found.take(PRODUCTS[products](True), True)
    recorder.warm(found.run)
    out, recording = recorder.record(found.run)
    found.reset()
    for seed, wanted in enumerate(expected):
        found.turn(seed)
        with no_waiting():
            recording.replay()
        assert torch.equal(out, wanted) and wanted.isfinite().all(), seed
    assert all(torch.equal(a, b) for a, b in zip(found.cache.layers, stored, strict=True))
    recording.release()


@torch.inference_mode()
def test_a_prompt_chunk_and_a_pass_without_fused_attention(recorder: CudaRecorder) -> None:
    """Rotation and storing by themselves before attention of more than 64 queries."""
    found, outputs = Pass(LLAMA, 2, 70), []
    for pdl in (False, True):
        found.reset()
        found.take(F.linear, pdl)
        kept = []
        for seed in range(20):
            found.turn(seed)
            kept.append(found.run().clone())
        outputs.append(torch.stack(kept))
    assert torch.equal(*outputs) and outputs[0].isfinite().all()
