"""Gated DeltaNet (arXiv 2412.06464) as Qwen3-Next and Qwen3.5 have it: a layer that keeps a state in place of a cache.

Owns: the arithmetic of one layer, and of its recurrence as the oracle of every faster kernel. Must never know where
states are stored, which of them are committed, or models and files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from target.attention.base import Attend
from target.config_hybrid import DeltaNetConfig
from target.errors import PlanError
from target.layers import TORCH

NORM_EPS = 1e-6  # of queries and keys, whatever the config says; as in transformers


class DeltaInputs(NamedTuple):
    """What a layer's state takes in, token by token, in the model's dtype unless said."""

    mixed: Tensor  # [R, T, channels] q, k and v before the convolution
    decay: Tensor  # [R, T, value_heads] float32 in (0, 1): what is kept of the state
    beta: Tensor  # [R, T, value_heads] float32 in (0, 1): how much of the error is corrected
    conv: Tensor  # [channels, kernel] weights
    sizes: DeltaNetConfig


# recur(layer, inputs) -> [R, T, value_heads, value_dim] float32; `layer` counts recurrent layers only
Recur = Callable[[int, DeltaInputs], Tensor]


class HybridAttend(NamedTuple):
    """What the layers of a hybrid call: attention as any layer does, recurrent layers `recur`."""

    attend: Attend
    recur: Recur

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        return self.attend(layer, q, k, v, window)


class GatedDeltaNet(nn.Module):
    """o(norm(recur(q, k, v)) * silu(z)): a linear-time layer whose memory of a sequence has one size for any length.

    `layer` is its place among the recurrent layers. `qkvz` and `ba` keep the rows as published: all q, k, v, z and
    all b, a, or (`grouped`) those of each key head together. `a_log` and `dt_bias` stay float32 in every model dtype.
    """

    pieces = TORCH

    def __init__(self, layer: int, size: int, sizes: DeltaNetConfig, norm_eps: float) -> None:
        super().__init__()
        self.layer, self.sizes = layer, sizes
        self.qkvz = nn.Linear(size, sizes.channels + sizes.value_size, bias=False)
        self.ba = nn.Linear(size, 2 * sizes.value_heads, bias=False)
        self.conv = nn.Parameter(torch.empty(sizes.channels, 1, sizes.kernel))
        nn.init.kaiming_uniform_(self.conv, a=5**0.5)
        self.a_log = nn.Parameter(torch.linspace(1, 16, sizes.value_heads).log())
        self.dt_bias = nn.Parameter(torch.ones(sizes.value_heads))
        self.norm = SiluGatedNorm(sizes.value_dim, norm_eps)
        self.o = nn.Linear(sizes.value_size, size, bias=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow the module to another device, but never to a narrower dtype: the decay is an exponential of these."""
        exact = {name: getattr(self, name).data for name in ("a_log", "dt_bias")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in exact.items():
            parameter = getattr(self, name)
            device = parameter.device
            parameter.data = torch.zeros_like(value, device=device) if value.is_meta else value.to(device)
        return self

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Any) -> Tensor:
        """x [R, T, size] -> [R, T, size]; a state needs no positions. PlanError without a HybridAttend."""
        if not isinstance(attend, HybridAttend):
            text = "a hybrid target cannot run without recurrent states: bind its pass to a StatePass"
            raise PlanError(f"{text}, or to whole_sequences")
        mixed, z, b, a = self._project(x)
        decay, beta = self.pieces.delta_gates(b, a, self.a_log, self.dt_bias)
        inputs = DeltaInputs(mixed, decay, beta, self.conv.squeeze(1), self.sizes)
        return self.o(self.norm(attend.recur(self.layer, inputs), z).flatten(-2))  # type: ignore[no-any-return]

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """mixed [R, T, channels], z [R, T, value_heads, value_dim], b and a [R, T, value_heads]."""
        s, qkvz, ba = self.sizes, self.qkvz(x), self.ba(x)
        if not s.grouped:
            mixed, z = qkvz.split_with_sizes((s.channels, s.value_size), dim=-1)
            b, a = ba.chunk(2, dim=-1)
            return mixed, z.unflatten(-1, (s.value_heads, s.value_dim)), b, a
        values = s.ratio * s.value_dim
        parts = qkvz.unflatten(-1, (s.key_heads, -1)).split_with_sizes((s.key_dim, s.key_dim, values, values), dim=-1)
        q, k, v, z = (part.flatten(-2) for part in parts)
        b, a = (part.flatten(-2) for part in ba.unflatten(-1, (s.key_heads, -1)).chunk(2, dim=-1))
        return torch.cat((q, k, v), dim=-1), z.unflatten(-1, (s.value_heads, s.value_dim)), b, a


class SiluGatedNorm(nn.Module):
    """x / rms(x) * weight * silu(gate) over the last dimension; here the weight is not zero-centred."""

    pieces = TORCH

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """x float32, gate in the model's dtype -> the model's dtype."""
        return self.pieces.silu_gated_norm(x, gate, self.weight, self.eps)


class DeltaRows(NamedTuple):
    """Tokens as the recurrence reads them, in float32: enough to replay any prefix of a pass from where it began."""

    window: Tensor  # [R, kernel - 1 + T, channels] inputs of the convolution in the model's dtype, older ones first
    k: Tensor  # [R, T, key_heads, key_dim] of unit length
    v: Tensor  # [R, T, value_heads, value_dim]
    decay: Tensor  # [R, T, value_heads]
    beta: Tensor  # [R, T, value_heads]


def delta_rows(inputs: DeltaInputs, before: Tensor) -> tuple[Tensor, DeltaRows]:
    """Queries [R, T, key_heads, key_dim] and rows; `before` [R, kernel - 1, channels] are the inputs of the past."""
    window = torch.cat((before, inputs.mixed), dim=1)
    return convolved_rows(inputs, causal_conv(window.float(), inputs.conv.float()), window)


def convolved_rows(inputs: DeltaInputs, convolved: Tensor, window: Tensor) -> tuple[Tensor, DeltaRows]:
    """`delta_rows` of what a convolution made of `window`: [R, T, channels] float32."""
    s, mixed = inputs.sizes, F.silu(convolved)
    q, k, v = mixed.split_with_sizes((s.key_size, s.key_size, s.value_size), dim=-1)
    q, k = (_unit(x.unflatten(-1, (s.key_heads, s.key_dim))) for x in (q, k))
    v = v.unflatten(-1, (s.value_heads, s.value_dim))
    return q * s.key_dim**-0.5, DeltaRows(window, k, v, inputs.decay, inputs.beta)


def causal_conv(window: Tensor, weight: Tensor) -> Tensor:
    """Depthwise: window [R, kernel - 1 + T, C], weight [C, kernel] -> [R, T, C], each tap added in order."""
    kernel = weight.shape[1]
    length = window.shape[1] - kernel + 1
    out = window[:, :length] * weight[:, 0]
    for tap in range(1, kernel):
        out = out + window[:, tap : tap + length] * weight[:, tap]
    return out


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + NORM_EPS)


def advance(state: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
    """The state after one token: decayed, then corrected so that k recalls more of v.

    state [R, value_heads, key_dim, value_dim], k [R, value_heads, key_dim], v [R, value_heads, value_dim], decay and
    beta [R, value_heads]. Sums and products only, each rounded by itself, and of one shape however many tokens a pass
    has: that makes a replay equal decoding bit for bit.
    """
    kept = state * decay[..., None, None]
    error = (v - (kept * k[..., None]).sum(-2)) * beta[..., None]
    return kept + k[..., None] * error[..., None, :]


def states_after(state: Tensor, rows: DeltaRows) -> Iterator[Tensor]:
    """The state after each token of a pass in turn."""
    for t in range(rows.k.shape[1]):
        v = rows.v[:, t]
        state = advance(state, spread(rows.k[:, t], v.shape[1]), v, rows.decay[:, t], rows.beta[:, t])
        yield state


def delta_rule(state: Tensor, q: Tensor, rows: DeltaRows, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Results [R, T, value_heads, value_dim] and the state after the first `counts` [R] tokens of each row (all: None).

    q [R, T, key_heads, key_dim]; state [R, value_heads, key_dim, value_dim].
    """
    results, end = [], state
    for t, after in enumerate(states_after(state, rows)):
        results.append((after * spread(q[:, t], after.shape[1])[..., None]).sum(-2))
        end = _unless_past(t, counts, after, end)
    return torch.stack(results, dim=1), end


def replay(state: Tensor, rows: DeltaRows, counts: Tensor) -> Tensor:
    """The state after the first `counts` [R] tokens of each row, in the operations of `delta_rule`."""
    end = state
    for t, after in enumerate(states_after(state, rows)):
        end = _unless_past(t, counts, after, end)
    return end


def window_after(window: Tensor, counts: Tensor, kernel: int) -> Tensor:
    """The last kernel - 1 inputs [R, kernel - 1, C] of the convolution after the first `counts` [R] tokens of a row."""
    index = counts[:, None] + torch.arange(kernel - 1, device=counts.device)
    return window.gather(1, index[..., None].expand(-1, -1, window.shape[2]))


def _unless_past(t: int, counts: Tensor | None, after: Tensor, end: Tensor) -> Tensor:
    return after if counts is None else torch.where((counts > t)[:, None, None, None], after, end)


def spread(x: Tensor, heads: int) -> Tensor:
    """[..., key_heads, dim] -> [..., heads, dim]: each key head for its run of value heads."""
    ratio = heads // x.shape[-2]
    return x[..., None, :].expand(*x.shape[:-1], ratio, x.shape[-1]).flatten(-3, -2)
