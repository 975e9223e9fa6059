"""Block-scaled float8 weights, as DeepSeek-V3 publishes them: which tensors they are, and their values.

Must never know files or architectures.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from target.errors import CheckpointError

SCALE = "_scale_inv"  # after the name of the weight; it multiplies, whatever the name says
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def scale_names(names: Iterable[str]) -> set[str]:
    """Names of scales whose weight is among `names` too."""
    found = set(names)
    return {name for name in found if name.endswith(SCALE) and name.removesuffix(SCALE) in found}


def dequantise(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """float8 weight [..., out, in] times float32 scale [..., ceil(out / block), ceil(in / block)] -> float32.

    The last block of a row or column may be partial. CheckpointError when the weight is no float8 or the shapes
    do not fit.
    """
    if weight.dtype not in FLOAT8:
        raise CheckpointError(f"holds {weight.dtype} values beside scales; only float8 weights have them")
    *batch, rows, columns = weight.shape
    expected = [*batch, -(-rows // block[0]), -(-columns // block[1])]
    if list(scale.shape) != expected:
        text = f"expected {expected} for a weight {list(weight.shape)} in blocks of {block[0]} x {block[1]}"
        raise CheckpointError(f"has scales of shape {list(scale.shape)}, {text}")
    spread = scale.float().repeat_interleave(block[0], dim=-2)[..., :rows, :]
    return weight.float() * spread.repeat_interleave(block[1], dim=-1)[..., :columns]
