"""EAGLE-3 (arXiv 2503.01840) with the switches of its later exporters.

Owns: the forward of the family: taps through fc, a first layer over [embedding, hidden], own lm_head over a draft
vocabulary. Must never know files or trees.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from speculator.heads.base import DraftHead, PlainLayer, TargetWeights, head_attention
from speculator.heads.record import HeadRecord
from target.attention.base import Attend
from target.layers import GatedMLP, RMSNorm
from target.products import Linear


class WideLayer(nn.Module):
    """A layer whose attention reads [norm(embedding), norm(hidden)], embedding first; its two parts are to be added."""

    def __init__(self, record: HeadRecord, layer: int) -> None:
        super().__init__()
        r = record
        self.norm_before_residual = r.norm_before_residual
        self.input_norm = RMSNorm(r.hidden_size, r.norm_eps) if r.input_layernorm else None
        self.hidden_norm = RMSNorm(r.hidden_size, r.norm_eps)
        self.attention = head_attention(r, layer, 2 * r.hidden_size)
        self.post_norm = RMSNorm(r.hidden_size, r.norm_eps)
        self.mlp = GatedMLP(r.hidden_size, r.intermediate_size, r.mlp_bias)

    def forward(
        self, hidden: Tensor, tokens: Tensor, table: Tensor, cos: Tensor, sin: Tensor, attend: Attend
    ) -> tuple[Tensor, Tensor]:
        wide = self.hidden_norm.beside(hidden, self.input_norm, table, tokens)
        residual = wide[..., hidden.shape[-1] :] if self.norm_before_residual else hidden
        mixed = self.attention(wide, cos, sin, attend)
        x, normed = self.post_norm.after(residual, mixed)
        return x, self.mlp(normed)


class Eagle3Head(DraftHead):
    """h = fc(taps) for true features only; recursion feeds the un-normed output back (normed with `norm_output`)."""

    def __init__(self, record: HeadRecord, shared: TargetWeights, first_layer: int) -> None:
        super().__init__(record, shared, first_layer)
        r = record
        self.fc = Linear(r.feature_size, r.hidden_size, bias=r.fc_bias) if r.fc else None
        self.fc_input_norm = RMSNorm(r.feature_size, r.norm_eps) if r.norm_before_fc else None
        chunks = len(r.boundaries) if r.fc_norm else 0
        self.fc_norms = nn.ModuleList(RMSNorm(r.target_hidden_size, r.norm_eps) for _ in range(chunks))
        self.layers = nn.ModuleList(self._layer(i) for i in range(r.num_layers))
        self.norm = RMSNorm(r.hidden_size, r.norm_eps) if r.final_norm else None

    def _layer(self, index: int) -> nn.Module:
        wide = index == 0 or self.record.wide_layers
        return (WideLayer if wide else PlainLayer)(self.record, self.first_layer + index)

    def fuse(self, features: Tensor) -> Tensor:
        if self.fc_input_norm is not None:
            features = self.fc_input_norm(features)
        if self.fc_norms:
            chunks = features.chunk(len(self.fc_norms), dim=-1)
            features = torch.cat([norm(chunk) for norm, chunk in zip(self.fc_norms, chunks, strict=True)], dim=-1)
        return features if self.fc is None else self.fc(features)

    def advance(self, hidden: Tensor, tokens: Tensor, positions: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
        cos, sin = self.rope(positions, hidden.dtype)
        more: Tensor | None = None
        for layer in self.layers:
            if isinstance(layer, WideLayer):
                hidden = hidden if more is None else hidden + more
                hidden, more = layer(hidden, tokens, self.embedding_table, cos, sin, attend)
            else:
                hidden, more = layer(hidden, more, cos, sin, attend)
        assert more is not None
        return hidden, more

    @property
    def out_norm(self) -> RMSNorm | None:
        return self.norm
