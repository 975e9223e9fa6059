"""Intervals by the bootstrap over prompts, and the noise floor of two runs that should agree.

Owns: resampling. Must never know what is counted. Prompts are the unit because rounds of one answer are alike; all
turns of a prompt stay together. Intervals are percentile intervals expanded for small samples (Hesterberg 2015, "What
Teachers Should Know About the Bootstrap", sec. 4): with few prompts plain percentiles are too narrow.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
NORMAL = NormalDist()


def weights(count: int, resamples: int, seed: int = 0) -> Array:
    """How often each of `count` prompts is drawn in each resample, [resamples, count]."""
    draw = np.random.default_rng(seed)
    return draw.multinomial(count, np.full(count, 1 / count), size=resamples).astype(np.float64)


def ratio(over: Array, under: Array) -> Array:
    """over / under elementwise, NaN where `under` is 0."""
    nothing: Array = np.full(np.broadcast(over, under).shape, np.nan)
    return np.divide(over, under, out=nothing, where=under > 0)


def interval(values: Array, count: int, confidence: float = 0.95) -> tuple[float, float] | None:
    """The expanded percentile interval of resampled `values` from `count` prompts.

    None for fewer than 3 prompts, or when a tenth of the resamples could not give a value.
    """
    finite = values[np.isfinite(values)]
    if count < 3 or len(finite) < 0.9 * len(values) or not len(finite):
        return None
    low, high = np.quantile(finite, expanded(count, confidence))
    return float(low), float(high)


def expanded(count: int, confidence: float) -> tuple[float, float]:
    """The quantiles to read: those of a normal spread by sqrt(n / (n - 1)) and Student's t with n - 1 degrees."""
    reach = math.sqrt(count / (count - 1)) * student((1 + confidence) / 2, count - 1)
    tail = NORMAL.cdf(-reach)
    return tail, 1 - tail


def student(level: float, degrees: int) -> float:
    """Quantile of Student's t by its expansion about the normal one (Abramowitz and Stegun 26.7.5)."""
    z = NORMAL.inv_cdf(level)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / degrees + second / degrees**2 + third / degrees**3


def split_differences(over: Array, under: Array, splits: int = 1000, seed: int = 0) -> tuple[Array, Array]:
    """Ratios of totals of two random halves of the prompts, [splits] each."""
    draw = np.random.default_rng(seed)
    half = draw.permuted(np.tile(np.arange(len(over)), (splits, 1)), axis=1) < len(over) // 2
    first = half.astype(np.float64)
    rest = 1 - first
    return ratio(first @ over, first @ under), ratio(rest @ over, rest @ under)
