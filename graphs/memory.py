"""How much memory graphs will take, measured before the KV cache is sized, and what the cache may then have.

Owns: readings of device memory, the throw-away estimate and the sizing, a pure function of measured numbers. Must never
know models, caches or recorders; it is given callables and numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch

from graphs.errors import GraphError

log = logging.getLogger(__name__)
Shape = TypeVar("Shape")

# The driver hands out device memory in pages of 2 MiB: a graph that seems to cost nothing took the rest of such a page.
DRIVER_PAGE = 2 << 20
GIB, MIB = 1 << 30, 1 << 20


class CacheSizeError(GraphError):
    """No KV cache can be sized from these numbers; the text says which one and what to change."""


class Reading(NamedTuple):
    """Device memory at one moment, in bytes."""

    free: int  # of the whole card, other processes counted
    total: int
    reserved: int  # by this process's allocator


Meter = Callable[[], Reading]


def cuda_meter(device: torch.device | str | int) -> Meter:
    """A meter of one CUDA device. It waits for the device, and counts memory that torch merely keeps as free."""

    def read() -> Reading:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        return Reading(free, total, torch.cuda.memory_reserved(device))

    return read


def pool_meter(pool_bytes: Callable[[], int], total: int) -> Meter:
    """A meter where no device can be asked: `total` bytes of which a recorder's pool is all that anyone takes."""

    def read() -> Reading:
        taken = pool_bytes()
        return Reading(total - taken, total, taken)

    return read


def peak_activation(run: Callable[[], object], device: torch.device | str | int) -> int:
    """Bytes that torch's allocator needed on a CUDA device during `run`, above what it held before."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


class Difference(NamedTuple):
    """What happened between two readings, in bytes, and why not to trust it ("" to trust it)."""

    taken: int
    doubt: str = ""


def difference(before: Reading, after: Reading) -> Difference:
    """Memory taken from the card, at least what the allocator grew by: less means that others freed some meanwhile."""
    taken, grown = before.free - after.free, after.reserved - before.reserved
    if taken < grown:
        return Difference(max(grown, 0), "another process freed memory of this card during the measurement")
    return Difference(max(taken, 0), "memory came back during the measurement" if taken < 0 else "")


@dataclass(frozen=True)
class GraphEstimate:
    """Bytes that recording some shapes will take: the largest one, and each further one. `doubt` "" is trusted."""

    shapes: int
    largest: int
    further: int
    doubt: str = ""

    @property
    def bytes(self) -> int:
        return self.largest + (self.shapes - 1) * self.further if self.shapes else 0

    @property
    def trusted(self) -> bool:
        return not self.doubt


NO_GRAPHS = GraphEstimate(0, 0, 0)


def estimate_graphs(
    shapes: Sequence[Shape], capture: Callable[[Shape], None], release: Callable[[], None], meter: Meter
) -> GraphEstimate:
    """Record the two largest shapes in a throw-away pool and extrapolate.

    `shapes` come largest first. `capture` records one of them into a pool that lives until `release`; what a first
    run leaves behind for good (workspaces) must be warmed up before. The largest costs what it cost here; every
    further one what the second cost on top, at least a page of the driver: smaller shapes never cost more, because
    they reuse the pool that the largest made. Captures that fail are the caller's errors; the pool is released.
    """
    if not shapes:
        return NO_GRAPHS
    readings = [meter()]
    try:
        for shape in shapes[:2]:
            capture(shape)
            readings.append(meter())
    finally:
        release()
    steps = [difference(before, after) for before, after in zip(readings, readings[1:], strict=False)]
    doubt = next((step.doubt for step in steps if step.doubt), "")
    costs = [max(step.taken, DRIVER_PAGE) for step in steps]
    return GraphEstimate(len(shapes), costs[0], costs[-1], doubt or _nothing_seen(steps))


def _nothing_seen(steps: Sequence[Difference]) -> str:
    if any(step.taken for step in steps):
        return ""
    return "recording the largest shapes took no memory that could be seen"


def compare(estimate: GraphEstimate, actual: int) -> float:
    """Log what was estimated beside what capture took, in bytes; returns actual / estimate (0 when nothing was)."""
    share = actual / estimate.bytes if estimate.bytes else 0.0
    over = actual > estimate.bytes
    log.log(
        logging.WARNING if over else logging.INFO,
        "graph memory: %.1f MiB for %d shapes, %.1f MiB were estimated%s",
        actual / MIB,
        estimate.shapes,
        estimate.bytes / MIB,
        "; the KV cache was sized too large by the difference" if over else "",
    )
    return share


@dataclass(frozen=True)
class Measured:
    """What was measured on one device before the cache is sized, in bytes. `doubt` says why not to trust it, if so."""

    total: int
    free_before: int  # before this process put anything on the device
    weights: int
    peak_activation: int  # above the weights, of the largest eager pass
    graph_estimate: int = 0
    other: int = 0  # what this process holds outside its allocator: context, libraries, communicators
    trusted: bool = True
    doubt: str = ""

    @property
    def held(self) -> int:
        """Bytes of this process without a cache."""
        return self.weights + self.peak_activation + self.graph_estimate + self.other


class CachePlan(NamedTuple):
    """The outcome of sizing: whole pages, bytes kept from the cache, and why in one line."""

    pages: int
    reserved: int
    why: str


# Pools fragment, and allocators round up: kept even when the measurement is sound.
TRUSTED_MARGIN = 1 / 50  # of what activations and graphs take
# A peak or an estimate that is wrong is wrong by a factor, not by a little.
UNTRUSTED_MARGIN = 1 / 2
UNTRUSTED_SHARE = 1 / 50  # of the card, at least


def size_cache(measured: Measured, utilisation: float, bytes_per_page: int) -> CachePlan:
    """Pages that fit once weights, activations, graphs and a margin are taken. Pure: the same numbers, the same plan.

    `utilisation` in (0, 1] is how full the card may be, other processes included. A measurement that is not trusted
    keeps a larger margin instead of being refused, because a start on a shared card is better small than not at all;
    numbers that contradict each other are refused. Raises CacheSizeError, also when not one page is left.
    """
    _check(measured, utilisation, bytes_per_page)
    others = measured.total - measured.free_before
    budget = int(measured.total * utilisation) - others
    reserved = measured.held + _margin(measured)
    left = budget - reserved
    if left < bytes_per_page:
        raise CacheSizeError(
            f"no room for a KV cache: {_gib(max(budget, 0))} GiB may be used, {_parts(measured)} are taken first, "
            f"and a page needs {bytes_per_page} bytes; use a smaller model, fewer graph shapes or a larger utilisation"
        )
    return CachePlan(left // bytes_per_page, reserved, f"{_gib(budget)} GiB less {_parts(measured)}")


def _check(measured: Measured, utilisation: float, bytes_per_page: int) -> None:
    if not 0 < utilisation <= 1:
        raise CacheSizeError(f"the share of the card to use must lie above 0 and at most at 1, got {utilisation}")
    if bytes_per_page < 1:
        raise CacheSizeError(f"a page of the KV cache must have bytes, got {bytes_per_page}")
    parts = (measured.weights, measured.peak_activation, measured.graph_estimate, measured.other)
    if min(parts) < 0 or not 0 <= measured.free_before <= measured.total:
        raise CacheSizeError(f"the measured memory contradicts itself, measure again: {measured}")


def _margin(measured: Measured) -> int:
    moving = measured.peak_activation + measured.graph_estimate
    if measured.trusted:
        return int(moving * TRUSTED_MARGIN)
    return max(int(moving * UNTRUSTED_MARGIN), int(measured.total * UNTRUSTED_SHARE))


def _parts(measured: Measured) -> str:
    doubt = "" if measured.trusted else f" (larger: {measured.doubt or 'the measurement is not trusted'})"
    return (
        f"weights {_gib(measured.weights)}, activations {_gib(measured.peak_activation)}, graphs "
        f"{_gib(measured.graph_estimate)}, other {_gib(measured.other)}, margin {_gib(_margin(measured))}{doubt}"
    )


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"
