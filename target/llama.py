"""Llama, Mistral, Qwen2 and Qwen3: one pre-norm decoder with switches.

Owns: the forward of dense targets and their taps. Must never know drafting or sampling.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from target.attention.base import Attend
from target.cache import LayerShape
from target.config import ModelConfig
from target.layers import GatedMLP, RMSNorm, SelfAttention
from target.model import Hidden
from target.rope import Rope


class DecoderLayer(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        c = config
        self.input_norm = RMSNorm(c.hidden_size, c.norm_eps)
        self.attention = SelfAttention(
            layer,
            c.hidden_size,
            c.hidden_size,
            c.num_heads,
            c.num_kv_heads,
            c.head_dim,
            qkv_bias=c.qkv_bias,
            o_bias=c.o_bias,
            qk_norm_eps=c.norm_eps if c.qk_norm else None,
            window=c.windows[layer],
        )
        self.post_norm = RMSNorm(c.hidden_size, c.norm_eps)
        self.mlp = GatedMLP(c.hidden_size, c.intermediate_size, c.mlp_bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        x = x + self.attention(self.input_norm(x), cos, sin, attend)
        return x + self.mlp(self.post_norm(x))  # type: ignore[no-any-return]


class Llama(nn.Module):
    """A dense decoder. `forward` ends at hidden states; `logits` is a separate step, for the rows that need it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rope = Rope(config.rope, config.head_dim)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = None if config.tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """[V, H]; the embedding when tied."""
        return self.embed.weight if self.lm_head is None else self.lm_head.weight

    @property
    def cache_layers(self) -> list[LayerShape]:
        return [LayerShape(self.config.num_kv_heads, self.config.head_dim)] * self.config.num_layers

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend, taps: tuple[int, ...] = ()) -> Hidden:
        """tokens, positions [R, T] int64 -> Hidden; `taps` are boundaries k of B(k), 0 (embedding) .. num_layers."""
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
