"""Multi-token prediction (DeepSeek-V3, arXiv 2412.19437): a layer of the target's kind over [embedding, hidden].

Owns: the forward of one module, and the chain of several. Must never know files or trees.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from speculator.heads.base import DraftHead, TargetWeights
from speculator.heads.record import HeadRecord
from target.attention.base import Attend
from target.cache import LayerShape
from target.config import ModelConfig
from target.decoder import DecoderLayer, cache_layer_shape, decoder_norm, decoder_rope
from target.layers import RMSNorm
from target.products import Linear


class MtpHead(DraftHead):
    """g = layer(eh_proj([norm(embedding), norm(hidden)])); logits read norm(g), and so does recycling by default.

    `later` are the modules after this one. Module k reads what module k - 1 made of the same row and token t + 1 + k,
    and has its own layer in the cache.
    """

    def __init__(self, record: HeadRecord, shared: TargetWeights, first_layer: int) -> None:
        super().__init__(record, shared, first_layer)
        config = _config(shared)
        self.rope = decoder_rope(replace(config, rope=record.rope))
        self.embedding_norm, self.hidden_norm, self.norm = (decoder_norm(config) for _ in range(3))
        self.eh_proj = Linear(2 * record.hidden_size, record.hidden_size, bias=False)
        self.layer = DecoderLayer(config, _number(config, first_layer), first_layer)
        self.later = nn.ModuleList(
            MtpHead(replace(record, modules=1), shared, first_layer + i) for i in range(1, record.modules)
        )

    @property
    def lookback(self) -> int:
        return len(self.later)

    def stage(self, step: int) -> DraftHead:
        if step == 0 or not self.later:
            return self
        later: DraftHead = self.later[min(step, len(self.later)) - 1]  # type: ignore[assignment]
        return later

    @property
    def cache_layers(self) -> list[LayerShape]:
        return [cache_layer_shape(_config(self.shared))] * self.record.modules

    def fuse(self, features: Tensor) -> Tensor:
        return features

    def advance(self, hidden: Tensor, tokens: Tensor, positions: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
        x = self.eh_proj(self._pair(hidden, tokens, positions))
        cos, sin = self.rope(positions, x.dtype)
        return self.layer.advance(x, None, cos, sin, attend)

    def _pair(self, hidden: Tensor, tokens: Tensor, positions: Tensor) -> Tensor:
        if not (self.record.hidden_first or self.record.zero_first):
            return self.hidden_norm.beside(hidden, self.embedding_norm, self.embedding_table, tokens)
        pair = (self.embedding_norm(self._embedding(tokens, positions)), self.hidden_norm(hidden))
        return torch.cat(pair[::-1] if self.record.hidden_first else pair, dim=-1)

    def _embedding(self, tokens: Tensor, positions: Tensor) -> Tensor:
        embedding = self.embedding(tokens)
        return embedding * (positions > 0)[..., None] if self.record.zero_first else embedding

    @property
    def out_norm(self) -> RMSNorm:
        return self.norm


def _number(config: ModelConfig, cache_layer: int) -> int:
    """A module's layer as the config counts them: all layers of the target come first, also those without a cache."""
    recurrent = len(config.delta.layers) if config.delta else 0
    return cache_layer + recurrent


def _config(shared: TargetWeights) -> ModelConfig:
    if shared.config is None:
        raise ValueError("an MTP head needs the target's config: its layers are of the target's kind")
    return shared.config


def mtp_record(config: ModelConfig, **choices: Any) -> HeadRecord:
    """The record of modules for a target of `config`; by default one that reads and recycles what the lm_head reads.

    `choices` are fields of the record: modules, boundaries, hidden_first, norm_output, zero_first, own_embed,
    own_lm_head.
    """
    c = config
    follows: dict[str, Any] = {
        "hidden_size": c.hidden_size,
        "target_hidden_size": c.hidden_size,
        "vocab_size": c.vocab_size,
        "draft_vocab_size": c.vocab_size,
        "intermediate_size": c.intermediate_size,
        "num_layers": 1,
        "num_heads": c.num_heads,
        "num_kv_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "norm_eps": c.norm_eps,
        "rope": c.rope,
        "qkv_bias": c.qkv_bias,
        "o_bias": c.o_bias,
        "mlp_bias": c.mlp_bias,
        "qk_norm": c.qk_norm,
    }
    return HeadRecord(kind="mtp", **follows, **{"norm_output": True, "own_lm_head": False, **choices})
