"""Rotary position embeddings of every published kind, as a pure function of the position.

Owns: inverse frequencies and their scaling. Must never know layers or caches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from target.config import RopeConfig

# (positions, inverse frequencies, amplitude, interleaved, dtype) -> cos, sin
Tables = Callable[[Tensor, Tensor, float, bool, torch.dtype], tuple[Tensor, Tensor]]


class Rope(nn.Module):
    """cos and sin tables for given positions; the pairs that are rotated are the two halves of a head (neox), or
    neighbours where `interleaved`.

    `dynamic` scales with the length seen so far: position p uses the base of a sequence of p + 1 tokens, so a token's
    rotation never depends on what follows it (transformers re-scales a whole prompt by its final length, and equals
    this one when decoding token by token).
    """

    inverse: Tensor  # [dim / 2]
    signed: Tensor  # [dim], what the angle of each value of a head is by position
    tables: Tables | None = None  # a kernel in place of torch's operations

    def __init__(self, config: RopeConfig, dim: int, interleaved: bool = False) -> None:
        super().__init__()
        self.config, self.dim, self.interleaved = config, dim, interleaved
        inverse, self.amplitude = _inverse_frequencies(config, dim)
        self.register_buffer("inverse", inverse, persistent=False)
        self.register_buffer("signed", self._signed(inverse), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow the module to another device, but never to a narrower dtype and never without values."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.inverse = _inverse_frequencies(self.config, self.dim)[0].to(self.inverse.device)
        self.signed = self._signed(self.inverse)
        return self

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions [...] int64 -> cos, sin [..., 1, dim] in `dtype`, computed in float32.

        They are for `rotate`, or for `rotate_pairs` where interleaved. The sin of a pair's first member is negated.
        """
        if self.tables is not None and self.config.kind != "dynamic":
            return self.tables(positions, self.inverse, self.amplitude, self.interleaved, dtype)
        rates = self._signed(self._stretched(positions)) if self.config.kind == "dynamic" else self.signed
        angles = positions[..., None, None] * rates
        cos, sin = angles.cos(), angles.sin()
        if self.amplitude != 1.0:
            cos, sin = cos * self.amplitude, sin * self.amplitude
        return cos.to(dtype), sin.to(dtype)

    def _signed(self, inverse: Tensor) -> Tensor:
        """[..., dim / 2] -> [..., dim]: both members of each pair, the first one turning backwards."""
        if self.interleaved:
            return torch.stack((-inverse, inverse), dim=-1).flatten(-2)
        return torch.cat((-inverse, inverse), dim=-1)

    def _stretched(self, positions: Tensor) -> Tensor:
        """[..., 1, dim / 2] inverse frequencies of the kind `dynamic`."""
        trained, factor = self.config.max_position, float(self.config.scaling["factor"])
        length = (positions + 1).clamp(min=trained).double()
        stretch = (factor * length / trained - (factor - 1)) ** (self.dim / (self.dim - 2))
        base = self.config.theta * stretch[..., None, None]
        exponent = torch.arange(0, self.dim, 2, device=positions.device).double() / self.dim
        return (1.0 / base**exponent).float()


def _inverse_frequencies(config: RopeConfig, dim: int) -> tuple[Tensor, float]:
    inverse = 1.0 / config.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if config.kind == "linear":
        return inverse / float(config.scaling["factor"]), 1.0
    if config.kind == "llama3":
        return _llama3(inverse, config), 1.0
    if config.kind == "yarn":
        return _yarn(inverse, config, dim)
    return inverse, 1.0


def _llama3(inverse: Tensor, config: RopeConfig) -> Tensor:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, a linear ramp between."""
    factor, low, high = (float(config.scaling[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    original = config.original_max_position
    wavelength = 2 * math.pi / inverse
    smooth = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    return inverse * ((1 - smooth) / factor + smooth)


def _yarn(inverse: Tensor, config: RopeConfig, dim: int) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071): interpolation below a ramp of dimensions, extrapolation above, scaled cos and sin."""
    scaling = config.scaling
    factor = float(scaling.get("factor") or config.max_position / config.original_max_position)

    def rotations_dim(rotations: float) -> float:
        ratio = config.original_max_position / (rotations * 2 * math.pi)
        return dim * math.log(ratio) / (2 * math.log(config.theta))

    low = rotations_dim(float(scaling.get("beta_fast") or 32))
    high = rotations_dim(float(scaling.get("beta_slow") or 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    return inverse / factor * ramp + inverse * (1 - ramp), _yarn_amplitude(config, factor)


def _yarn_amplitude(config: RopeConfig, factor: float) -> float:
    given = config.scaling.get("attention_factor")
    if given is not None:
        return float(given)
    scale, all_dim = config.scaling.get("mscale"), config.scaling.get("mscale_all_dim")
    if scale and all_dim:
        return yarn_mscale(factor, float(scale)) / yarn_mscale(factor, float(all_dim))
    return yarn_mscale(factor, 1.0)


def yarn_mscale(factor: float, weight: float) -> float:
    """How much YaRN sharpens attention that is stretched by `factor` (arXiv 2309.00071, DeepSeek's `mscale`)."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotations of a Rope's `cos` and `sin` [..., 1, dim] to the first `dim` of x [..., heads, head_dim]."""
    dim = cos.shape[-1]
    if dim < x.shape[-1]:
        return torch.cat((rotate(x[..., :dim], cos, sin), x[..., dim:]), dim=-1)
    return torch.addcmul(x * cos, x.roll(dim // 2, dims=-1), sin)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate` for tables of an interleaved Rope, over all of x [..., heads, dim]."""
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(x * cos, swapped, sin)
