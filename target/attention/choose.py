"""Which attention backend a model's layers run on.

Owns: the choice. Must never know passes or batches.
"""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor

from target.attention.mla import MlaAttention
from target.attention.sdpa import SdpaAttention
from target.cache import PagedCache
from target.config import ModelConfig
from target.errors import PlanError
from target.products import kernels_need

OVERRIDE = "SPECULATOR_ATTENTION"  # auto, torch or triton; torch is the oracle of the others


def attention_for(config: ModelConfig, cache: PagedCache, backend: str | None = None) -> Any:
    """The backend of a target's layers: absorbed MLA over latents where the config has it, else grouped queries.

    The two differ in what `run` takes; a model's layers call the one they were made for. `backend` is auto, torch or
    triton; without one the environment variable SPECULATOR_ATTENTION decides, and without that auto. Raises PlanError
    for another name and for a backend that cannot run here.
    """
    if config.mla is None:
        return grouped_attention(cache, backend)
    return MlaAttention(cache, config.mla.rank, _named(backend))


def grouped_attention(cache: PagedCache, backend: str | None = None) -> Any:
    """The backend of grouped-query layers over any cache that has some; see `attention_for`."""
    name = _named(backend)
    missing = _missing(cache.layers)
    if name == "triton" and missing:
        raise PlanError(f"the triton backend needs {missing}: use torch")
    if name == "torch" or missing:
        return SdpaAttention(cache)
    from target.attention.triton import TritonAttention

    return TritonAttention(cache)


def _named(backend: str | None) -> str:
    name = backend or os.environ.get(OVERRIDE) or "auto"
    if name not in ("auto", "torch", "triton"):
        raise PlanError(f"unknown attention backend '{name}': auto, torch or triton")
    return name


def _missing(layers: list[Tensor]) -> str:
    """What the kernels would need, empty where they can run."""
    if need := kernels_need(layers[0].device):
        return need
    from target.attention.triton import takes

    grouped = [layer for layer in layers if layer.shape[1] == 2]
    return "" if grouped and all(map(takes, grouped)) else "heads of 256 or less"
