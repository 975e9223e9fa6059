"""Absorbed MLA over the paged latent cache, with metadata that is planned lazily, as FlashMLA's is.

Owns: the life of the metadata (empty, planned by the first pass that uses it, reused until replaced), storing latents,
the choice of a backend, and the torch reference. Must never know models, graphs, or when a plan should be replaced:
whoever records a pass gives it metadata of its own, and whoever changes lengths makes a new plan.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from target.attention.sdpa import visible
from target.attention.splits import BLOCK, Splits, empty_splits, fill_splits, lengths
from target.batch import Batch
from target.cache import PagedCache
from target.errors import PlanError
from target.products import kernels_need

LONGEST_QUERY = 16  # tokens of a planned pass; longer ones are prompt chunks
TILE = 64  # (query, head) pairs that one part handles at a time
CPU_PROCESSORS = 4  # what the CPU plays, so that rows are split there too
DENSE_SCORES = 1 << 26  # scores in memory at once


class PassShape(NamedTuple):
    """What a plan was made for, besides lengths."""

    rows: int
    queries: int
    heads: int
    dim: int
    page_size: int
    tree: bool


@dataclass
class MlaMetadata:
    """What a pass derives from its lengths: nothing until `use` is called, then kept whatever the lengths become.

    Lengths are never compared: metadata that outlives a change of them silently ignores the tokens appended since. The
    first `use` under a recorder records the planning, so every replay plans again; a later one records none.
    """

    shape: PassShape | None = None
    write: Tensor | None = None  # [R * T] int64 slots of the pass's own latents
    state: Any = field(default=None, repr=False)  # the backend's own

    def use(self, shape: PassShape, prepare: Callable[[], tuple[Tensor, Any]]) -> tuple[Tensor, Any]:
        """The slots and the backend's state, made now if this is the first use.

        Raises PlanError when they were made for another shape.
        """
        if self.shape is None:
            self.shape = shape
            self.write, self.state = prepare()
        elif self.shape != shape:
            names = [n for n, old, new in zip(shape._fields, self.shape, shape, strict=True) if old != new]
            made, asked = (", ".join(f"{n} {getattr(s, n)}" for n in names) for s in (self.shape, shape))
            raise PlanError(f"this metadata was planned for {made} and cannot serve a pass of {asked}: make a new plan")
        assert self.write is not None
        return self.write, self.state


class MlaPlan(NamedTuple):
    """One pass: what runs, and metadata that its first layer fills."""

    batch: Batch
    metadata: MlaMetadata


class MlaBackend(Protocol):
    """Attention over latents that are already stored; `prepare` is planning and runs once per metadata."""

    def check(self, batch: Batch) -> None:
        """Raises PlanError for a batch that this backend cannot run; reads nothing on the host."""

    def prepare(self, batch: Batch, heads: int) -> Any:
        """Device work only."""

    def attend(self, state: Any, batch: Batch, q: Tensor, latents: Tensor, scale: float) -> Tensor:
        """q [R, T, H, rank + rope], latents [slots, rank + rope] -> [R, T, H, rank]; padding gives zeros."""


class MlaAttention:
    """`plan` and `run` of absorbed MLA for a cache of latents; neither reads the host, so both may be recorded.

    A pass of up to 16 queries a row goes through `backend`, a longer one through dense torch attention. What lies in
    slots that no valid query of a row sees cannot reach the results, not even NaN.
    """

    def __init__(self, cache: PagedCache, rank: int, backend: str = "auto", processors: int | None = None) -> None:
        """`backend` is auto, torch, triton or flash_mla; `processors` overrides how many parts the device has.

        Raises PlanError for a cache that holds no latents of this rank, and for a backend that cannot run here.
        """
        if not any(layer.shape[1:3] == (1, 1) and layer.shape[3] >= rank for layer in cache.layers):
            raise PlanError(f"no layer of the cache holds one latent of rank {rank} a token")
        self.cache, self.rank = cache, rank
        self.backend = _backend(backend, cache, rank, processors)
        self._dense = Dense(cache.page_size, rank)

    def plan(self, batch: Batch) -> MlaPlan:
        """Metadata of its own, still empty. Raises PlanError for a batch the backend cannot run."""
        if batch.longest < 1:
            raise PlanError("a batch must say how long its longest row is")
        batch = _contiguous(batch)
        self._choose(batch).check(batch)
        return MlaPlan(batch, MlaMetadata())

    def run(self, plan: MlaPlan, layer: int, q: Tensor, latent: Tensor, scale: float) -> Tensor:
        """q [R, T, H, rank + rope], latent [R, T, rank + rope] of the pass's own tokens -> [R, T, H, rank]."""
        batch, backend = plan.batch, self._choose(plan.batch)
        store = self.cache.layers[layer].flatten(1)
        if q.shape[-1] != store.shape[1]:
            raise PlanError(f"queries of {q.shape[-1]} over latents of {store.shape[1]} in layer {layer}")

        def prepare() -> tuple[Tensor, Any]:
            slots = batch.slots(self.cache.page_size, self.cache.pad_slot).flatten()
            return slots, backend.prepare(batch, q.shape[2])

        rows, queries, heads, dim = q.shape
        shape = PassShape(rows, queries, heads, dim, self.cache.page_size, batch.ancestors is not None)
        write, state = plan.metadata.use(shape, prepare)
        store.index_copy_(0, write, latent.flatten(0, 1))
        return backend.attend(state, batch, q, store, scale)

    def _choose(self, batch: Batch) -> MlaBackend:
        return self.backend if batch.tokens.shape[1] <= LONGEST_QUERY else self._dense


def _contiguous(batch: Batch) -> Batch:
    """Kernels walk lengths, page tables and masks row by row; what lies so already is taken as it is.

    Raises PlanError for a static batch that does not: a copy would be stale after its next refill.
    """
    walked = ("context", "counts", "pages") + (() if batch.ancestors is None else ("ancestors",))
    given = {name: getattr(batch, name) for name in walked}
    if batch.static and not all(tensor.is_contiguous() for tensor in given.values()):
        raise PlanError("the lengths, page tables and masks of a static batch must be contiguous")
    return batch._replace(**{name: tensor.contiguous() for name, tensor in given.items()})


def _backend(name: str, cache: PagedCache, rank: int, processors: int | None) -> MlaBackend:
    if name == "auto":
        usable = not kernels_need(cache.layers[0].device)
        name = "triton" if usable and _small_enough(cache, rank) else "torch"
    if name == "torch":
        return TorchSplits(cache, rank, processors)
    if name == "triton":
        return _triton(cache, rank, processors)
    if name == "flash_mla":
        from target.attention.flash import FlashMla

        return FlashMla(cache, rank)
    raise PlanError(f"unknown MLA backend {name!r}: auto, torch, triton or flash_mla")


def _small_enough(cache: PagedCache, rank: int) -> bool:
    """Whether the kernels' tiles fit a multiprocessor."""
    return rank <= (128 if cache.layers[0].dtype == torch.float32 else 512)


def _triton(cache: PagedCache, rank: int, processors: int | None) -> MlaBackend:
    if find_spec("triton") is None:
        raise PlanError("the triton backend needs the package triton (pip install triton)")
    if not _small_enough(cache, rank):
        raise PlanError(f"the triton backend takes no latents of rank {rank} in {cache.layers[0].dtype}: use torch")
    from target.attention.mla_triton import TritonSplits

    return TritonSplits(cache, rank, processors)


# ---- the torch reference ----


class Seen(NamedTuple):
    """Where a pass reads, and what each query sees of it."""

    slots: Tensor  # [R * L] int64; what no valid query sees reads the zero slot
    mask: Tensor  # [R, T, L] bool; padding sees nothing


class Dense:
    """Attention in one piece, for prompt chunks: nothing of it is split."""

    def __init__(self, page_size: int, rank: int) -> None:
        self._page_size, self._rank = page_size, rank

    def check(self, batch: Batch) -> None:
        pass

    def prepare(self, batch: Batch, heads: int) -> Seen:
        return _seen(batch, self._page_size)

    def attend(self, state: Seen, batch: Batch, q: Tensor, latents: Tensor, scale: float) -> Tensor:
        rows, length, heads, _ = q.shape
        keys = _gather(latents, state.slots, rows)
        step = max(1, DENSE_SCORES // (rows * heads * keys.shape[1]))
        pieces = [
            _softmax(_scores(q[:, i : i + step], keys, scale), state.mask[:, i : i + step, None], keys, self._rank).out
            for i in range(0, length, step)
        ]
        return torch.cat(pieces, 1).to(q.dtype)


class SplitState(NamedTuple):
    """A plan, and what follows from it."""

    plan: Splits
    seen: Seen
    owners: Tensor  # [S, R, 1, 1, L] bool: which split of the row covers an index


class TorchSplits:
    """The reference: walks a row split by split as the plan says, so a stale plan is as wrong as on a GPU."""

    def __init__(self, cache: PagedCache, rank: int, processors: int | None = None) -> None:
        self._page_size, self._rank = cache.page_size, rank
        self._processors = processors or CPU_PROCESSORS

    def check(self, batch: Batch) -> None:
        pass

    def prepare(self, batch: Batch, heads: int) -> SplitState:
        rows, queries = batch.tokens.shape
        plan = empty_splits(rows, parts(self._processors, queries * heads), batch.tokens.device)
        fill_splits(plan, lengths(batch))
        return SplitState(plan, _seen(batch, self._page_size), _owners(plan, batch))

    def attend(self, state: SplitState, batch: Batch, q: Tensor, latents: Tensor, scale: float) -> Tensor:
        keys = _gather(latents, state.seen.slots, q.shape[0])
        mask = state.owners & state.seen.mask[:, :, None]  # [S, R, T, 1, L]
        found = _softmax(_scores(q, keys, scale), mask, keys, self._rank)
        return _combine(found).to(q.dtype)


def parts(processors: int, pairs: int, tile: int = TILE) -> int:
    """Parts of a plan when each row of the batch has so many (query, head) pairs: parts times tiles fill the device."""
    return max(processors // -(-pairs // tile), 1)


class Partial(NamedTuple):
    """Softmax over some of the keys."""

    out: Tensor  # [..., T, H, rank] float32, zero where nothing was seen
    lse: Tensor  # [..., T, H] float32, -inf there


def _softmax(scores: Tensor, mask: Tensor, keys: Tensor, rank: int) -> Partial:
    """scores [R, T, H, L], mask [..., R, T, 1, L], keys [R, L, dim]."""
    scores = scores.masked_fill(~mask, float("-inf"))
    top = scores.amax(-1, keepdim=True)
    weights = (scores - top.masked_fill(top == float("-inf"), 0)).exp()
    mass = weights.sum(-1, keepdim=True)
    values = keys[:, None, :, :rank].float()
    out = weights @ values / mass.masked_fill(mass == 0, 1)
    return Partial(out, (top + mass.log()).squeeze(-1))


def _combine(found: Partial) -> Tensor:
    """[S, R, T, H, rank] to [R, T, H, rank]: splits weighted by what they saw; an empty one is left out."""
    top = found.lse.amax(0)
    weights = (found.lse - top.masked_fill(top == float("-inf"), 0)).exp()
    mass = weights.sum(0)
    return (found.out * weights[..., None]).sum(0) / mass.masked_fill(mass == 0, 1)[..., None]


def _scores(q: Tensor, keys: Tensor, scale: float) -> Tensor:
    """q [R, T, H, dim], keys [R, L, dim] -> [R, T, H, L] float32."""
    return q.float() @ keys[:, None].float().mT * scale


def _gather(latents: Tensor, slots: Tensor, rows: int) -> Tensor:
    """[R, L, dim]"""
    return latents.index_select(0, slots).view(rows, -1, latents.shape[1])


def _seen(batch: Batch, page_size: int) -> Seen:
    index = torch.arange(batch.longest, device=batch.tokens.device)
    valid = torch.arange(batch.tokens.shape[1], device=index.device) < batch.counts[:, None]
    mask = visible(batch, batch.longest) & valid[..., None]
    page = (index // page_size).clamp(max=batch.pages.shape[1] - 1)
    slots = batch.pages[:, page] * page_size + index % page_size
    return Seen(slots.masked_fill(~mask.any(1), 0).flatten(), mask)


def _owners(plan: Splits, batch: Batch) -> Tensor:
    """[S, R, 1, 1, L] bool, S = parts: which of a row's splits an index belongs to, as the records say."""
    begin, end, begin_block, end_block, begin_split = plan.plan[:, None, None].unbind(-1)[:5]  # each [P, 1, 1]
    row = torch.arange(batch.tokens.shape[0], device=plan.plan.device)[:, None]
    block = torch.arange(batch.longest, device=row.device) // BLOCK
    after = (row > begin) | ((row == begin) & (block >= begin_block))
    before = (row < end) | ((row == end) & (block < end_block))
    split = torch.where(after & before, begin_split * (row == begin), -1).amax(0)  # [R, L]
    number = torch.arange(plan.plan.shape[0], device=row.device)
    return (split == number[:, None, None])[:, :, None, None]
