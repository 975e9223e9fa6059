"""One decoder layer on a GPU, kernel by kernel: fused pieces beside torch's, and the ways to cut them.

Owns: the table. Run as `python -m speculator.bench.layer`; weights are random, and all ways run in the same process on
the same tensors. A figure is microseconds of a recorded loop's median, over layers enough to stay out of the L2 cache.
Must never decide anything: `target.fused` and `target.kernels.gqa.pick` hold the choices.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from speculator.bench.mla import microseconds
from speculator.bench.provenance import provenance
from speculator.bench.skinny import AHEAD, EPS
from target.attention.base import Turn, bind
from target.batch import Batch
from target.cache import PagedCache
from target.config import ModelConfig, parse_config
from target.decoder import DecoderLayer, cache_layer_shape, decoder_rope
from target.fused import GATED as GATED_FEW
from target.fused import GATED_MANY, fuse
from target.layers import TORCH, GatedMLP
from target.pdl import pdl_possible
from target.products import TILES, Config, Entry, FastProduct, Linear, Product, Table, choose_products, default_config

LAYERS = 4  # 1.7 GB of an 8B shape: none of it is still in the cache when its turn comes again
PAGE = 64
LLAMA_8B: dict[str, Any] = dict(
    architectures=["LlamaForCausalLM"], vocab_size=256, hidden_size=4096, intermediate_size=14336,
    num_hidden_layers=1, num_attention_heads=32, num_key_value_heads=8, rms_norm_eps=1e-5, rope_theta=500000.0,
    max_position_embeddings=1 << 17,
)  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": LLAMA_8B,
    "qwen3-8b": {**LLAMA_8B, "architectures": ["Qwen3ForCausalLM"], "intermediate_size": 12288, "head_dim": 128},
}
GATED = (
    Config(64, 128, stages=3), Config(64, 128, stages=5), Config(64, 256, stages=2), Config(64, 64, stages=6),
    Config(32, 128, stages=4), Config(32, 256, stages=3), Config(64, 128, stages=3, warps=8),
)  # fmt: skip


class Cell(NamedTuple):
    """One line of the table."""

    shape: str
    rows: int
    queries: int
    context: int


class Field:
    """Layers of one shape over one cache, and the activations of a pass."""

    def __init__(self, cell: Cell) -> None:
        from target.attention.triton import TritonAttention

        self.cell, config = cell, parse_config(SHAPES[cell.shape])
        self.layers = [_layer(config, i) for i in range(LAYERS)]
        columns = -(-(cell.context + cell.queries) // PAGE)
        pages = cell.rows * columns + 1
        shape = cache_layer_shape(config)
        self.cache = PagedCache([[shape] * LAYERS], pages, PAGE, torch.bfloat16, "cuda")
        for store in self.cache.layers:
            store.normal_()
        context = torch.full((cell.rows,), cell.context, device="cuda")
        positions = context[:, None] + torch.arange(cell.queries, device="cuda")
        table = (torch.randperm(pages - 1, device="cuda") + 1).view(cell.rows, columns)
        counts = torch.full_like(context, cell.queries)
        longest = cell.context + cell.queries
        self.batch = Batch(positions, positions, context, counts, table, longest=longest, static=True)
        self.attention = TritonAttention(self.cache, pdl=False)
        self.cos, self.sin = decoder_rope(config).cuda()(positions, torch.bfloat16)
        self.x, self.more = (self.noise(config.hidden_size) for _ in range(2))
        self.qkv = self.noise(config.num_heads + 2 * config.num_kv_heads, config.head_dim)

    def noise(self, *size: int) -> Tensor:
        return torch.randn(self.cell.rows, self.cell.queries, *size, dtype=torch.bfloat16, device="cuda")

    def layer(self, turn: int) -> DecoderLayer:
        return self.layers[turn % LAYERS]

    def take(self, product: Product, pdl: bool) -> None:
        """Fused pieces, these products, and each kernel early or not."""
        from target.attention.triton import TritonAttention

        fuse(*self.layers, pdl=pdl)
        for layer in self.layers:
            choose_products(layer, product)
        self.attention = TritonAttention(self.cache, pdl=pdl)

    def advance(self, turn: int) -> Any:
        attend = bind(self.attention, self.batch)
        return self.layer(turn).advance(self.x, self.more, self.cos, self.sin, attend)

    def turn(self, turn: int) -> Turn:
        attention: Any = self.layer(turn).attention
        q, k = attention.q_norm, attention.k_norm
        return Turn(self.cos, self.sin, *((q.weight, k.weight, q.eps) if q is not None else ()))


def _layer(config: ModelConfig, number: int) -> DecoderLayer:
    with torch.device("cuda"):
        layer = DecoderLayer(config, 0, cache_layer=number).to(torch.bfloat16)
    for parameter in layer.parameters():
        parameter.data.normal_(0, 0.02) if parameter.dim() > 1 else parameter.data.fill_(1)
    return layer.requires_grad_(False)


def whole(f: Field) -> Iterator[tuple[str, Callable[[int], object]]]:
    """With torch's pieces, then with ours and cuBLAS, with products of no table, and with those of the table.

    Each in order and, where the device can, with every kernel begun while the one before it ends.
    """
    yield "torch's pieces", f.advance
    table, device = Table.read(), f.x.device
    found = {"cuBLAS": {}, "default products": _default_entries(f)}
    if table.holds_for(device):
        found["the table's products"] = dict(table.entries)
    for pdl in (False, True) if pdl_possible(device) else (False,):
        for name, entries in found.items():
            product = FastProduct(Table("", entries, pdl)) if entries else F.linear
            f.take(product, pdl)
            yield f"fused, {name}{', PDL' if pdl else ''}", f.advance
    f.take(F.linear, False)


def _default_entries(f: Field) -> dict[tuple[int, int], Entry]:
    """All products but gate and up by the configurations that are taken where nothing was measured."""
    layer: Any = f.layers[0]
    shapes = [tuple(linear.weight.shape) for linear in (layer.attention.qkv, layer.attention.o, layer.mlp.down)]
    configs = {(n, k): default_config(n, k)._replace(pdl=True) for n, k in shapes}
    return {shape: Entry(config, dict.fromkeys(TILES, config)) for shape, config in configs.items()}


def attention(f: Field) -> Iterator[tuple[str, Callable[[int], object]]]:
    """From the qkv product to the o product: in one kernel, with a second one to join, with one more before."""
    from target.kernels import gqa
    from target.kernels.rope_write import launch_rope_write

    heads, dim = f.qkv.shape[2] - 2 * f.cache.layers[0].shape[2], f.qkv.shape[3]
    config = gqa.pick(f.cell.queries, heads, f.cache.layers[0].shape[2], dim, torch.bfloat16, f.qkv.device)
    zeros = torch.zeros(1 << 14, dtype=torch.int32, device="cuda")

    def one(chosen: gqa.Config, turn: int) -> Tensor:
        store = f.cache.layers[turn % LAYERS]
        return gqa.launch_attend(f.batch, f.qkv, store, PAGE, None, chosen, zeros, f.turn(turn))

    def apart(chosen: gqa.Config, turn: int) -> Tensor:
        store = f.cache.layers[turn % LAYERS]
        q = launch_rope_write(f.batch, f.qkv, f.turn(turn), store, PAGE)
        return gqa.launch_attend(f.batch, q, store, PAGE, None, chosen, zeros)

    for name, chosen in (("joined inside", config), ("joined after", config._replace(joined=0))):
        yield f"turned inside, {name}", partial(one, chosen)
        yield f"turned before, {name}", partial(apart, chosen)


def gated(f: Field) -> Iterator[tuple[str, Callable[[int], object]]]:
    """Gate and up with SiLU-mul: torch's product and torch's, or our, SiLU-mul; one kernel, cut in several ways."""
    from target.kernels.silu import launch_gated, launch_silu_mul

    def product(turn: int) -> Linear:
        mlp = f.layer(turn).mlp
        assert isinstance(mlp, GatedMLP)
        return mlp.gate_up

    def one(config: Config, turn: int) -> Tensor:
        return launch_gated(f.x, product(turn).weight, None, config)

    yield "torch", lambda turn: TORCH.gated(product(turn), f.x)
    yield "torch's product, our SiLU-mul", lambda turn: launch_silu_mul(product(turn)(f.x))
    for config in GATED:
        name = f"ends in SiLU, {config.block_n} x {config.block_k}, {config.stages} stages, {config.warps} warps"
        yield name, partial(one, config)


def norms(f: Field) -> Iterator[tuple[str, Callable[[int], object]]]:
    from target.kernels.norm import launch_norm

    norm = f.layers[0].post_norm
    yield "torch", lambda turn: TORCH.add_norm(norm, f.x, f.more)
    yield "ours", lambda turn: launch_norm(f.x, f.more, norm.weight, norm.eps)
    if pdl_possible(f.x.device):
        yield "ours, PDL", lambda turn: launch_norm(f.x, f.more, norm.weight, norm.eps, pdl=True)


def products(f: Field) -> Iterator[tuple[str, Callable[[int], object]]]:
    """A norm and a product that reads it, with cuBLAS and with ours, in order and begun early."""
    from target.kernels.norm import launch_norm

    ones = f.layers[0].post_norm.weight

    def pair(call: Product, weight_of: Callable[[DecoderLayer], Tensor], pdl: bool, turn: int) -> Tensor:
        normed = launch_norm(f.x, None, ones, EPS, pdl=pdl)[1]
        return call(normed.flatten(0, -2), weight_of(f.layer(turn)), None)

    for name, (weight_of, config, kernel) in _multiplied(f).items():
        yield f"norm and {name}, cuBLAS", partial(pair, F.linear, weight_of, False)
        yield (
            f"norm and {name}, {config.block_n} x {config.block_k} / {config.split}",
            partial(pair, _as(kernel, config._replace(pdl=False)), weight_of, False),
        )
        for ahead in AHEAD if pdl_possible(f.x.device) else ():
            early = _as(kernel, config._replace(pdl=True, ahead=ahead))
            yield f"norm and {name}, the same, PDL, {ahead} KiB ahead", partial(pair, early, weight_of, True)


Kernel = Callable[[Tensor, Tensor, Tensor | None, Config], Tensor]


def _multiplied(f: Field) -> dict[str, tuple[Callable[[DecoderLayer], Tensor], Config, Kernel]]:
    """Where a product's weights lie, how it is cut up and what multiplies."""
    from target.kernels.silu import launch_gated
    from target.kernels.skinny import multiply

    found: dict[str, tuple[Callable[[DecoderLayer], Tensor], Config, Kernel]] = {}
    for name in ("attention.qkv", "attention.o"):
        weight_of = attrgetter(f"{name}.weight")
        found[name.partition(".")[2]] = weight_of, default_config(*weight_of(f.layers[0]).shape), multiply
    config = GATED_FEW if f.cell.rows * f.cell.queries <= 16 else GATED_MANY
    found["gate and up"] = attrgetter("mlp.gate_up.weight"), config, launch_gated
    return found


def _as(kernel: Kernel, config: Config) -> Product:
    return lambda x, weight, bias: kernel(x, weight, bias, config)


@torch.inference_mode()
def measure(cell: Cell) -> dict[str, Any]:
    """Microseconds of every way, by part of the layer."""
    f = Field(cell)
    parts = {"layer": whole, "products": products, "attention": attention, "gate and up": gated, "norm": norms}
    times = {part: {name: round(microseconds(call), 2) for name, call in ways(f)} for part, ways in parts.items()}
    return {**cell._asdict(), "microseconds": times}


def _show(line: dict[str, Any]) -> None:
    print(f"\n{line['shape']}, {line['rows']} x {line['queries']} tokens over {line['context']}, random weights")
    for part, ways in line["microseconds"].items():
        for name, time in ways.items():
            print(f"  {part:12} {name:50} {time:8.2f} us")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["llama-3.1-8b"], choices=SHAPES)
    parser.add_argument("--passes", nargs="+", default=["1x1", "1x8", "1x64", "8x8"], metavar="ROWSxQUERIES")
    parser.add_argument("--contexts", nargs="+", type=int, default=[512, 4096])
    parser.add_argument("--json", help="write the figures here")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("the bench of a layer needs a CUDA device")
    sizes = [each.split("x") for each in args.passes]
    cells = [
        Cell(shape, int(rows), int(queries), context)
        for shape in args.shapes
        for context in args.contexts
        for rows, queries in sizes
    ]
    report = {"provenance": provenance(), "cells": []}
    for cell in cells:
        line = measure(cell)
        _show(line)
        report["cells"].append(line)  # type: ignore[attr-defined]
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
