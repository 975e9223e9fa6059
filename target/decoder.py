"""One pre-norm decoder for every supported family: the config chooses each layer's attention and MLP.

Owns: the forward of a target and its taps. Must never know drafting or sampling.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from target.cache import LayerShape
from target.config import ModelConfig
from target.deepseek import LatentAttention
from target.deltanet import GatedDeltaNet
from target.gated import GatedAttention, GatedSharedMoE
from target.layers import GatedMLP, RMSNorm, SelfAttention, ZeroCentredNorm
from target.model import Hidden
from target.moe import MoE
from target.products import Linear, Multiplies
from target.readout import Asked, Readout, Reads
from target.rope import Rope
from target.states import StateShape

Mixer = SelfAttention | LatentAttention | GatedAttention | GatedDeltaNet


class DecoderLayer(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x)).

    `layer` is the number the config knows it by (num_layers and on in MTP modules), `cache_layer` its place in the
    cache, or among the states where it is recurrent; by default its place in a decoder.
    """

    attention: Mixer
    mlp: GatedMLP | MoE

    def __init__(self, config: ModelConfig, layer: int, cache_layer: int | None = None) -> None:
        super().__init__()
        self.input_norm = decoder_norm(config)
        self.attention = _attention(config, layer, _place(config, layer) if cache_layer is None else cache_layer)
        self.post_norm = decoder_norm(config)
        self.mlp = _mlp(config, layer)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Any) -> Tensor:
        x, more = self.advance(x, None, cos, sin, attend)
        return x + more

    def advance(self, x: Tensor, more: Tensor | None, cos: Tensor, sin: Tensor, attend: Any) -> tuple[Tensor, Tensor]:
        """`forward` of x + more, as two parts still to be added: the norm that follows adds in the same kernel."""
        return self.go_on(*self.input_norm.after(x, more), cos, sin, attend)

    def go_on(self, x: Tensor, normed: Tensor, cos: Tensor, sin: Tensor, attend: Any) -> tuple[Tensor, Tensor]:
        """`advance` of the residual stream x, given its input norm too."""
        x, normed = self.post_norm.after(x, self.attention(normed, cos, sin, attend))
        return x, self.mlp(normed)


def decoder_norm(config: ModelConfig) -> RMSNorm:
    """A norm over the hidden size, of the kind that a config's decoder layers have."""
    kind = RMSNorm if config.delta is None else ZeroCentredNorm
    return kind(config.hidden_size, config.norm_eps)


def _place(config: ModelConfig, layer: int) -> int:
    """A layer's number among those of its kind."""
    kind = config.is_recurrent(layer)
    return sum(config.is_recurrent(i) == kind for i in range(layer))


def _attention(config: ModelConfig, layer: int, cache_layer: int) -> Mixer:
    c = config
    if c.delta is not None:
        if c.is_recurrent(layer):
            return GatedDeltaNet(cache_layer, c.hidden_size, c.delta, c.norm_eps)
        sizes = (c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim)
        return GatedAttention(cache_layer, *sizes, c.norm_eps, bias=c.qkv_bias)
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
        return (MoE if config.delta is None else GatedSharedMoE)(config.hidden_size, config.moe)
    return GatedMLP(config.hidden_size, config.intermediate_size, config.mlp_bias)


def decoder_rope(config: ModelConfig) -> Rope:
    """The rotary embedding of a config's decoder layers."""
    return Rope(config.rope, config.rotary_dim, interleaved=config.mla is not None and config.mla.interleaved)


def cache_layer_shape(config: ModelConfig) -> LayerShape:
    """What a decoder layer of a config stores per token."""
    if config.mla is not None:
        return LayerShape(1, config.mla.latent_dim, parts=1)
    return LayerShape(config.num_kv_heads, config.head_dim)


class Decoder(Reads, Multiplies, nn.Module):
    """A target model. `forward` ends at hidden states; `logits` is a separate step, for the rows that need it.

    `span` are the layers it holds: all of them, or those of one stage of a pipeline.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config, self.span = config, range(config.num_layers)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rope = decoder_rope(config)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_layers))
        self.norm = decoder_norm(config)
        self.lm_head = None if config.tied else Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """[V, H]; the embedding when tied."""
        return self.embed.weight if self.lm_head is None else self.lm_head.weight

    @property
    def cache_layers(self) -> list[LayerShape]:
        """Of the layers with attention, in order."""
        attending = [i for i in self.span if not self.config.is_recurrent(i)]
        return [cache_layer_shape(self.config)] * len(attending)

    @property
    def state_layers(self) -> list[StateShape]:
        """What each recurrent layer keeps per sequence, in order; none unless the target is a hybrid."""
        d = self.config.delta
        if d is None:
            return []
        return [StateShape(d.kernel, d.channels, d.value_heads, d.key_dim, d.value_dim)] * len(d.layers)

    def forward(
        self, tokens: Tensor, positions: Tensor, attend: Any, taps: tuple[int, ...] = (), above: Hidden | None = None
    ) -> Hidden:
        """tokens, positions [R, T] int64 -> Hidden; `taps` are boundaries k of B(k), 0 (embedding) .. num_layers.

        `attend` is an Attend, an AttendLatent where the config has MLA, a HybridAttend where layers are recurrent.
        A stage goes on from `above`, what the stage before it gave; without the last layer it gives the residual
        stream in place of F. Of the taps those so far are handed on, in the order of `taps`.
        """
        first, last = self.span.start, self.span.stop
        x, more = self.embed(tokens) if above is None else above.final, None
        cos, sin = self.rope(positions, x.dtype)
        streams = {} if above is None else dict(zip([k for k in taps if k <= first], above.taps, strict=True))
        for i, layer in enumerate(self.layers, first):
            x, normed = layer.input_norm.after(x, more)  # type: ignore[union-attr,operator]
            if i in taps:
                streams[i] = x
            x, more = layer.go_on(x, normed, cos, sin, attend)  # type: ignore[operator]
        if last == self.config.num_layers:
            streams[last], final = self.norm.after(x, more)
        else:
            streams[last] = final = x if more is None else x + more
        return Hidden(final, tuple(streams[k] for k in taps if k <= last))

    def logits(self, final: Tensor) -> Tensor:
        """F [..., H] -> [..., V] in the model's dtype."""
        return self.product(final, self.head_weight, None)

    def read(self, final: Tensor, asked: Asked) -> Readout | None:
        """What is asked about `logits(final)`, F [..., H] as N rows; None where they have to be written first."""
        if self.head_weight.shape[0] != self.config.vocab_size:  # one rank's part of the vocabulary
            return None
        return self.ask(final, self.head_weight, self.product, asked)


def init_weights(model: nn.Module, generator: torch.Generator | None = None, std: float = 0.02) -> None:
    """Normal(0, std) matrices, zero biases, unit norms: the start of training and of random test models."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, 0.0, std, generator=generator)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
