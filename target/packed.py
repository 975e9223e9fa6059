"""Products on a CPU with float32 weights that half precision holds exactly, as those of bfloat16 files: half the bytes.

Owns: which weights are packed so, and the product that reads them. Must never know models. Activations and sums are
float32, so nothing is rounded that torch's own product would not round, and a row's bits depend on nothing that shares
the call. On a processor that MKL does not favour, products of 6 rows take a fifth of the time.
"""

from __future__ import annotations

import math
import warnings
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from target.products import Linear, choose_products

THREADS = 2  # the product runs on one; with more than so many, torch's own is as fast where weights are large
TOP = 15  # scaled weights lie below 2 ** TOP, so that small ones are no subnormal numbers of float16


class Packed(NamedTuple):
    """Weights [N, K] times a power of two, in the layout of FBGEMM's float16 kernels."""

    values: Tensor
    unscale: float
    weight: Tensor  # what was packed, kept so that nothing else comes to lie at its address


class PackedProduct:
    """x W^T + b of packed weights; torch's own product of all others."""

    def __init__(self) -> None:
        self._packed: dict[int, Packed] = {}

    def take(self, weight: Tensor) -> bool:
        """Pack weights [N, K] that are never changed again, if that loses nothing; whether they are packed."""
        found = pack(weight)
        if found is not None:
            self._packed[weight.data_ptr()] = found
        return found is not None

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        packed = self._packed.get(weight.data_ptr())
        if packed is None or weight.shape != packed.weight.shape or weight.stride() != packed.weight.stride():
            return F.linear(x, weight, bias)  # nothing packed, or some rows of it: a vocabulary without its padding
        product = torch.fbgemm_linear_fp16_weight_fp32_activation(x, packed.values, None)
        return product.mul_(packed.unscale) if bias is None else torch.add(bias, product, alpha=packed.unscale)


def pack(weight: Tensor) -> Packed | None:
    """None for weights that float16 cannot hold, whatever power of two they are scaled by."""
    if not (weight.is_cpu and weight.dtype == torch.float32 and weight.dim() == 2 and weight.numel()):
        return None
    largest = float(weight.abs().max())
    if not math.isfinite(largest):
        return None
    scale = 2.0 ** (TOP - math.frexp(largest)[1])
    scaled = weight.detach().contiguous() * scale
    if not torch.equal(scaled.half().float(), scaled):
        return None
    return Packed(torch.fbgemm_pack_gemm_matrix_fp16(scaled), 1 / scale, weight)


def pack_products(model: nn.Module, vocabulary: Tensor) -> int:
    """Let a model multiply by packed weights where it can; how many. `vocabulary` [V, H] is what its logits read.

    Nothing changes on more than `THREADS` threads, nor where torch comes without the kernels.
    """
    if torch.get_num_threads() > THREADS or not kernels_here():
        return 0
    product, weights = PackedProduct(), [m.weight for m in model.modules() if isinstance(m, Linear)]
    count = sum(product.take(weight) for weight in (*weights, vocabulary))
    if count:
        choose_products(model, product)
    return count


@cache
def kernels_here() -> bool:
    """Whether this processor and this torch, which will remove them one day, have the kernels and these are right."""
    weight, x = torch.eye(16), torch.arange(32.0).view(2, 16)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # both functions announce once that they will go
            packed = torch.fbgemm_pack_gemm_matrix_fp16(weight)
            return torch.equal(torch.fbgemm_linear_fp16_weight_fp32_activation(x, packed, None), x)
    except (AttributeError, RuntimeError, TypeError):
        return False
