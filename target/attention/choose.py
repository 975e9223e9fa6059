"""Which attention backend a model's layers run on.

Owns: the choice. Must never know passes or batches. Prompt chunks go to FlashAttention where a build is there that can
read the cache: FlashAttention-3 that SPECULATOR_FLASH3 names, else the package flash_attn. Rounds stay with our
kernels, chains too, until a measurement says otherwise.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import cache as once
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from torch import Tensor

from target.attention.flash import FlashAttention2, FlashAttention3
from target.attention.mla import MlaAttention
from target.attention.sdpa import SdpaAttention
from target.cache import PagedCache
from target.config import ModelConfig
from target.errors import PlanError
from target.products import kernels_need

if TYPE_CHECKING:  # it needs triton
    from target.attention.prompts import FlashPrompts
    from target.attention.triton import TritonAttention

OVERRIDE = "SPECULATOR_ATTENTION"  # auto, torch or triton; torch is the oracle of the others, triton ours alone

log = logging.getLogger(__name__)


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

    ours = TritonAttention(cache)
    return ours if name == "triton" else _with_flash(ours)


def _with_flash(ours: TritonAttention) -> TritonAttention | FlashPrompts:
    """Prompt chunks by the first FlashAttention that can serve them."""
    from target.attention.prompts import FlashPrompts

    reasons = []
    for name in flashes():
        try:
            flash = FLASHES[name](ours.cache)
        except PlanError as why:
            reasons.append(str(why))
            continue
        _say(logging.INFO, f"prompt chunks attend by {flash.name}, rounds by our kernels")
        return FlashPrompts(ours, flash)
    level = logging.WARNING if reasons else logging.INFO
    _say(level, "prompt chunks attend by our kernels: " + ("; ".join(reasons) or "no build of FlashAttention is here"))
    return ours


FLASHES: dict[str, Callable[[PagedCache], FlashAttention3 | FlashAttention2]] = {
    FlashAttention3.name: partial(FlashAttention3, splits=1),
    FlashAttention2.name: FlashAttention2,
}


def flashes() -> list[str]:
    """What somebody named or installed, the best first."""
    here = (bool(os.environ.get("SPECULATOR_FLASH3")), find_spec("flash_attn") is not None)
    return [name for name, found in zip(FLASHES, here, strict=True) if found]


@once
def _say(level: int, line: str) -> None:
    """Once, however many engines and trial engines there are."""
    log.log(level, line)


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
