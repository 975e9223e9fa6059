"""Plain causal attention of whole sequences without a cache, for training and as an oracle.

Must never know pages.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from target.config import ModelConfig
from target.deltanet_chunks import whole_sequences


def attend_causal(layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """q [R, T, heads, dim], k and v [R, T, kv_heads, dim] -> [R, T, heads, dim]; windows must cover the sequence."""
    if window is not None and window < q.shape[1]:
        raise ValueError(f"sequence of {q.shape[1]} tokens is longer than the sliding window {window}")
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2)


class LatentCausal:
    """`attend` of MLA layers: all heads read one latent per token; its first `rank` values are what they mix."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __call__(self, layer: int, q: Tensor, latent: Tensor, scale: float) -> Tensor:
        """q [R, T, heads, rank + rope_dim], latent [R, T, rank + rope_dim] -> [R, T, heads, rank]."""
        shared = latent[:, None]
        # the latent whole as value: fast kernels want keys and values of one size
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), shared, shared, is_causal=True, scale=scale, enable_gqa=True
        )
        return out[..., : self.rank].transpose(1, 2)


def dense_attend(config: ModelConfig) -> Any:
    """The `attend` that a model of this config takes for whole sequences."""
    if config.delta is not None:
        return whole_sequences(attend_causal)
    return attend_causal if config.mla is None else LatentCausal(config.mla.rank)
