"""Plain causal attention of whole sequences without a cache, for training and as an oracle.

Must never know pages.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def attend_causal(layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """q [R, T, heads, dim], k and v [R, T, kv_heads, dim] -> [R, T, heads, dim]; windows must cover the sequence."""
    if window is not None and window < q.shape[1]:
        raise ValueError(f"sequence of {q.shape[1]} tokens is longer than the sliding window {window}")
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2)
