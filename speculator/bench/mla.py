"""Lazily planned MLA attention on a GPU: our kernels beside the real FlashMLA, and what a stale plan does to both.

Owns: the clock and the table. Both run in the same process on the same caches; a figure is the median over replays of a
recorded loop, so launches cost nothing. Must never show a time whose result it did not compare with float32 attention.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from speculator.bench.provenance import provenance
from target.attention.flash import FlashMla, FlashState
from target.attention.mla import MlaAttention
from target.batch import Batch
from target.cache import LayerShape, PagedCache
from target.errors import PlanError

if TYPE_CHECKING:  # they need triton
    from target.attention.mla_triton import TritonSplits, TritonState
    from target.kernels.mla import Config

RANK, ROPE, PAGE = 512, 64, 64
SCALE = (RANK + ROPE) ** -0.5
LOOP_US, LOOPS, REPLAYS = 4_000, 20, 7
LONG_US, LONG_REPLAYS = 1_000, 3  # of calls that take so long, few replays scatter little
WRONG = 0.05  # further from float32 attention than that, a time means nothing
WANTED_REUSED, WANTED_FRESH, FRESH_LENGTH, WANTED_PLAN_US = 0.70, 1.0, 4096, 5.0


class Cell(NamedTuple):
    """One shape of the table."""

    heads: int
    batch: int
    length: int
    queries: int


class Field(NamedTuple):
    """What a cell runs on: a batch over several caches, so that none stays in the L2 cache between calls."""

    batch: Batch
    caches: list[PagedCache]
    q: Tensor

    def latents(self, turn: int) -> Tensor:
        return self.caches[turn % len(self.caches)].layers[0].flatten(1)


def main(argv: list[str] | None = None) -> int:
    """Run the bench; 0, or 2 where it cannot run."""
    args = _parser().parse_args(argv)
    if not torch.cuda.is_available() or find_spec("triton") is None:
        print("bench mla needs a CUDA device and the package triton", file=sys.stderr)
        return 2
    if args.flash_mla:
        os.environ["SPECULATOR_FLASHMLA"] = args.flash_mla
    report: dict[str, Any] = {"provenance": provenance()}
    print(json.dumps(report["provenance"]), flush=True)
    with torch.inference_mode():
        report |= {"variants": variants(args)} if args.variants else {"cells": table(args), "lazy": lazy(args)}
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flash-mla", metavar="DIR", help="library or folder of FlashMLA; without, only ours is timed")
    parser.add_argument("--json", type=Path, help="write the report there")
    parser.add_argument("--variants", action="store_true", help="time every variant of our kernels instead")
    parser.add_argument("--heads", type=int, nargs="+", default=[128, 16])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 4096, 16384, 65536])
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 2, 4, 8])
    return parser


def _cells(args: argparse.Namespace) -> Iterator[tuple[Cell, Field]]:
    """All cells that fit the memory; those of one batch and length share their caches."""
    for batch, length in product(args.batches, args.lengths):
        if 2 * _bytes(batch, length) > torch.cuda.mem_get_info()[0] // 2:
            print(f"left out, too large for this device: batch {batch} length {length}", flush=True)
            continue
        caches = _caches(batch, length)
        for heads, queries in product(args.heads, args.queries):
            yield Cell(heads, batch, length, queries), field(Cell(heads, batch, length, queries), caches)


def _bytes(rows: int, length: int) -> int:
    return rows * length * (RANK + ROPE) * 2


def _caches(rows: int, length: int) -> list[PagedCache]:
    pages = rows * -(-length // PAGE) + 1
    count = max(2, min(8, 300_000_000 // _bytes(rows, length) + 1))
    caches = [PagedCache([[LayerShape(1, RANK + ROPE, 1)]], pages, PAGE, torch.bfloat16, "cuda") for _ in range(count)]
    for cache in caches:
        cache.layers[0].normal_()
    return caches


def field(cell: Cell, caches: list[PagedCache]) -> Field:
    """Rows of `length` tokens, the pass's own included, in scattered pages."""
    columns = -(-cell.length // PAGE)
    pages = (torch.randperm(cell.batch * columns, device="cuda") + 1).view(cell.batch, columns)
    ids = torch.zeros(cell.batch, cell.queries, dtype=torch.int64, device="cuda")
    context = torch.full((cell.batch,), cell.length - cell.queries, device="cuda")
    counts = torch.full_like(context, cell.queries)
    batch = Batch(ids, ids, context, counts, pages, longest=cell.length, static=True)
    q = torch.randn(cell.batch, cell.queries, cell.heads, RANK + ROPE, dtype=torch.bfloat16, device="cuda")
    return Field(batch, caches, q)


# ---- the clock ----


def microseconds(call: Callable[[int], object]) -> float:
    """A call on the device: a recorded loop of calls, each on the next cache; the median over replays."""
    call(0)
    torch.cuda.synchronize()
    once = max(_events(lambda: call(1)), 1.0)
    loops = max(2, min(LOOPS, int(LOOP_US / once)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for turn in range(loops):
            call(turn)
    graph.replay()
    replays = REPLAYS if once < LONG_US else LONG_REPLAYS
    return statistics.median(_events(graph.replay) for _ in range(replays)) / loops


def _events(call: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e3


# ---- the table ----


def table(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per cell, printed as it comes."""
    rows = []
    for cell, ground in _cells(args):
        try:
            row = {**cell._asdict(), **_measure(ground, bool(args.flash_mla))}
            print(_line(row), flush=True)
        except (RuntimeError, PlanError) as failure:  # the other cells still tell something
            row = {**cell._asdict(), "error": str(failure)}
            print(cell, "failed:", failure, flush=True)
        rows.append(row)
    for line in verdict(rows):
        print(line, flush=True)
    return rows


def _measure(f: Field, with_flash: bool) -> dict[str, Any]:
    from target.attention.mla_triton import TritonSplits

    ours = TritonSplits(f.caches[0], RANK)
    row = _times("ours", ours, f)
    row["ours_plan"] = microseconds(lambda _: ours.prepare(f.batch, f.q.shape[2]))
    if with_flash:
        row |= _times("flash_mla", FlashMla(f.caches[0], RANK), f)
        row["reused_speed"] = row["flash_mla_reused"] / row["ours_reused"]
        row["fresh_speed"] = row["flash_mla_fresh"] / row["ours_fresh"]
    return {name: round(value, 4) for name, value in row.items()}


def _times(name: str, backend: TritonSplits | FlashMla, f: Field) -> dict[str, float]:
    """Microseconds with a fresh plan and with a reused one, and how far the result is from float32 attention.

    FlashMLA's queries are moved to the end of their rows by our adapter; a full batch needs no moving, so its kernel
    is called directly.
    """

    def attend(state: Any, turn: int) -> Tensor:
        if isinstance(state, FlashState):
            pages = f.latents(turn).view(-1, PAGE, 1, RANK + ROPE)
            return state.scheduler(f.q, pages, state.table, state.stored, SCALE, f.q.shape[1] > 1)
        return backend.attend(state, f.batch, f.q, f.latents(turn), SCALE)

    def fresh(base: Any) -> TritonState | FlashState:
        if isinstance(backend, FlashMla):  # the batch's arguments are there; only the plan is made again
            return base._replace(scheduler=type(base.scheduler)())  # type: ignore[no-any-return]
        return backend.prepare(f.batch, f.q.shape[2])

    kept = backend.prepare(f.batch, f.q.shape[2])
    out = attend(kept, 0)
    return {
        f"{name}_fresh": microseconds(lambda turn: attend(fresh(kept), turn)),
        f"{name}_reused": microseconds(lambda turn: attend(kept, turn)),
        f"{name}_error": error(f, out),
    }


def error(f: Field, out: Tensor) -> float:
    """Largest distance from float32 attention in the first and the last row."""
    worst = 0.0
    for row in {0, f.q.shape[0] - 1}:
        index = torch.arange(f.batch.longest, device=f.q.device)
        keys = f.latents(0)[f.batch.pages[row][index // PAGE] * PAGE + index % PAGE].float()
        for t in range(f.q.shape[1]):
            seen = keys[: int(f.batch.context[row]) + t + 1]
            exact = (f.q[row, t].float() @ seen.T * SCALE).softmax(-1) @ seen[:, :RANK]
            worst = max(worst, float((out[row, t].float() - exact).abs().max()))
    return worst


def _line(row: dict[str, Any]) -> str:
    text = "heads {heads:3} batch {batch:2} length {length:5} queries {queries}: ".format(**row)
    text += "ours {ours_fresh:8.1f} fresh {ours_reused:8.1f} reused {ours_plan:5.1f} plan, off {ours_error:.4f}".format(
        **row
    )
    if "reused_speed" in row:
        text += "; FlashMLA {flash_mla_fresh:8.1f} {flash_mla_reused:8.1f}, off {flash_mla_error:.4f}".format(**row)
        text += "; speed of FlashMLA's: {fresh_speed:.2f} fresh, {reused_speed:.2f} reused".format(**row)
    flops = 2 * row["batch"] * row["queries"] * row["heads"] * row["length"] * (2 * RANK + ROPE)
    rate = row["batch"] * row["length"] * (RANK + ROPE) * 2 / row["ours_reused"] / 1e6
    return text + f" ({rate:.2f} TB/s, {flops / row['ours_reused'] / 1e6:.0f} TFLOP/s)"


def verdict(rows: list[dict[str, Any]]) -> Iterator[str]:
    """How the rows stand to what is asked of the kernels, and which miss it."""
    ran = [row for row in rows if "error" not in row]
    if len(ran) < len(rows):
        yield f"{len(rows) - len(ran)} cells failed"
    if not ran:
        return
    slowest = max(row["ours_plan"] for row in ran)
    yield f"slowest planner {slowest:.1f} us, wanted under {WANTED_PLAN_US:.0f}: {_passed(slowest < WANTED_PLAN_US)}"
    yield "largest error {:.4f}".format(max(row["ours_error"] for row in ran))
    compared = [row for row in ran if "reused_speed" in row]
    short = [row for row in compared if row["batch"] == 1 and row["length"] <= FRESH_LENGTH]
    yield from _held("reused plan", "reused_speed", f"{WANTED_REUSED:.2f} or more", compared, WANTED_REUSED)
    what = f"fresh plan, batch 1, up to {FRESH_LENGTH}"
    yield from _held(what, "fresh_speed", f"above {WANTED_FRESH:.2f}", short, math.nextafter(WANTED_FRESH, math.inf))


def _held(what: str, name: str, wanted: str, rows: list[dict[str, Any]], least: float) -> Iterator[str]:
    """The lowest of FlashMLA's speed over some rows against the wanted one, and the rows below it."""
    if not rows:
        return
    missed = [row for row in rows if row[name] < least]
    lowest = min(row[name] for row in rows)
    yield f"{what}: at least {lowest:.2f} of FlashMLA's speed, wanted {wanted}: {_passed(not missed)}"
    for row in missed:
        where = "heads {heads} batch {batch} length {length} queries {queries}".format(**row)
        yield f"  missed at {where}: {row[name]:.2f}"


def _passed(held: bool) -> str:
    return "PASS" if held else "MISS"


# ---- variants ----


def variants(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The times of every variant of our kernels for every cell, beside FlashMLA's, and the table that they suggest."""
    rows: list[dict[str, Any]] = []
    for cell, f in _cells(args):
        found = {name: _try(config, f) for name, config in _configs().items()}
        flash = _flash_times(f) if args.flash_mla else {}
        rows.append({**cell._asdict(), "times": found, **flash})
        print(_variant_line(rows[-1]), flush=True)
    for line in _choices(rows):
        print(line, flush=True)
    return rows


def _configs() -> dict[str, Config]:
    from target.kernels.mla import HOPPER, SEESAW

    chained = {"hopper": HOPPER._replace(chained=True), "seesaw": SEESAW._replace(chained=True)}
    found = {"hopper": HOPPER} | {f"{name}, chained": config for name, config in chained.items()}
    return found | {f"{name}, chained, grain 2": config._replace(grain=2) for name, config in chained.items()}


def _try(config: Config, f: Field) -> tuple[float, float] | str:
    """Microseconds with a fresh plan and with a reused one, or why there are none."""
    from target.attention.mla_triton import TritonSplits

    try:
        times = _times("", TritonSplits(f.caches[0], RANK, config=config), f)
    except Exception as failure:  # a configuration that does not fit the device is a result, not the end of the run
        return f"{type(failure).__name__}: {str(failure)[:160]}"
    return (round(times["_fresh"], 1), round(times["_reused"], 1)) if times["_error"] < WRONG else "wrong"


def _flash_times(f: Field) -> dict[str, float]:
    try:
        return {name: round(value, 1) for name, value in _times("flash_mla", FlashMla(f.caches[0], RANK), f).items()}
    except (RuntimeError, PlanError) as failure:
        print("FlashMLA failed:", failure, flush=True)
        return {}


def _timed(row: dict[str, Any]) -> dict[str, tuple[float, float]]:
    return {name: times for name, times in row["times"].items() if not isinstance(times, str)}


def _variant_line(row: dict[str, Any]) -> str:
    text = "heads {heads:3} batch {batch:2} length {length:5} queries {queries}:".format(**row)
    if "flash_mla_reused" in row:
        text += " FlashMLA {flash_mla_fresh:.1f} fresh {flash_mla_reused:.1f} reused;".format(**row)
    for name, times in row["times"].items():
        text += f" {name}: " + (times if isinstance(times, str) else f"{times[0]:.1f} {times[1]:.1f}")
        if "flash_mla_reused" in row and not isinstance(times, str):
            text += f" ({row['flash_mla_fresh'] / times[0]:.2f}x {row['flash_mla_reused'] / times[1]:.2f}x)"
        text += ";"
    return text


def _choices(rows: list[dict[str, Any]]) -> Iterator[str]:
    """For all lengths of one (rows, batch) together, what each variant costs over the best of each length."""
    for pairs, batch in sorted({(row["heads"] * row["queries"], row["batch"]) for row in rows}, reverse=True):
        cells = [_timed(row) for row in rows if (row["heads"] * row["queries"], row["batch"]) == (pairs, batch)]
        losses = _losses(cells)
        shown = ", ".join(f"{name} +{loss:.0%}" for name, loss in sorted(losses.items(), key=lambda one: one[1]))
        yield f"rows {pairs:4} batch {batch:2}: {shown or 'nothing ran everywhere'}"


def _losses(cells: list[dict[str, tuple[float, float]]]) -> dict[str, float]:
    """Mean loss of each variant that ran in every cell against the fastest there, fresh and reused plans alike."""
    everywhere = set.intersection(*(set(cell) for cell in cells))
    best = [[min(times[kind] for times in cell.values()) for kind in (0, 1)] for cell in cells if cell]
    return {
        name: statistics.fmean(
            cell[name][kind] / least[kind] for cell, least in zip(cells, best, strict=True) for kind in (0, 1)
        )
        - 1
        for name in everywhere
    }


# ---- what a stale plan does ----

LIVES = ("fresh at capture", "shared with the warm-up", "from another graph's capture, used by an eager warm-up")
SHORT, LONG = 100, 3000


def lazy(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Recorded at 100 tokens, replayed at 3000: how far the replay is from a pass with a plan of its own."""
    cell = Cell(heads=16, batch=2, length=LONG, queries=1)
    rows = []
    for name in ("triton", "flash_mla") if args.flash_mla else ("triton",):
        for life in LIVES:
            row = {"backend": name, "plan": life, **_replayed(MlaAttention, name, life, cell)}
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def _replayed(make: Callable[..., MlaAttention], backend: str, life: str, cell: Cell) -> dict[str, Any]:
    f = field(cell, _caches(cell.batch, cell.length)[:1])
    try:
        attention = make(f.caches[0], RANK, backend)
    except PlanError as failure:
        return {"error": str(failure)}
    latent = torch.randn(cell.batch, cell.queries, RANK + ROPE, dtype=torch.bfloat16, device="cuda")

    def once(plan: Any) -> Tensor:
        return attention.run(plan, 0, f.q, latent, SCALE)

    f.batch.context.fill_(SHORT - 1)
    plan, graph, row = attention.plan(f.batch), torch.cuda.CUDAGraph(), dict[str, Any]()
    once(plan if life == LIVES[1] else attention.plan(f.batch))
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = once(plan)
    if life == LIVES[2]:
        row["warm_up_off"] = _distance(once(plan), once(attention.plan(f.batch)))
    f.batch.context.fill_(LONG - 1)
    graph.replay()
    exact = once(attention.plan(f.batch))
    return row | {"replay_off": _distance(out, exact), "equal_bits": torch.equal(out, exact)}


def _distance(got: Tensor, exact: Tensor) -> float:
    return round(float((got.float() - exact.float()).abs().nan_to_num(torch.inf).max()), 6)


if __name__ == "__main__":
    raise SystemExit(main())
