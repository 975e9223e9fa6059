"""The pieces of a decoder layer: norm, attention, gated MLP. Heads are built of the same pieces.

Owns: the arithmetic of one layer. Must never know models, caches or files.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from target.attention.base import Attend
from target.products import Linear
from target.rope import rotate


class Attends(Protocol):
    """A layer of grouped-query attention, as pieces see it."""

    layer: int
    heads: int
    kv_heads: int

    @property
    def window(self) -> int | None: ...

    @property
    def q_norm(self) -> RMSNorm | None: ...

    @property
    def k_norm(self) -> RMSNorm | None: ...


class Pieces:
    """What lies between the products of a layer, as torch composes it: the oracle of `target.fused`."""

    def norm(self, norm: RMSNorm, x: Tensor) -> Tensor:
        """x [..., size] -> [..., size]."""
        return norm.normed(x)

    def add_norm(self, norm: RMSNorm, x: Tensor, more: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream x [..., size] after `more` [..., size] was added, and its norm."""
        x = x + more
        return x, norm.normed(x)

    def beside(self, norm: RMSNorm, x: Tensor, other: RMSNorm | None, table: Tensor, tokens: Tensor) -> Tensor:
        """Embeddings of tokens [...], normed by `other`, and the norm of x [..., size]: [..., 2 size]."""
        embedding = F.embedding(tokens, table)
        return torch.cat((embedding if other is None else other(embedding), norm(x)), dim=-1)

    def attend(self, layer: Attends, qkv: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """qkv [R, T, heads + 2 kv_heads, head_dim], cos and sin [R, T, 1, dim] -> [R, T, heads, head_dim]."""
        qk, v = qkv.split_with_sizes((layer.heads + layer.kv_heads, layer.kv_heads), dim=-2)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = qk.split_with_sizes((layer.heads, layer.kv_heads), dim=-2)
            qk = torch.cat((layer.q_norm(q), layer.k_norm(k)), dim=-2)
        q, k = rotate(qk, cos, sin).split_with_sizes((layer.heads, layer.kv_heads), dim=-2)
        return attend(layer.layer, q, k, v, layer.window)

    def gated(self, gate_up: nn.Module, x: Tensor) -> Tensor:
        """silu(gate(x)) * up(x) of merged weights: x [..., size] -> [..., inner]."""
        gate, up = gate_up(x).chunk(2, dim=-1)
        return F.silu(gate) * up  # type: ignore[no-any-return]

    def delta_gates(self, b: Tensor, a: Tensor, a_log: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """What a gated delta rule keeps of its state and how far it corrects it: [..., heads] float32 in (0, 1).

        b and a [..., heads], a_log and bias [heads] float32.
        """
        return (-a_log.exp() * F.softplus(a.float() + bias)).exp(), b.float().sigmoid()

    def silu_gated_norm(self, x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / rms(x) * weight * silu(gate): x [..., heads, size] float32 -> the gate's shape and type."""
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        return (weight * (x * scale).to(gate.dtype) * F.silu(gate.float())).to(gate.dtype)


TORCH = Pieces()


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension."""

    pieces = TORCH

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self._floor = torch.tensor([eps], device="cpu")  # a real tensor also where the module is built on meta

    def forward(self, x: Tensor) -> Tensor:
        return self.pieces.norm(self, x)

    @property
    def factor(self) -> Tensor:
        """What a normed row is multiplied by, [size]."""
        return self.weight

    def after(self, x: Tensor, more: Tensor | None) -> tuple[Tensor, Tensor]:
        """The residual stream x [..., size] with what is still to be added to it, and the norm of that."""
        return (x, self(x)) if more is None else self.pieces.add_norm(self, x, more)

    def beside(self, x: Tensor, other: RMSNorm | None, table: Tensor, tokens: Tensor) -> Tensor:
        """Embeddings of tokens [...], normed by `other` if given, beside the norm of x [..., size]: [..., 2 size]."""
        return self.pieces.beside(self, x, other, table, tokens)

    def normed(self, x: Tensor) -> Tensor:
        """The norm in torch."""
        if x.is_cpu and x.dtype == torch.float32:
            return self._float32_cpu(x, self.weight)
        weight = self.weight.to(x.dtype)  # another type under autocast, where torch has a kernel for one only
        return F.rms_norm(x, weight.shape, weight, self.eps)

    def _float32_cpu(self, x: Tensor, weight: Tensor) -> Tensor:
        # torch composes rms_norm of eight small kernels there; these five take half the time
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = torch.addcmul(self._floor, norm, norm, value=1 / x.shape[-1]).rsqrt_()
        return x * scale * weight


class ZeroCentredNorm(RMSNorm):
    """x / rms(x) * (1 + weight), in float32 up to the result."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__(size, eps)
        nn.init.zeros_(self.weight)

    @property
    def factor(self) -> Tensor:
        return self.weight.float() + 1

    def normed(self, x: Tensor) -> Tensor:
        weight = self.factor
        if x.is_cpu and x.dtype == torch.float32:
            return self._float32_cpu(x, weight)
        return F.rms_norm(x.float(), weight.shape, weight, self.eps).to(x.dtype)


class SelfAttention(nn.Module):
    """Grouped-query attention with merged qkv weights, rotary embedding, optional biases and per-head qk-norm."""

    pieces = TORCH

    def __init__(
        self,
        layer: int,
        in_size: int,
        out_size: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        qkv_bias: bool = False,
        o_bias: bool = False,
        qk_norm_eps: float | None = None,
        window: int | None = None,
    ) -> None:
        super().__init__()
        self.layer, self.window = layer, window
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.qkv = Linear(in_size, (heads + 2 * kv_heads) * head_dim, bias=qkv_bias)
        self.o = Linear(heads * head_dim, out_size, bias=o_bias)
        self.q_norm = RMSNorm(head_dim, qk_norm_eps) if qk_norm_eps is not None else None
        self.k_norm = RMSNorm(head_dim, qk_norm_eps) if qk_norm_eps is not None else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """x [R, T, in_size], cos and sin of Rope [R, T, 1, head_dim] -> [R, T, out_size]."""
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        out = self.pieces.attend(self, qkv, cos, sin, attend)
        return self.o(out.flatten(-2))  # type: ignore[no-any-return]


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)) with merged gate and up weights."""

    pieces = TORCH

    def __init__(self, size: int, inner: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_up = Linear(size, 2 * inner, bias=bias)
        self.down = Linear(inner, size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.pieces.gated(self.gate_up, x))  # type: ignore[no-any-return]


def lay_out_for_cpu(module: nn.Module) -> None:
    """Store the float32 weights of linear layers column by column, in place; shapes and values stay.

    Products of 2 to 64 rows then take up to a third less time (MKL), those of one row no more.
    """
    for linear in module.modules():
        if isinstance(linear, nn.Linear) and linear.weight.is_cpu and linear.weight.dtype == torch.float32:
            linear.weight.data = linear.weight.data.t().contiguous().t()
