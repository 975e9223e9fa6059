"""How large the KV cache of a GPU may be: measured with the models in place, before the cache exists.

Owns: what is measured and in which order. The arithmetic is `graphs.memory.size_cache`. Must never be needed after
start-up.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from graphs.errors import GraphError
from graphs.memory import (
    NO_GRAPHS,
    CachePlan,
    GraphEstimate,
    Measured,
    Reading,
    cuda_meter,
    estimate_graphs,
    peak_activation,
    size_cache,
)
from graphs.recorder import CudaRecorder
from speculator.heads.base import DraftHead
from speculator.passes import EagerPasses, eager_passes
from speculator.recorded import RecordedPasses, Sizes
from speculator.round import Rounds, trial_rounds
from speculator.staged import recorded_passes
from target.batch import Batch
from target.cache import LayerShape, PagedCache, bytes_per_token
from target.decoder import Decoder
from target.states import StateCache, StatePass

log = logging.getLogger(__name__)

MakePasses = Callable[[Decoder, DraftHead | None, PagedCache, StateCache | None], EagerPasses]
PROMPTS_TOGETHER = 4  # prompt chunks of one step that the measured peak covers


class Load(NamedTuple):
    """What will run, as far as memory goes."""

    sizes: Sizes
    sessions: int
    prefill_chunk: int
    graphs: bool
    rounds: Sequence[int] | None  # whole rounds are recorded too, with shorter chains of these depths
    utilisation: float  # share of the card that may be in use, other processes included


class Sized(NamedTuple):
    """The cache that fits, and what graphs were expected to take."""

    plan: CachePlan
    graphs: GraphEstimate


def cache_groups(target: Decoder, head: DraftHead | None) -> list[list[LayerShape]]:
    return [target.cache_layers] + ([head.cache_layers] if head else [])


@torch.inference_mode()
def measure(
    target: Decoder,
    head: DraftHead | None,
    load: Load,
    before: Reading,
    states: StateCache | None = None,
    passes: MakePasses = eager_passes,
) -> Sized:
    """Run and record the largest passes over a cache of two pages; `before` was read ahead of everything else.

    `states` are those of a hybrid's sessions, which exist already and count with the weights; `passes` makes the eager
    passes that run.

    Raises graphs.memory.CacheSizeError when no page fits.
    """
    device, dtype = target.embed.weight.device, target.embed.weight.dtype
    groups = cache_groups(target, head)
    cache = PagedCache(groups, 2, load.sizes.page_size, dtype, device)
    eager = passes(target, head, cache, states)
    weights = torch.cuda.memory_allocated(device)
    peak = peak_activation(partial(_largest_passes, eager, load, device), device)
    graphs = _estimate(eager, cache, load, device) if load.graphs else NO_GRAPHS
    after = cuda_meter(device)()
    measured = Measured(
        total=before.total,
        free_before=before.free,
        weights=weights,
        peak_activation=peak,
        graph_estimate=graphs.bytes,
        other=max(0, before.free - after.free - after.reserved),
        trusted=graphs.trusted,
        doubt=graphs.doubt,
    )
    plan = size_cache(measured, load.utilisation, bytes_per_token(groups, dtype) * load.sizes.page_size)
    log.info("KV cache: %d pages fit: %s", plan.pages, plan.why)
    return Sized(plan, graphs)


def _estimate(eager: EagerPasses, cache: PagedCache, load: Load, device: torch.device) -> GraphEstimate:
    """A rung of the ladder at a time, all passes together."""
    recorder, made, rounds = CudaRecorder(device), list[RecordedPasses](), list[Rounds]()

    def capture(rung: int) -> None:
        made.append(recorded_passes(eager, recorder, load.sizes, device, rung))
        made[-1].capture()
        if load.rounds is not None:
            own = rounds[0] if rounds else None
            rounds.append(trial_rounds(eager, recorder, load.sizes, cache, load.sessions, load.rounds, rung, own))
            rounds[-1].capture()

    def release() -> None:
        made.clear()
        rounds.clear()
        recorder.close()

    try:
        return estimate_graphs(range(load.sizes.rungs), capture, release, cuda_meter(device))
    except GraphError as error:  # the capture proper will say the same and leave the passes eager
        return replace(NO_GRAPHS, doubt=f"graphs could not be captured on trial: {error}")


def _largest_passes(eager: EagerPasses, load: Load, device: torch.device) -> None:
    """The longest prompt chunks, then the widest round, all of padding."""
    sizes, shape = load.sizes, load.sizes.shape
    prompts = _padding(min(PROMPTS_TOGETHER, load.sessions), load.prefill_chunk, sizes, device)
    eager.feed(prompts, _null_states(eager, prompts, prompts.counts))
    round_ = _padding(load.sessions, 1 + (shape.depth if shape.is_chain else shape.nodes), sizes, device)
    _ = eager.verify(round_, _null_states(eager, round_, None)).logits


def _null_states(eager: EagerPasses, batch: Batch, counts: Tensor | None) -> StatePass | None:
    """Every row on the null slot, which is what a padded row has."""
    return None if eager.states is None else StatePass(eager.states, torch.zeros_like(batch.context), counts)


def _padding(rows: int, queries: int, sizes: Sizes, device: torch.device) -> Batch:
    zeros = partial(torch.zeros, dtype=torch.int64, device=device)
    tokens, lengths = zeros(rows, queries), zeros(rows)
    return Batch(tokens, tokens, lengths, lengths, zeros(rows, sizes.pages), longest=sizes.capacity, static=True)
