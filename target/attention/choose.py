"""Which attention backend a model's layers run on.

Owns: the choice. Must never know passes or batches.
"""

from __future__ import annotations

from typing import Any

from target.attention.mla import MlaAttention
from target.attention.sdpa import SdpaAttention
from target.cache import PagedCache
from target.config import ModelConfig


def attention_for(config: ModelConfig, cache: PagedCache) -> Any:
    """The backend of a target's layers: absorbed MLA over latents where the config has it, else grouped queries.

    The two differ in what `run` takes; a model's layers call the one they were made for.
    """
    return SdpaAttention(cache) if config.mla is None else MlaAttention(cache, config.mla.rank)
