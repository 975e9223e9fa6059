"""What hybrid targets weigh by a sigmoid: the result of attention, and the shared expert.

Owns: the arithmetic of these two. Must never know models, caches or files.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from target.attention.base import Attend
from target.config_moe import MoeConfig
from target.deltanet import HybridAttend
from target.layers import TORCH, ZeroCentredNorm
from target.moe import MoE


class GatedAttention(nn.Module):
    """Grouped-query attention whose queries bring a gate: o(attend(q, k, v) * sigmoid(gate)).

    As Qwen3-Next and Qwen3.5 have it: zero-centred norms of queries and keys by head, and rotation of the first part
    of a head. The rows of `qkv` hold query and gate of each head side by side, then keys, then values.
    """

    pieces = TORCH
    window = None

    def __init__(
        self, layer: int, size: int, heads: int, kv_heads: int, head_dim: int, norm_eps: float, bias: bool = False
    ) -> None:
        super().__init__()
        self.layer, self.heads, self.kv_heads, self.head_dim = layer, heads, kv_heads, head_dim
        self.qkv = nn.Linear(size, 2 * (heads + kv_heads) * head_dim, bias=bias)
        self.q_norm = ZeroCentredNorm(head_dim, norm_eps)
        self.k_norm = ZeroCentredNorm(head_dim, norm_eps)
        self.o = nn.Linear(heads * head_dim, size, bias=bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """x [R, T, size], cos and sin of Rope [R, T, 1, rotary_dim] -> [R, T, size]."""
        whole = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        queries, kv = whole.split_with_sizes((2 * self.heads, 2 * self.kv_heads), dim=-2)
        q, gate = queries.unflatten(-2, (self.heads, 2)).unbind(-2)
        attend = attend.attend if isinstance(attend, HybridAttend) else attend
        out = self.pieces.attend(self, torch.cat((q, kv), dim=-2), cos, sin, attend)
        return self.o((out * gate.sigmoid()).flatten(-2))  # type: ignore[no-any-return]


class GatedSharedMoE(MoE):
    """Routed experts, and a shared one that each token weighs by a sigmoid of its own."""

    def __init__(self, size: int, moe: MoeConfig) -> None:
        super().__init__(size, moe)
        self.shared_gate = nn.Linear(size, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[R, T, size] -> [R, T, size]."""
        tokens = x.flatten(0, -2)
        out = self.experts(tokens, *self.gate(tokens)).view_as(x)
        if self.shared is None:
            return out  # type: ignore[no-any-return]
        return torch.addcmul(out, self.shared_gate(x).sigmoid(), self.shared(x))
