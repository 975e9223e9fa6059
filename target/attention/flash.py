"""Adapters to kernels built elsewhere: FlashMLA behind the MLA seam, two FlashAttentions behind the plain one.

Owns: finding those builds, turning a batch into their arguments, and the life of their scheduler metadata. Must never
know models or graphs.

Builds are found by environment variable, as a shared library or a folder that holds one: SPECULATOR_FLASHMLA
(_flashmla_C*.so) and SPECULATOR_FLASH3 (_vllm_fa3_C*.so). FlashMLA is also taken from the package `flash_mla`;
FlashAttention-2 is the package `flash_attn`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from target.attention.splits import lengths as stored_tokens
from target.batch import Batch
from target.cache import PagedCache
from target.errors import PlanError

FLASH_MLA_PAGE, FLASH_MLA_RANK, FLASH_MLA_DIM = 64, 512, 576
FLASH2_PAGE = 256
FLASH3_PAGE = 64  # larger pages are read by whole tiles, and NaN in a slot that holds nothing would count


# ---- FlashMLA ----


class Scheduler(Protocol):
    """FlashMLA's own metadata: empty, planned by the first call, reused by later ones."""

    def __call__(self, q: Tensor, pages: Tensor, table: Tensor, stored: Tensor, scale: float, causal: bool) -> Tensor:
        """q [R, T, H, 576], pages [N, 64, 1, 576], table [R, P] int32, stored [R] int32 -> [R, T, H, 512]."""


class LibraryScheduler:
    """Around the operator `_flashmla_C::dense_decode_fwd`."""

    def __init__(self) -> None:
        self._plan: tuple[Tensor | None, Tensor | None] = (None, None)

    def __call__(self, q: Tensor, pages: Tensor, table: Tensor, stored: Tensor, scale: float, causal: bool) -> Tensor:
        decode = torch.ops._flashmla_C.dense_decode_fwd
        out, _, *plan = decode(q, pages, FLASH_MLA_RANK, stored, table, scale, causal, *self._plan, None)
        self._plan = (plan[0], plan[1])
        return out  # type: ignore[no-any-return]


class PackageScheduler:
    """Around the package `flash_mla`, of the releases whose metadata is lazy."""

    def __init__(self) -> None:
        package: Any = import_module("flash_mla")
        self._decode, self._metadata = package.flash_mla_with_kvcache, package.get_mla_metadata()[0]

    def __call__(self, q: Tensor, pages: Tensor, table: Tensor, stored: Tensor, scale: float, causal: bool) -> Tensor:
        out, _ = self._decode(
            q, pages, table, stored, FLASH_MLA_RANK, self._metadata, softmax_scale=scale, causal=causal
        )
        return out  # type: ignore[no-any-return]


def find_flash_mla() -> type[LibraryScheduler] | type[PackageScheduler]:
    """The build to use. Raises PlanError where there is none."""
    if place := os.environ.get("SPECULATOR_FLASHMLA"):
        load_build(place, "_flashmla_C*.so")
        return LibraryScheduler
    if find_spec("flash_mla") is None:
        raise PlanError("the flash_mla backend needs the package flash_mla, or a build named by SPECULATOR_FLASHMLA")
    return PackageScheduler


def load_build(place: str, pattern: str) -> None:
    """Register the operators of a library, or of the one in a folder that fits `pattern`. Raises PlanError."""
    path = Path(place)
    found = sorted(path.glob(pattern)) if path.is_dir() else [path]
    if not found or not found[0].is_file():
        raise PlanError(f"{place} is neither a library nor a folder with a {pattern}")
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        raise PlanError(f"{found[0]} cannot be loaded here: {error}") from error


class Moved(NamedTuple):
    """A row's queries at the end of the row, where masks want them that know no counts."""

    there: Tensor  # [R, T] which query goes to each place
    back: Tensor  # [R, T] and where its result is found
    padded: Tensor  # [R, T, 1, 1] bool

    def take(self, q: Tensor) -> Tensor:
        """q [R, T, H, D] in their new places."""
        return _rows(q, self.there).contiguous()

    def give(self, out: Tensor) -> Tensor:
        """Results [R, T, H, D] where their queries came from, zeros for padding."""
        return _rows(out, self.back).masked_fill(self.padded, 0)


def move(batch: Batch) -> Moved:
    queries = batch.tokens.shape[1]
    step = torch.arange(queries, device=batch.tokens.device)
    shift = queries - batch.counts[:, None]
    padded = (step >= batch.counts[:, None])[..., None, None]
    return Moved((step - shift).clamp(min=0), (step + shift).clamp(max=queries - 1), padded)


class FlashState(NamedTuple):
    """What FlashMLA reads of a batch, and its metadata."""

    table: Tensor  # [R, P] int32
    stored: Tensor  # [R] int32
    moved: Moved
    scheduler: Scheduler


class FlashMla:
    """`MlaBackend` of the real FlashMLA: chains only, pages of 64 tokens, latents of 512 + 64 in 16 bits."""

    def __init__(self, cache: PagedCache, rank: int) -> None:
        """Raises PlanError for a cache it cannot read, and where no build is found."""
        layer = cache.layers[0]
        if cache.page_size != FLASH_MLA_PAGE:
            raise PlanError(f"FlashMLA reads pages of {FLASH_MLA_PAGE} tokens, not {cache.page_size}")
        if rank != FLASH_MLA_RANK or layer.shape[-1] != FLASH_MLA_DIM:
            raise PlanError(f"FlashMLA takes latents of 512 + 64, not {rank} + {layer.shape[-1] - rank}")
        if layer.dtype not in (torch.bfloat16, torch.float16):
            raise PlanError(f"FlashMLA computes in 16 bits, not in {layer.dtype}")
        self._scheduler = find_flash_mla()

    def check(self, batch: Batch) -> None:
        if batch.ancestors is not None:
            raise PlanError("FlashMLA has no tree mask: verify chains, or use the triton backend")

    def prepare(self, batch: Batch, heads: int) -> FlashState:
        return FlashState(batch.pages.int(), stored_tokens(batch).int(), move(batch), self._scheduler())

    def attend(self, state: FlashState, batch: Batch, q: Tensor, latents: Tensor, scale: float) -> Tensor:
        pages = latents.view(-1, FLASH_MLA_PAGE, 1, FLASH_MLA_DIM)
        if q.shape[1] == 1:
            out = state.scheduler(q.contiguous(), pages, state.table, state.stored, scale, False)
            return out.masked_fill(state.moved.padded, 0)
        return state.moved.give(state.scheduler(state.moved.take(q), pages, state.table, state.stored, scale, True))


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x [R, T, H, D] with the queries of each row in the order of index [R, T]."""
    return x.gather(1, index[..., None, None].expand(x.shape))


# ---- FlashAttention-3 ----


class Lengths(NamedTuple):
    """What FlashAttention reads of a batch of R rows, T queries apart."""

    starts: Tensor  # [R + 1] int32, of the rows among all queries: 0, T, 2T and so on
    table: Tensor  # [R, P] int32
    stored: Tensor  # [R] int32
    counts: Tensor  # [R] int32
    longest: int


class SchedulerMetadata:
    """A plan of fixed address: made elsewhere for the lengths of now, copied here before kernels read it.

    Kernels that were recorded go on reading this storage, so it is never replaced and never lent to another pass. A
    plan that was not refreshed after its lengths changed is stale.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.values = torch.zeros(capacity, dtype=torch.int32, device=device)
        self.count = 0

    @property
    def filled(self) -> bool:
        return self.count > 0

    @property
    def plan(self) -> Tensor:
        """As many numbers as the last plan had, always from the first one on."""
        return self.values[: self.count]

    def refresh(self, values: Tensor) -> None:
        """Copy a plan in; what is left of an older, longer one is cleared. Raises PlanError when it does not fit."""
        count = values.numel()
        if count > self.values.numel():
            raise PlanError(f"a plan of {count} numbers does not fit the {self.values.numel()} of its storage")
        self.values[:count].copy_(values)
        self.values[count:].zero_()
        self.count = count


@dataclass
class Flash3Plan:
    """One pass; the buffers are its own and refilled by `FlashAttention3.refresh`."""

    batch: Batch
    metadata: SchedulerMetadata
    lengths: Lengths
    write: Tensor  # [R * T] int64


class FlashAttention3:
    """Paged attention by FlashAttention-3, with scheduler metadata in persistent storage and a fixed number of splits.

    Its plan is not made by the kernel but before it: `run` refreshes a plan that never was, whoever changes lengths
    calls `refresh`, inside a recorded pass or before each replay. A pass that is not recorded needs no plan: after
    `prepare`, `attend` leaves it to the kernel.
    """

    name = "FlashAttention-3"

    def __init__(self, cache: PagedCache, splits: int = 16) -> None:
        """Raises PlanError for a device or a cache it cannot serve, and where no build is found."""
        _check_cache(self.name, cache, (9, 0), (9, 9))
        if cache.page_size > FLASH3_PAGE:
            raise PlanError(f"{self.name} reads pages of at most {FLASH3_PAGE} tokens here, not of {cache.page_size}")
        place = os.environ.get("SPECULATOR_FLASH3")
        if not place:
            raise PlanError("the FlashAttention-3 backend needs a build named by SPECULATOR_FLASH3")
        load_build(place, "_vllm_fa3_C*.so")
        self.cache, self.splits = cache, splits

    def plan(self, batch: Batch) -> Flash3Plan:
        """Empty buffers of its own. Raises PlanError for trees, which FlashAttention-3 has no mask for."""
        _check_chain(self.name, batch)
        rows, queries = batch.tokens.shape
        device = batch.tokens.device

        def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        metadata = SchedulerMetadata(scheduler_capacity(rows), device)
        write = empty(rows * queries, dtype=torch.int64)
        lengths = Lengths(_starts(batch), empty(*batch.pages.shape), empty(rows), empty(rows), batch.longest)
        return Flash3Plan(batch, metadata, lengths, write)

    def refresh(self, plan: Flash3Plan, heads: int, kv_heads: int, dim: int, window: int | None = None) -> None:
        """Derive all that depends on lengths again, into the same storage; device work only."""
        batch = plan.batch
        plan.lengths.table.copy_(batch.pages)
        plan.lengths.stored.copy_(stored_tokens(batch))
        plan.lengths.counts.copy_(batch.counts)
        plan.write.copy_(batch.slots(self.cache.page_size, self.cache.pad_slot).flatten())
        rows, queries = batch.tokens.shape
        made = torch.ops._vllm_fa3_C.get_scheduler_metadata(
            rows, queries, batch.longest, heads, kv_heads, dim, dim, self.cache.layers[0].dtype,
            plan.lengths.stored, plan.lengths.starts, None, None, plan.lengths.counts, None, self.cache.page_size, 0,
            True, *_window(window), False, self.splits, None, 0,
        )  # fmt: skip
        plan.metadata.refresh(made)

    def run(self, plan: Flash3Plan, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """q [R, T, heads, dim], k and v [R, T, kv_heads, dim] -> [R, T, heads, dim]; padding gives zeros."""
        if not plan.metadata.filled:
            self.refresh(plan, q.shape[2], k.shape[2], q.shape[3], window)
        store = self.cache.layers[layer]
        store.index_copy_(0, plan.write, torch.stack((k, v), dim=2).flatten(0, 1))
        out = torch.zeros_like(q)
        metadata, size = plan.metadata.plan, self.cache.page_size
        return flash3_forward(q.contiguous(), store, size, plan.lengths, out, window, self.splits, metadata)

    def prepare(self, batch: Batch) -> Lengths:
        """For a pass that is not recorded. Raises PlanError for trees."""
        _check_chain(self.name, batch)
        return _lengths(batch)

    def attend(self, state: Lengths, layer: int, q: Tensor, window: int | None) -> Tensor:
        """`run` over keys and values that are already stored, without a plan."""
        store, size = self.cache.layers[layer], self.cache.page_size
        return flash3_forward(q.contiguous(), store, size, state, torch.zeros_like(q), window, self.splits)


def flash3_forward(
    q: Tensor, store: Tensor, page_size: int, lengths: Lengths, out: Tensor, window: int | None = None,
    splits: int = 0, metadata: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """q [R, T, heads, dim] over a layer's storage into `out`, whose padding stays; 0 splits: as many as suit.

    Where rows start is told although they are equally far apart: without it, the kernel that joins splits takes rows
    that have counts for one, and writes all of them where the first lies.
    """
    keys, values = _paged(store, page_size)
    torch.ops._vllm_fa3_C.fwd(
        q.flatten(0, 1), keys, values, None, None, None, out.view(-1, *out.shape[2:]), lengths.starts, None, None,
        lengths.counts, lengths.stored, q.shape[1], lengths.longest, lengths.table, None, None, None, None, None, None,
        None, None, q.shape[3] ** -0.5, True, *_window(window), 0.0, True, metadata, splits, None, 0, None, 1, 0, None,
    )  # fmt: skip
    return out


def scheduler_capacity(rows: int) -> int:
    """int32 values that FlashAttention-3 may plan with for so many rows: four a row, rounded up, and a semaphore."""
    return 4 * -(-rows // 4) * 4 + 4


def _window(window: int | None) -> tuple[int, int]:
    return (-1, -1) if window is None else (window - 1, 0)


def _starts(batch: Batch) -> Tensor:
    rows, queries = batch.tokens.shape
    return torch.arange(rows + 1, dtype=torch.int32, device=batch.tokens.device) * queries


def _lengths(batch: Batch) -> Lengths:
    table, stored = batch.pages.int().contiguous(), stored_tokens(batch).int()
    return Lengths(_starts(batch), table, stored, batch.counts.int(), batch.longest)


def _paged(store: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a layer [pages, page_size, kv_heads, dim]."""
    keys, values = (part.unflatten(0, (-1, page_size)) for part in store.unbind(1))
    return keys, values


def _check_chain(name: str, batch: Batch) -> None:
    if batch.ancestors is not None:
        raise PlanError(f"{name} has no tree mask: verify chains, or use another backend")
    if batch.longest < 1:
        raise PlanError("a batch must say how long its longest row is")


def _check_cache(name: str, cache: PagedCache, oldest: tuple[int, int], newest: tuple[int, int]) -> None:
    """Raises PlanError where a kernel of this name cannot serve the layers of keys and values."""
    layers = [layer for layer in cache.layers if layer.shape[1] == 2]
    if not layers:
        raise PlanError(f"{name} reads keys and values, and the cache has none")
    dtypes, dims = {layer.dtype for layer in layers}, {layer.shape[3] for layer in layers}
    if odd := dtypes - {torch.bfloat16, torch.float16}:
        raise PlanError(f"{name} computes in 16 bits, not in {odd.pop()}")
    if wide := {dim for dim in dims if dim > 256 or dim % 8}:
        raise PlanError(f"{name} takes heads of a multiple of 8 up to 256, not of {wide.pop()}")
    device = layers[0].device
    if device.type == "cuda" and not oldest <= (found := torch.cuda.get_device_capability(device)) <= newest:
        low, high, here = (".".join(map(str, one)) for one in (oldest, newest, found))
        raise PlanError(f"{name} runs on compute capability {low} to {high}, not on {here}")


# ---- FlashAttention-2 ----


class Flash2State(NamedTuple):
    """What flash-attn reads of a batch: as many queries in every row."""

    lengths: Lengths
    moved: Moved


class FlashAttention2:
    """Paged attention by the package `flash_attn`, for passes that are not recorded; pages of 256 tokens."""

    name = "flash-attn"

    def __init__(self, cache: PagedCache) -> None:
        """Raises PlanError for a device or a cache it cannot serve, and where the package is missing or broken."""
        _check_cache(self.name, cache, (8, 0), (12, 9))
        if cache.page_size % FLASH2_PAGE:
            raise PlanError(f"{self.name} reads pages of a multiple of {FLASH2_PAGE} tokens, not of {cache.page_size}")
        self.cache = cache
        try:
            self._attend: Any = import_module("flash_attn").flash_attn_with_kvcache
        except (ImportError, AttributeError) as error:
            raise PlanError(f"the package flash_attn cannot be used here: {error}") from error

    def prepare(self, batch: Batch) -> Flash2State:
        """Raises PlanError for trees."""
        _check_chain(self.name, batch)
        return Flash2State(_lengths(batch), move(batch))

    def attend(self, state: Flash2State, layer: int, q: Tensor, window: int | None) -> Tensor:
        """q [R, T, heads, dim] -> [R, T, heads, dim]; keys and values are stored already, padding gives zeros."""
        keys, values = _paged(self.cache.layers[layer], self.cache.page_size)
        out = self._attend(
            state.moved.take(q), keys, values, cache_seqlens=state.lengths.stored, block_table=state.lengths.table,
            softmax_scale=q.shape[3] ** -0.5, causal=True, window_size=_window(window), num_splits=1,
        )  # fmt: skip
        return state.moved.give(out)
