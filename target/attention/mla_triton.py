"""The Triton backend of MLA: which kernels a batch gets, and the storage of their plan.

Owns: the hand-over from a batch to launches. Must never know why a plan is made or kept.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from target.attention.splits import Splits, empty_splits
from target.batch import Batch
from target.cache import PagedCache
from target.errors import PlanError
from target.kernels import mla as kernels


class TritonState(NamedTuple):
    """A plan, and the tiles it was made for."""

    plan: Splits
    config: kernels.Config


class TritonSplits:
    """Planner, split-KV pass and combine on the device, all from live lengths; nothing is read on the host."""

    def __init__(
        self, cache: PagedCache, rank: int, processors: int | None = None, config: kernels.Config | None = None
    ) -> None:
        """`config` replaces the table's choice, for tuning."""
        self._page_size, self._rank, self._config = cache.page_size, rank, config
        self._latents = next(layer.flatten(1) for layer in cache.layers if layer.shape[1:3] == (1, 1))
        self._processors = processors or processors_of(cache.layers[0].device)

    def check(self, batch: Batch) -> None:
        if not (batch.context.dtype == batch.counts.dtype == batch.pages.dtype == torch.int64):
            raise PlanError("the MLA kernels read int64 lengths and page tables")

    def prepare(self, batch: Batch, heads: int) -> TritonState:
        requests, rows = batch.tokens.shape[0], batch.tokens.shape[1] * heads
        config = self._config or kernels.pick(requests, rows, self._rank, self._latents, self._page_size)
        parts = kernels.parts_of(config, requests, rows, self._processors)
        plan = empty_splits(requests, parts, batch.tokens.device)
        kernels.launch_plan(plan, batch, config)
        return TritonState(plan, config)

    def attend(self, state: TritonState, batch: Batch, q: Tensor, latents: Tensor, scale: float) -> Tensor:
        return kernels.launch_decode(batch, state.plan, q, latents, self._page_size, self._rank, scale, state.config)


def processors_of(device: torch.device) -> int:
    """Multiprocessors of a CUDA device."""
    if device.type != "cuda":
        raise PlanError(f"the triton backend needs a CUDA device, not {device}: use torch")
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
