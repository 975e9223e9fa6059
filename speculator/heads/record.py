"""The one record that every published head layout is read into.

Owns: the choices that change a head's forward. Must never know files or tensors. Field meanings and their published
names are those of the EAGLE, SpecForge, ModelOpt and speculators exporters.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from target.config import RopeConfig


@dataclass(frozen=True)
class HeadRecord:
    """A draft head as we run it; each field can be overridden by name when a file leaves it ambiguous."""

    kind: str  # "eagle" (EAGLE-1/2), "eagle3" or "mtp"
    hidden_size: int  # H, width of the head
    target_hidden_size: int  # Ht
    vocab_size: int  # V, rows of the embedding
    draft_vocab_size: int  # Vd, rows of the head's lm_head
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float = 1e-6
    rope: RopeConfig = field(default_factory=RopeConfig)
    boundaries: tuple[int, ...] = ()  # taps B(k); empty: the feature is F, the final-normed state
    fc: bool = True  # true features pass a projection (EAGLE-1: embedding and feature together)
    fc_bias: bool = False
    norm_before_fc: bool = False  # one RMSNorm over the concatenated taps
    fc_norm: bool = False  # one RMSNorm per tap
    input_layernorm: bool = True  # norm on the embedding in the first layer
    norm_before_residual: bool = False  # the residual is hidden_norm(h) instead of h
    norm_output: bool = False  # recycle norm(g) instead of g
    embedding_norm: bool = False  # EAGLE-1 with layernorms: norm on the embedding before fc
    fused_norm: bool = False  # EAGLE-1 with layernorms: norm on fc's output before the first attention
    head_norm: bool = False  # EAGLE-1 with layernorms: norm before lm_head
    final_norm: bool = True  # EAGLE-3: norm before lm_head
    wide_layers: bool = False  # every layer reads [embedding, hidden], not the first one only
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    own_embed: bool = False  # else the target's embedding
    own_lm_head: bool = True  # else the target's (Vd == V), or the embedding when `lm_head_is_embed`
    lm_head_is_embed: bool = False
    modules: int = 1  # MTP: modules in a row, each with a layer of its own
    hidden_first: bool = False  # MTP: eh_proj reads [hidden, embedding] instead of [embedding, hidden]
    zero_first: bool = False  # MTP: the embedding in row 0 is zero
    d2t: bool = False  # a draft vocabulary: target id = draft id + d2t[draft id]

    @property
    def feature_size(self) -> int:
        """Width of a true feature: all taps side by side, or F."""
        return self.target_hidden_size * max(1, len(self.boundaries))
