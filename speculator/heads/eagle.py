"""EAGLE-1 and EAGLE-2 (arXiv 2401.15077, 2406.16858): one layer over fc([embedding, F]).

The two share weights; EAGLE-2 only grows its tree dynamically. Must never know files or trees.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from speculator.heads.base import DraftHead, PlainLayer, TargetWeights
from speculator.heads.record import HeadRecord
from target.attention.base import Attend
from target.layers import RMSNorm
from target.products import Linear


class EagleHead(DraftHead):
    """x = fc([embed(token), feature]); layers without a norm before the first; logits straight from the output.

    Heads trained with `layernorms` (speculators 0.4 and older, vLLM's add_para_norm) have three norms more: on the
    embedding, before the first attention and before lm_head.
    """

    def __init__(self, record: HeadRecord, shared: TargetWeights, first_layer: int) -> None:
        super().__init__(record, shared, first_layer)
        self.fc = Linear(record.hidden_size + record.target_hidden_size, record.hidden_size, bias=record.fc_bias)
        self.layers = nn.ModuleList(
            PlainLayer(record, first_layer + i, input_norm=i > 0 or record.fused_norm) for i in range(record.num_layers)
        )
        norm = partial(RMSNorm, record.hidden_size, record.norm_eps)
        self.embedding_norm = norm() if record.embedding_norm else None
        self.head_norm = norm() if record.head_norm else None

    def fuse(self, features: Tensor) -> Tensor:
        return features

    def advance(self, hidden: Tensor, tokens: Tensor, positions: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
        embedding = self.embedding(tokens)
        if self.embedding_norm is not None:
            embedding = self.embedding_norm(embedding)
        x = self.fc(torch.cat((embedding, hidden), dim=-1))
        cos, sin = self.rope(positions, x.dtype)
        more: Tensor | None = None
        for layer in self.layers:
            x, more = layer(x, more, cos, sin, attend)
        assert more is not None
        return x, more

    @property
    def out_norm(self) -> RMSNorm | None:
        return self.head_norm
