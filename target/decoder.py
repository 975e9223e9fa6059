"""One pre-norm decoder for every supported family: the config chooses each layer's attention and MLP.

Owns: the forward of a target and its taps. Must never know drafting or sampling.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from target.cache import LayerShape
from target.config import ModelConfig
from target.deepseek import LatentAttention
from target.layers import GatedMLP, RMSNorm, SelfAttention
from target.model import Hidden
from target.moe import MoE
from target.rope import Rope


class DecoderLayer(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x)).

    `layer` is the number the config knows it by (num_layers and on in MTP modules), `cache_layer` its place in the
    cache, by default the same.
    """

    attention: SelfAttention | LatentAttention
    mlp: GatedMLP | MoE

    def __init__(self, config: ModelConfig, layer: int, cache_layer: int | None = None) -> None:
        super().__init__()
        self.input_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = _attention(config, layer, layer if cache_layer is None else cache_layer)
        self.post_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = _mlp(config, layer)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Any) -> Tensor:
        x = x + self.attention(self.input_norm(x), cos, sin, attend)
        return x + self.mlp(self.post_norm(x))  # type: ignore[no-any-return]


def _attention(config: ModelConfig, layer: int, cache_layer: int) -> SelfAttention | LatentAttention:
    c = config
    if c.mla is not None:
        return LatentAttention(cache_layer, c.hidden_size, c.num_heads, c.mla, c.rope)
    return SelfAttention(
        cache_layer,
        c.hidden_size,
        c.hidden_size,
        c.num_heads,
        c.num_kv_heads,
        c.head_dim,
        qkv_bias=c.qkv_bias,
        o_bias=c.o_bias,
        qk_norm_eps=c.norm_eps if c.qk_norm else None,
        window=c.window(layer),
    )


def _mlp(config: ModelConfig, layer: int) -> GatedMLP | MoE:
    if config.moe is not None and config.is_sparse(layer):
        return MoE(config.hidden_size, config.moe)
    return GatedMLP(config.hidden_size, config.intermediate_size, config.mlp_bias)


def decoder_rope(config: ModelConfig) -> Rope:
    """The rotary embedding of a config's decoder layers."""
    return Rope(config.rope, config.rotary_dim, interleaved=config.mla is not None and config.mla.interleaved)


def cache_layer_shape(config: ModelConfig) -> LayerShape:
    """What a decoder layer of a config stores per token."""
    if config.mla is not None:
        return LayerShape(1, config.mla.latent_dim, parts=1)
    return LayerShape(config.num_kv_heads, config.head_dim)


class Decoder(nn.Module):
    """A target model. `forward` ends at hidden states; `logits` is a separate step, for the rows that need it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rope = decoder_rope(config)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = None if config.tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """[V, H]; the embedding when tied."""
        return self.embed.weight if self.lm_head is None else self.lm_head.weight

    @property
    def cache_layers(self) -> list[LayerShape]:
        return [cache_layer_shape(self.config)] * self.config.num_layers

    def forward(self, tokens: Tensor, positions: Tensor, attend: Any, taps: tuple[int, ...] = ()) -> Hidden:
        """tokens, positions [R, T] int64 -> Hidden; `taps` are boundaries k of B(k), 0 (embedding) .. num_layers.

        `attend` is an Attend, or an AttendLatent where the config has MLA.
        """
        x = self.embed(tokens)
        cos, sin = self.rope(positions, x.dtype)
        streams = {0: x}
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, attend)
            if i + 1 in taps:
                streams[i + 1] = x
        return Hidden(self.norm(x), tuple(streams[k] for k in taps))

    def logits(self, final: Tensor) -> Tensor:
        """F [..., H] -> [..., V] in the model's dtype."""
        return F.linear(final, self.head_weight)


def init_weights(model: nn.Module, generator: torch.Generator | None = None, std: float = 0.02) -> None:
    """Normal(0, std) matrices, zero biases, unit norms: the start of training and of random test models."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, 0.0, std, generator=generator)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
