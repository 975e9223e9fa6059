"""Multi-head latent attention, as DeepSeek-V2 and V3 and GLM-4.7-Flash have it.

Owns: the arithmetic of one layer in its absorbed form. Must never know models, caches or files.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from target.config import RopeConfig
from target.config_mla import MlaConfig
from target.layers import RMSNorm
from target.rope import rotate, rotate_pairs, yarn_mscale

# attend(layer, q [R, T, heads, rank + rope_dim], latent [R, T, rank + rope_dim], scale) -> [R, T, heads, rank]
AttendLatent = Callable[[int, Tensor, Tensor, float], Tensor]

NORM_EPS = 1e-6  # of both low ranks, whatever the config says; as in transformers


class LatentAttention(nn.Module):
    """Attention over latents that all heads share (arXiv 2405.04434), absorbed: queries are moved into latent space.

    A token stores its normed latent and the rotated key of all heads; the up-projections of keys and values (`kv_b`)
    are applied to queries and results instead. That reads rank + rope_dim values a stored token, however many heads
    there are, for (2 rank + rope_dim) / (nope_dim + rope_dim + value_dim) times the multiplications: right for
    decoding, 3.4 times the work of the materialised form in a DeepSeek-V3 prompt.
    """

    def __init__(self, layer: int, size: int, heads: int, mla: MlaConfig, rope: RopeConfig) -> None:
        super().__init__()
        self.layer, self.heads, self.mla = layer, heads, mla
        self.scale = attention_scale(mla, rope)
        queries = heads * mla.query_dim
        self.first = mla.q_rank or queries  # width of the first projection of queries
        self.qkv_a = nn.Linear(size, self.first + mla.latent_dim, bias=False)
        self.q_norm = RMSNorm(mla.q_rank, NORM_EPS) if mla.q_rank else None
        self.q_b = nn.Linear(mla.q_rank, queries, bias=False) if mla.q_rank else None
        self.kv_norm = RMSNorm(mla.rank, NORM_EPS)
        # W_UK and W_UV, by head; no nn.Linear because it is used in two parts, on two sides of the attention
        self.kv_b = nn.Parameter(torch.empty(heads * (mla.nope_dim + mla.value_dim), mla.rank))
        nn.init.kaiming_uniform_(self.kv_b, a=5**0.5)
        self.o = nn.Linear(heads * mla.value_dim, size, bias=False)
        self._rotate = rotate_pairs if mla.interleaved else rotate

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: AttendLatent) -> Tensor:
        """x [R, T, size], cos and sin of Rope [R, T, 1, rope_dim] -> [R, T, size]."""
        m = self.mla
        q, latent, key = self.qkv_a(x).split_with_sizes((self.first, m.rank, m.rope_dim), dim=-1)
        latent = torch.cat((self.kv_norm(latent), self._rotate(key[..., None, :], cos, sin).squeeze(-2)), dim=-1)
        w_uk, w_uv = self.kv_b.unflatten(0, (self.heads, -1)).split_with_sizes((m.nope_dim, m.value_dim), dim=1)
        nope, rope = self._queries(q).split_with_sizes((m.nope_dim, m.rope_dim), dim=-1)
        absorbed = torch.einsum("rthn,hnk->rthk", nope, w_uk)
        out = attend(self.layer, torch.cat((absorbed, self._rotate(rope, cos, sin)), dim=-1), latent, self.scale)
        return self.o(torch.einsum("rthk,hvk->rthv", out, w_uv).flatten(-2))  # type: ignore[no-any-return]

    def _queries(self, q: Tensor) -> Tensor:
        """First projection [R, T, first] -> [R, T, heads, query_dim]."""
        if self.q_norm is not None and self.q_b is not None:
            q = self.q_b(self.q_norm(q))
        return q.unflatten(-1, (self.heads, -1))  # type: ignore[no-any-return]


def attention_scale(mla: MlaConfig, rope: RopeConfig) -> float:
    """1 / sqrt(query_dim), sharpened twice by YaRN's mscale_all_dim: once for queries, once for keys."""
    weight = rope.scaling.get("mscale_all_dim")
    sharper = yarn_mscale(float(rope.scaling["factor"]), float(weight)) if rope.kind == "yarn" and weight else 1.0
    return sharper * sharper / math.sqrt(mla.query_dim)
