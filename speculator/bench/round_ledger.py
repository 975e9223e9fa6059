"""Where the time of a round goes, by the names of what ran: a literal table, and gaps.

Owns: the table and the sums. Must never run a round.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function

PRODUCTS, ATTENTION, ELEMENTWISE, SAMPLING, OTHER, GAPS = (
    "matrix products", "attention", "elementwise", "sampling", "other", "gaps",
)  # fmt: skip
# The first part whose word is in a name (lower case) has it. Kernels of CUDA, of ours, and the operators of a CPU.
TABLE: tuple[tuple[str, tuple[str, ...]], ...] = (
    (SAMPLING, ("argmax", "argmin", "topk", "sort", "gumbel", "softmax", "multinomial", "logsumexp", "radix",
                "cumsum", "scan", "accept", "verdict", "draw", "partials", "merge_kernel", "note_kernel", "judge",
                "begin_kernel", "begin_tree", "settle_kernel", "grow_kernel", "select_kernel", "hold_kernel",
                "move_kernel", "written_kernel", "floor_kernel")),
    (ATTENTION, ("attention", "attend", "flash", "fmha", "mha_", "split_kernel", "combine_kernel", "decode_kernel",
                 "plan_kernel", "store_kernel", "rule_kernel", "mla")),
    (PRODUCTS, ("gemm", "gemv", "nvjet", "cutlass", "cublas", "xmma", "splitk", "product", "sum_kernel", "gated_kernel",
                "read_kernel", "matmul", "linear", "aten::mm", "addmm", "bmm", "mkldnn")),
    (ELEMENTWISE, ("elementwise", "norm", "silu", "rope", "reduce", "copy", "memcpy", "memset", "fill", "cat", "index",
                   "gather", "scatter", "arange", "where", "embedding", "mul", "add", "sub", "div", "pow", "rsqrt",
                   "mean", "sum", "cos", "sin", "exp", "log", "clamp", "eq", "ne", "lt", "le", "gt", "ge", "bitwise",
                   "shift", "any", "all", "isfinite", "select", "triton", "aten::")),
)  # fmt: skip
ROUND = "speculator round"


class Kernel(NamedTuple):
    """Something that ran: its name, when it began and ended, in microseconds."""

    name: str
    start: float
    end: float


class Ledger(NamedTuple):
    """Microseconds of one round."""

    parts: dict[str, float]  # by part, without gaps
    busy: float  # something ran
    span: float | None  # from the first start to the last end; None where operators are timed by themselves
    kernels: int
    names: Mapping[str, tuple[int, float]] = MappingProxyType({})  # of one round: how often, and microseconds


def part_of(name: str) -> str:
    """The part of the ledger that a kernel or operator belongs to."""
    small = name.lower()
    return next((part for part, words in TABLE if any(word in small for word in words)), OTHER)


def profiled(run: Any, rounds: int, device: torch.device) -> Ledger | None:
    """The median ledger of `rounds` calls of `run`; None where the profiler saw nothing."""
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as found:
        for _ in range(rounds):
            with record_function(ROUND):
                run()
    ledgers = [ledger_of(kernels) for kernels in _by_round(found.events() or [], cuda) if kernels]
    if not ledgers:
        return None
    return median(ledgers) if cuda else median(ledgers)._replace(span=None)


def _by_round(events: Iterable[Any], cuda: bool) -> list[list[Kernel]]:
    """What ran in each round. A round waits for its own kernels, so they lie inside it."""
    listed = list(events)
    ranges = [e.time_range for e in listed if e.name == ROUND and not _on_gpu(e)]
    wanted = [e for e in listed if e.name != ROUND and _on_gpu(e) == cuda]
    kernels = sorted(Kernel(e.name, e.time_range.start, _end(e, cuda)) for e in wanted)
    return [[k for k in kernels if r.start <= k.start <= r.end] for r in ranges]


def _end(event: Any, cuda: bool) -> float:
    """Operators of a CPU contain each other; each counts what it did itself."""
    return float(event.time_range.end if cuda else event.time_range.start + event.self_cpu_time_total)


def _on_gpu(event: Any) -> bool:
    return bool(event.device_type.name == "CUDA")


def ledger_of(kernels: Sequence[Kernel]) -> Ledger:
    """The parts of one round, and how long anything ran; kernels may overlap."""
    parts = dict.fromkeys((PRODUCTS, ATTENTION, ELEMENTWISE, SAMPLING, OTHER), 0.0)
    busy, last = 0.0, float("-inf")
    for kernel in sorted(kernels, key=lambda k: k.start):
        parts[part_of(kernel.name)] += kernel.end - kernel.start
        busy += max(0.0, kernel.end - max(kernel.start, last))
        last = max(last, kernel.end)
    return Ledger(parts, busy, last - min(k.start for k in kernels), len(kernels), by_name(kernels))


def by_name(kernels: Sequence[Kernel]) -> dict[str, tuple[int, float]]:
    """How often each ran and for how many microseconds in all, the longest first."""
    found: dict[str, tuple[int, float]] = {}
    for name, start, end in kernels:
        count, total = found.get(name, (0, 0.0))
        found[name] = (count + 1, total + end - start)
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def median(ledgers: Sequence[Ledger]) -> Ledger:
    """Part by part."""
    parts = {name: statistics.median(one.parts[name] for one in ledgers) for name in ledgers[0].parts}
    middle = statistics.median
    return Ledger(
        parts,
        middle(one.busy for one in ledgers),
        middle(one.span or 0.0 for one in ledgers),
        round(middle(one.kernels for one in ledgers)),
        ledgers[-1].names,
    )


def in_milliseconds(ledger: Ledger, round_ms: float) -> dict[str, float]:
    """The parts and the gaps of a round that takes `round_ms` when nobody looks."""
    parts = {name: round(value / 1e3, 4) for name, value in ledger.parts.items()}
    return {**parts, GAPS: round(max(0.0, round_ms - ledger.busy / 1e3), 4)}
