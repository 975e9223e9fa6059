"""A peer in plain torch: a decoder of the same shape through torch.compile and a CUDA graph, on the same device.

Owns: that decoder, over a contiguous cache of one sequence. Must never share a line with the models it is compared to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speculator.bench.round_play import Timer


class Size(NamedTuple):
    """Widths of a decoder, read from a config.json."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    dim: int
    inner: int
    vocab: int

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> Size:
        heads, hidden = raw["num_attention_heads"], raw["hidden_size"]
        return cls(
            layers=raw["num_hidden_layers"],
            hidden=hidden,
            heads=heads,
            kv_heads=raw["num_key_value_heads"],
            dim=raw.get("head_dim", hidden // heads),
            inner=raw["intermediate_size"],
            vocab=raw["vocab_size"],
        )


class Block(nn.Module):
    """One layer with a cache of `room` tokens."""

    def __init__(self, size: Size, room: int) -> None:
        super().__init__()
        self.size = size
        self.before, self.between = nn.RMSNorm(size.hidden, 1e-5), nn.RMSNorm(size.hidden, 1e-5)
        self.qkv = nn.Linear(size.hidden, (size.heads + 2 * size.kv_heads) * size.dim, bias=False)
        self.out = nn.Linear(size.heads * size.dim, size.hidden, bias=False)
        self.gate_up = nn.Linear(size.hidden, 2 * size.inner, bias=False)
        self.down = nn.Linear(size.inner, size.hidden, bias=False)
        self.register_buffer("cache", torch.zeros(2, 1, size.kv_heads, room, size.dim))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, places: Tensor, mask: Tensor) -> Tensor:
        """x [1, T, hidden], cos and sin [T, dim], places [T] int64, mask [T, room] bool."""
        x = x + self.attend(self.before(x), cos, sin, places, mask)
        gate, up = self.gate_up(self.between(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)  # type: ignore[no-any-return]

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor, places: Tensor, mask: Tensor) -> Tensor:
        size, cache = self.size, self.get_buffer("cache")
        joined = self.qkv(x).view(1, -1, size.heads + 2 * size.kv_heads, size.dim).transpose(1, 2)
        q, k, v = joined.split((size.heads, size.kv_heads, size.kv_heads), dim=1)
        cache[0, :, :, places], cache[1, :, :, places] = turned(k, cos, sin), v
        seen = F.scaled_dot_product_attention(turned(q, cos, sin), cache[0], cache[1], attn_mask=mask, enable_gqa=True)
        return self.out(seen.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [1, heads, T, dim], halves paired."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


class Peer(nn.Module):
    """Tokens in, greedy tokens out."""

    def __init__(self, size: Size, room: int) -> None:
        super().__init__()
        self.size, self.room = size, room
        self.embed = nn.Embedding(size.vocab, size.hidden)
        self.blocks = nn.ModuleList(Block(size, room) for _ in range(size.layers))
        self.norm, self.head = nn.RMSNorm(size.hidden, 1e-5), nn.Linear(size.hidden, size.vocab, bias=False)

    def forward(self, tokens: Tensor, places: Tensor) -> Tensor:
        """tokens [1, T] at places [T] -> the most likely next tokens [1, T]."""
        x, half = self.embed(tokens), self.size.dim // 2
        angle = places[:, None] * 500000.0 ** (-torch.arange(half, device=places.device) / half)
        cos, sin = (wave.repeat(1, 2).to(x.dtype) for wave in (angle.cos(), angle.sin()))
        mask = torch.arange(self.room, device=places.device) <= places[:, None]
        for block in self.blocks:
            x = block(x, cos, sin, places, mask)
        return self.head(self.norm(x)).argmax(-1)  # type: ignore[no-any-return]


@torch.inference_mode()
def peer_passes(
    raw: Mapping[str, Any], queries: Sequence[int], context: int, device: torch.device, repeats: int
) -> dict[int, float]:
    """Median seconds of a compiled, recorded pass over so many queries behind `context` tokens."""
    peer = _random(Size.of(raw), context + max(queries), device, getattr(torch, raw["torch_dtype"]))
    compiled = torch.compile(peer, dynamic=False) if device.type == "cuda" else peer
    found = {}
    for count in queries:
        tokens = torch.randint(0, peer.size.vocab, (1, count), device=device)
        places = torch.arange(context, context + count, device=device)
        found[count] = Timer(device).median(partial(compiled, tokens, places), repeats)
    torch.compiler.reset()
    return found


def _random(size: Size, room: int, device: torch.device, dtype: torch.dtype) -> Peer:
    with torch.device("meta"):
        peer = Peer(size, room)
    peer = peer.to(dtype).to_empty(device=device)
    for parameter in peer.parameters():
        parameter.normal_(0, 0.02) if parameter.dim() > 1 else parameter.fill_(1)
    for buffer in peer.buffers():
        buffer.zero_()
    return peer.eval()
