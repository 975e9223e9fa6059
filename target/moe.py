"""Mixtures of experts: the gates of DeepSeek-V2, DeepSeek-V3 and Qwen3-MoE, and experts stacked in one tensor.

Owns: routing and the experts' arithmetic, without reading a value on the host and without shapes that depend on
values, so that it can be recorded. Must never know models, caches or files.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from target.config_moe import MoeConfig
from target.layers import GatedMLP

CHUNK_BYTES = 256 << 20  # of the largest intermediate of `_dense`


class Gate(nn.Module):
    """Chooses `top_k` experts for each token and says how much each counts; computed in float32."""

    correction: Tensor | None  # [E] float32 in every model dtype: DeepSeek-V3's e_score_correction_bias

    def __init__(self, size: int, moe: MoeConfig) -> None:
        super().__init__()
        self.moe = moe
        self.weight = nn.Parameter(torch.empty(moe.experts, size))
        nn.init.normal_(self.weight, 0.0, 0.02)
        self.register_buffer("correction", torch.zeros(moe.experts) if moe.gate == "sigmoid" else None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow the module to another device, but never to a narrower dtype: rounded, it chooses other experts."""
        exact = self.correction
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if exact is not None and self.correction is not None:
            device = self.correction.device
            self.correction = torch.zeros_like(exact, device=device) if exact.is_meta else exact.to(device)
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [N, size] -> weights [N, top_k] float32, experts [N, top_k] int64."""
        moe = self.moe
        with torch.autocast(
            x.device.type, enabled=False
        ):  # training runs under it, and routing must be that of serving
            logits = F.linear(x.float(), self.weight.float())
        scores = logits.softmax(dim=-1) if moe.gate == "softmax" else logits.sigmoid()
        choice = scores if self.correction is None else scores + self.correction
        experts = self._of_best_groups(choice).topk(moe.top_k, dim=-1).indices
        weights = scores.gather(-1, experts)
        if moe.normalise:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return weights * moe.scale, experts

    def _of_best_groups(self, choice: Tensor) -> Tensor:
        """[N, E] with -inf for the experts of all but the best groups."""
        moe = self.moe
        if moe.top_groups == moe.groups:
            return choice
        grouped = choice.unflatten(-1, (moe.groups, -1))
        best = grouped.topk(2 if moe.gate == "sigmoid" else 1, dim=-1).values.sum(dim=-1)
        kept = best.topk(moe.top_groups, dim=-1).indices
        dropped = torch.ones_like(best, dtype=torch.bool).scatter(-1, kept, False)
        return grouped.masked_fill(dropped[..., None], float("-inf")).flatten(-2)  # type: ignore[no-any-return]


class Experts(nn.Module):
    """E gated MLPs in two tensors: gate_up [E, 2 * inner, size], down [E, size, inner].

    Tokens sorted by expert go through one grouped matmul each way: every chosen expert is read once and nothing is
    computed in vain. Where torch has no grouped matmul that stays on the device (a GPU that is neither Hopper nor
    Blackwell of the data centre, or not in bfloat16; rows that are no multiple of 16 bytes), all experts run on all
    tokens: E / top_k times the work.
    """

    def __init__(self, size: int, moe: MoeConfig) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(moe.experts, 2 * moe.inner_size, size))
        self.down = nn.Parameter(torch.empty(moe.experts, size, moe.inner_size))
        for weight in (self.gate_up, self.down):
            nn.init.normal_(weight, 0.0, 0.02)

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """x [N, size], weights [N, k] float32 and experts [N, k] int64 of a Gate -> [N, size] in x's dtype."""
        run = self._grouped if can_group(x, self.gate_up.shape[1] // 2) else self._dense
        return run(x, weights, experts)

    def _grouped(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """Pairs (token, expert) sorted by expert, as one ragged matmul each way."""
        top_k = experts.shape[1]
        by_expert, order = experts.flatten().sort(stable=True)
        ids = torch.arange(self.gate_up.shape[0], device=x.device)
        ends = torch.searchsorted(by_expert, ids, right=True, out_int32=True)
        gate, up = F.grouped_mm(x[order // top_k], self.gate_up.mT, offs=ends).chunk(2, dim=-1)
        out = F.grouped_mm(F.silu(gate) * up, self.down.mT, offs=ends)
        out = self._weigh(out, weights.flatten()[order], by_expert)
        by_token = torch.empty_like(out).index_copy(0, order, out)
        return by_token.unflatten(0, (-1, top_k)).sum(dim=1).to(x.dtype)  # type: ignore[no-any-return]

    def _dense(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """Every expert on every token, in chunks of tokens that bound the memory."""
        each = self.gate_up.shape[0] * self.gate_up.shape[1] * x.element_size()
        size = max(CHUNK_BYTES // each, 1)
        parts = zip(x.split(size), weights.split(size), experts.split(size), strict=True)
        return torch.cat([self._all_experts(*part) for part in parts])

    def _all_experts(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        gate, up = torch.matmul(x, self.gate_up.mT).chunk(2, dim=-1)  # each [E, N, inner]
        share = self._share(weights, experts)
        inner = F.silu(gate) * up * share.t()[..., None].to(x.dtype)
        return torch.matmul(inner, self.down.mT).sum(dim=0)

    def _weigh(self, out: Tensor, weights: Tensor, by_expert: Tensor) -> Tensor:
        """What the experts `by_expert` [M] say, out [M, size], as much as it counts, weights [M]."""
        return out * weights[:, None]

    def _share(self, weights: Tensor, experts: Tensor) -> Tensor:
        """How much each of all experts counts: weights and experts [N, k] -> [N, E]."""
        return weights.new_zeros(weights.shape[0], self.gate_up.shape[0]).scatter(1, experts, weights)


def can_group(x: Tensor, inner: int) -> bool:
    """Whether torch has grouped matmuls for x [N, size] and [N, inner] that read nothing on the host."""
    if x.shape[-1] * x.element_size() % 16 or inner * x.element_size() % 16:
        return False
    return x.is_cpu or (x.dtype == torch.bfloat16 and torch.cuda.get_device_capability(x.device)[0] in (9, 10))


class MoE(nn.Module):
    """Routed experts, and a shared one that every token passes."""

    def __init__(self, size: int, moe: MoeConfig) -> None:
        super().__init__()
        self.gate = Gate(size, moe)
        self.experts = Experts(size, moe)
        self.shared = GatedMLP(size, moe.shared_size) if moe.shared_size else None

    def forward(self, x: Tensor) -> Tensor:
        """[R, T, size] -> [R, T, size]."""
        tokens = x.flatten(0, -2)
        out = self.experts(tokens, *self.gate(tokens)).view_as(x)
        return out if self.shared is None else out + self.shared(x)  # type: ignore[no-any-return]
