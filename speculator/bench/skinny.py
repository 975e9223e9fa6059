"""Matrix products of few rows on a GPU: our kernels beside cuBLAS, and the table of choices made anew from the times.

Owns: the candidates for a shape, the clock and the choice. All run in the same process on the same weights; a figure is
the median over replays of a recorded loop over weights that the L2 cache cannot hold. Must never show or choose a time
whose result was not compared with cuBLAS, nor call an order fixed whose bits it did not compare.

Candidates are ranked by loops over products alone. The choice is made between pairs, a norm and the product that reads
it, as they stand in a layer: alone, a product under programmatic dependent launch would only ask for its weights while
another streams its own. In a pair the norm is launched in the same way whoever multiplies.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.util import find_spec
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from speculator.bench.mla import microseconds
from speculator.bench.provenance import provenance
from target.pdl import pdl_possible
from target.products import LIBRARY, MOST_BLOCKS, TILES, Config, default_config, launched

# N x K of the merged weights of a layer (qkv, o, gate_up, down) and of the lm_head
MODELS: Mapping[str, tuple[tuple[int, int], ...]] = {
    "llama-3.1-8b": (
        *((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)),
        *((6144, 8192), (4096, 12288)),  # of its EAGLE-3 head: qkv and fc
    ),
    "qwen3-8b": ((6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288), (151936, 4096)),
    "llama-3.2-1b": ((3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192), (128256, 2048)),
    "llama-3.1-70b-rank": ((2560, 8192), (8192, 2048), (14336, 8192), (8192, 7168), (32064, 8192)),
}
ROWS = {1: 16, 8: 16, 64: 64}  # rows that are shown -> the tile they take
WARM_BYTES = 200 << 20  # of weights that a loop goes through: more than any L2 cache
WRONG = 2**-6  # of the largest result
MANY = 100_000  # columns: cuBLAS is near the bandwidth there, so half the candidates do
SLACK = 1.02  # cuBLAS keeps a shape unless a kernel is faster by this
FINALISTS = 2  # configurations of a tile that are timed in pairs
AHEAD = (0, 32, 128)  # KiB that programs of a finalist ask for before its wait
EPS = 1e-5

# the static model that prunes candidates: sizes of an H200
SMS, SHARED, BANDWIDTH, L2_BANDWIDTH = 132, 223 << 10, 4.26e12, 5.5e12
LATENCY_S, START_S, SECOND_LAUNCH_S = 1.0e-6, 1.5e-6, 2.0e-6


class Shape(NamedTuple):
    """Weights [n, k]."""

    n: int
    k: int

    @property
    def bytes(self) -> int:
        return 2 * self.n * self.k


class Task(NamedTuple):
    """One kernel to compile and time."""

    shape: Shape
    tile: int
    config: Config


Times = dict[Task, float]  # microseconds


class Pairs(NamedTuple):
    """Microseconds of a norm and the product that reads it."""

    ours: Times
    library: Mapping[int, float]  # by tile


def main(argv: list[str] | None = None) -> int:
    """Run the bench; 0, or 2 where it cannot run."""
    args = _parser().parse_args(argv)
    if not torch.cuda.is_available() or find_spec("triton") is None:
        print("bench skinny needs a CUDA device and the package triton", file=sys.stderr)
        return 2
    begin = time.perf_counter()
    if args.pdl is None:
        args.pdl = pdl_possible(torch.device("cuda"))
    report: dict[str, Any] = {"device": torch.cuda.get_device_name(), "provenance": provenance(), "pdl": args.pdl}
    print(json.dumps(report["provenance"]), flush=True)
    with torch.inference_mode():
        report["shapes"] = [tuned(shape, times, pairs, args.pdl) for shape, times, pairs in _timed(args)]
    report["seconds"] = round(time.perf_counter() - begin, 1)
    _summary(report)
    if args.write:
        args.write.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    three = ["llama-3.1-8b", "qwen3-8b", "llama-3.2-1b"]
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=three, help="whose shapes are timed")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table there: target/data/products.json")
    parser.add_argument("--candidates", type=int, default=16, help="configurations of a shape that are timed")
    parser.add_argument("--processes", type=int, default=min(14, os.cpu_count() or 1), help="that compile")
    parser.add_argument(
        "--pdl",
        action=argparse.BooleanOptionalAction,
        help="time programmatic dependent launches too; by default where the device has them",
    )
    return parser


def shapes_of(models: Sequence[str]) -> list[Shape]:
    return sorted({Shape(n, k) for model in models for n, k in MODELS[model]})


# ---- candidates: a static model says which are worth compiling ----


def estimate(config: Config, shape: Shape, tile: int) -> float:
    """Seconds that a kernel may take at best: bytes over what is in flight, waves, rows read by every program."""
    n, k = shape
    resident = SHARED // _shared(config, tile)
    if resident == 0:
        return math.inf
    programs = math.ceil(n / config.block_n) * config.split
    at_once = min(programs, SMS * min(resident, 16))
    waves = math.ceil(programs / (SMS * resident)) / (programs / (SMS * resident)) if programs > at_once else 1.0
    flying = at_once * max(config.stages - 1, 1) * config.block_n * config.block_k * 2
    rate = min(BANDWIDTH, flying / LATENCY_S) * min(1.0, at_once / SMS)
    rows_read = programs / config.split * k * tile * 2 / L2_BANDWIDTH
    second = SECOND_LAUNCH_S if config.split > 1 else 0.0
    return max(shape.bytes / rate * waves, rows_read + shape.bytes / L2_BANDWIDTH) + START_S + second


def _shared(config: Config, tile: int) -> int:
    from target.kernels.skinny import shared_bytes

    return shared_bytes(config, tile, 2) + 1024


def candidates(shape: Shape, count: int) -> list[Config]:
    """The most promising for the least and for the largest tile, half each, and the default; distinct."""
    grid = [
        Config(block_n, block_k, split, stages, 8 if block_n == 128 else 4)
        for block_n, block_k, split, stages in product((16, 32, 64, 128), (64, 128, 256), (1, 2, 4, 8), (3, 4, 6, 8))
        if split == 1 or shape.k // split >= 512
    ]
    found = {default_config(*shape): None}
    for tile in (TILES[0], TILES[-1]):
        ranked = sorted(grid, key=lambda config: (estimate(config, shape, tile), -config.block_k, config.stages))
        fitting = [config for config in ranked if estimate(config, shape, tile) < math.inf]
        found |= dict.fromkeys(_varied(fitting, count // 2))
    return list(found)


def _varied(ranked: Sequence[Config], count: int) -> list[Config]:
    """The best, but at most two of a kind: the model is too coarse to rule a kind out."""
    kept: list[Config] = []
    for config in ranked:
        alike = [c for c in kept if (c.block_n, c.split == 1) == (config.block_n, config.split == 1)]
        if len(alike) < 2 and len(kept) < count:
            kept.append(config)
    return kept


# ---- compiling and timing ----


def compile_one(task: Task) -> str:
    """Run a kernel once in this process, which leaves it in triton's cache on disk; what went wrong, or nothing."""
    from target.kernels.skinny import multiply

    try:
        weight = torch.empty(task.shape, dtype=torch.bfloat16, device="cuda")
        x = torch.empty(task.tile, task.shape.k, dtype=torch.bfloat16, device="cuda")
        multiply(x, weight, None, task.config, torch.zeros(MOST_BLOCKS, dtype=torch.int32, device="cuda"))
        torch.cuda.synchronize()
        return ""
    except Exception as failure:  # a configuration that does not fit the device is a result, not the end of the run
        return f"{type(failure).__name__}: {str(failure)[:160]}"


def compiled(tasks: Sequence[Task], processes: int) -> list[Task]:
    """The tasks whose kernels run; the others are named."""
    with ProcessPoolExecutor(max(processes, 1), get_context("spawn")) as pool:
        failures = list(pool.map(compile_one, tasks))
    for task, failure in zip(tasks, failures, strict=True):
        if failure:
            print(f"{task} is left out: {failure}", flush=True)
    return [task for task, failure in zip(tasks, failures, strict=True) if not failure]


def _timed(args: argparse.Namespace) -> Iterator[tuple[Shape, Times, Pairs]]:
    """Every shape with the microseconds of its candidates, alone and the best of them in pairs."""
    shapes = shapes_of(args.models)
    wanted = [
        Task(s, tile, config)
        for s in shapes
        for config in candidates(s, args.candidates if s.n < MANY else args.candidates // 2)
        for tile in TILES
    ]
    tasks = compiled(wanted, args.processes)
    print(f"{len(tasks)} kernels of {len(wanted)} compiled", flush=True)
    alone = {shape: clocked(shape, [task for task in tasks if task.shape == shape], _time) for shape in shapes}
    final = [task for shape, times in alone.items() for task in finalists(shape, times, args.pdl)]
    final = compiled(final, args.processes) if args.pdl else final
    for shape, times in alone.items():
        yield shape, times, paired(shape, [task for task in final if task.shape == shape], args.pdl)


def finalists(shape: Shape, times: Times, pdl: bool) -> list[Task]:
    """The fastest of each tile and the steadiest, as they are and, with `pdl`, in every way to launch them early."""
    found: dict[Task, None] = {}
    for tile in TILES:
        ranked = sorted((task for task in times if task.tile == tile), key=lambda task: times[task])
        steady = Task(shape, tile, fixed_choice(shape, times))
        found |= dict.fromkeys(ranked[:FINALISTS] + ([steady] if steady in times else []))
    joined = [t._replace(config=t.config._replace(joined=True)) for t in found if t.config.split > 1]
    plain = [*found, *joined]
    early = [t._replace(config=t.config._replace(pdl=True, ahead=ahead)) for t in plain for ahead in AHEAD]
    return [*plain, *(early if pdl else ())]


def paired(shape: Shape, tasks: Sequence[Task], pdl: bool) -> Pairs:
    """The finalists and cuBLAS behind a norm, which is launched early with `pdl`."""
    weights = some_weights(shape)
    ours = clocked(shape, tasks, lambda task, weights: _time(task, weights, pdl))
    return Pairs(ours, {tile: _pair(F.linear, some_rows(tile, shape.k), weights, pdl) for tile in TILES})


def clocked(shape: Shape, tasks: Sequence[Task], clock: Callable[[Task, Sequence[Tensor]], float]) -> Times:
    """The time of each task whose result is right."""
    weights, times = some_weights(shape), Times()
    for task in tasks:
        try:
            times[task] = clock(task, weights)
        except RuntimeError as failure:
            print(f"{task} failed: {failure}", flush=True)
    return times


def some_weights(shape: Shape) -> list[Tensor]:
    """As many copies as go through the L2 cache."""
    copies = max(2, math.ceil(WARM_BYTES / shape.bytes))
    return [torch.randn(shape, dtype=torch.bfloat16, device="cuda") * 0.02 for _ in range(copies)]


def some_rows(rows: int, k: int) -> Tensor:
    return torch.randn(rows, k, generator=torch.Generator("cuda").manual_seed(rows), device="cuda").bfloat16()


def _time(task: Task, weights: Sequence[Tensor], behind_norm: bool | None = None) -> float:
    """Alone, or behind a norm that is launched early or is not."""
    from target.kernels.skinny import multiply

    x = some_rows(task.tile, task.shape.k)
    expected = F.linear(x, weights[0]).float()
    arrived = torch.zeros(MOST_BLOCKS, dtype=torch.int32, device="cuda")
    call = partial(multiply, bias=None, config=task.config, arrived=arrived)
    off = float((call(x, weights[0]).float() - expected).abs().max() / expected.abs().max())
    if not off < WRONG:
        raise RuntimeError(f"wrong by {off:.3f} of the largest result")
    if behind_norm is not None:
        return _pair(call, x, weights, behind_norm)
    return _loop(lambda weight: call(x, weight), weights)


def _pair(product: Callable[[Tensor, Tensor], Tensor], x: Tensor, weights: Sequence[Tensor], pdl: bool) -> float:
    from target.kernels.norm import launch_norm

    ones = torch.ones(x.shape[1], dtype=x.dtype, device=x.device)
    return _loop(lambda weight: product(launch_norm(x, None, ones, EPS, pdl=pdl)[1], weight), weights)


def _loop(call: Callable[[Tensor], Tensor], weights: Sequence[Tensor]) -> float:
    return microseconds(lambda turn: call(weights[turn % len(weights)]))


# ---- the choice ----


def tuned(shape: Shape, times: Times, pairs: Pairs, pdl: bool) -> dict[str, Any]:
    """An entry of the table, printed as it comes."""
    fixed = early(shape, fixed_choice(shape, times), pairs.ours)
    chosen = {tile: choice(fastest(pairs.ours, tile), pairs.ours, pairs.library[tile]) for tile in TILES}
    entry: dict[str, Any] = {"n": shape.n, "k": shape.k, "fixed": fixed._asdict()}
    entry["tiles"] = {str(tile): LIBRARY if c is None else c._asdict() for tile, c in chosen.items()}
    entry["measured"] = [_figures(shape, rows, chosen[tile], fixed, pdl) for rows, tile in ROWS.items()]
    entry["pairs"] = [
        {"tile": tile, "cublas_us": round(pairs.library[tile], 2), "ours": _ranked(pairs.ours, tile)} for tile in TILES
    ]
    return entry


def _ranked(times: Times, tile: int) -> list[dict[str, Any]]:
    found = sorted((time, task.config) for task, time in times.items() if task.tile == tile)
    return [{**config._asdict(), "us": round(time, 2)} for time, config in found]


def early(shape: Shape, config: Config, pairs: Times) -> Config:
    """`config` launched in the way that is fastest in pairs of the least tile: its bits are the same in all."""
    ways = [task for task in pairs if task.tile == TILES[0] and alike(task.config, config)]
    return min(ways, key=lambda task: pairs[task]).config if ways else config


def alike(one: Config, other: Config) -> bool:
    """Whether two configurations are one but for their launches."""
    return one._replace(pdl=other.pdl, ahead=other.ahead, joined=other.joined) == other


def fastest(times: Times, tile: int) -> Task | None:
    return min((task for task in times if task.tile == tile), key=lambda task: times[task], default=None)


def choice(best: Task | None, times: Times, library: float) -> Config | None:
    """The best of ours where it beats cuBLAS clearly, else None."""
    return best.config if best is not None and times[best] * SLACK < library else None


def fixed_choice(shape: Shape, times: Times) -> Config:
    """The configuration that loses least to the fastest of any tile, among those whose rows keep their bits."""
    losses: dict[Config, float] = {}
    for config in {task.config for task in times}:
        own = [times.get(Task(shape, tile, config)) for tile in TILES]
        best = [times[found] for tile in TILES if (found := fastest(times, tile)) is not None]
        if all(own):
            losses[config] = max(mine / least for mine, least in zip(own, best, strict=True) if mine is not None)
    for config in sorted(losses, key=lambda config: losses[config]):
        if keeps_bits(shape, config):
            return config
        print(f"{tuple(shape)} {config}: a row's bits change with the number of rows", flush=True)
    return default_config(*shape)


def keeps_bits(shape: Shape, config: Config) -> bool:
    """Whether rows have the same bits in calls of any size."""
    from target.kernels.skinny import multiply

    weight, x = some_weights(shape)[0], some_rows(200, shape.k)
    whole = multiply(x, weight, None, config)
    parts = [(0, 1), (0, 2), (3, 11), (7, 23), (64, 97), (100, 164), (72, 200), (199, 200)]
    return all(torch.equal(multiply(x[a:b], weight, None, config), whole[a:b]) for a, b in parts)


def _figures(shape: Shape, rows: int, chosen: Config | None, fixed: Config, pdl: bool) -> dict[str, Any]:
    """Microseconds of cuBLAS, of the choice and of the fixed order, alone and behind a norm, on the same weights.

    Alone nothing is launched early: a loop of one kernel would overlap with itself.
    """
    weights, x = some_weights(shape), some_rows(rows, shape.k)
    row: dict[str, Any] = {"rows": rows}
    for name, config in (("cublas", None), ("fast", chosen), ("fixed", fixed)):
        if name == "fast" and chosen is None:
            row |= {"fast_us": row["cublas_us"], "fast_pair_us": row["cublas_pair_us"]}
            continue
        alone, behind = _product(config, False), _product(config, pdl)
        row[f"{name}_us"] = round(_loop(lambda w, call=alone: call(x, w), weights), 2)  # type: ignore[misc]
        row[f"{name}_pair_us"] = round(_pair(behind, x, weights, pdl), 2)
    best = row["fast_us"]
    row["fast_tb_s"] = round(shape.bytes / best / 1e6, 2)
    print(_line(shape, row, chosen, fixed), flush=True)
    return row


def _product(config: Config | None, pdl: bool) -> Callable[[Tensor, Tensor], Tensor]:
    from target.kernels.skinny import multiply

    if config is None:
        return F.linear
    arrived = torch.zeros(MOST_BLOCKS, dtype=torch.int32, device="cuda")
    return partial(multiply, bias=None, config=launched(config, pdl), arrived=arrived)


def _line(shape: Shape, row: Mapping[str, float], chosen: Config | None, fixed: Config) -> str:
    speed = {name: shape.bytes / row[f"{name}_us"] / 1e6 for name in ("cublas", "fast", "fixed")}
    text = f"{shape.n:6} x {shape.k:5} M {row['rows']:2}: "
    text += "; ".join(
        f"{name} {row[f'{name}_us']:6.1f} us {rate:.2f} TB/s, behind a norm {row[f'{name}_pair_us']:6.1f} us"
        for name, rate in speed.items()
    )
    return f"{text}; fast {LIBRARY if chosen is None else tuple(chosen)}, fixed {tuple(fixed)}"


def _summary(report: Mapping[str, Any]) -> None:
    """Sums over a model's layer, which is what a pass pays."""
    entries = {(entry["n"], entry["k"]): entry["measured"] for entry in report["shapes"]}
    for model, shapes in MODELS.items():
        if not all(shape in entries for shape in shapes):
            continue
        for i, rows in enumerate(ROWS):
            sums = {
                name: [sum(entries[s][i][name + kind] for s in shapes[:4]) for kind in ("_us", "_pair_us")]
                for name in ("cublas", "fast", "fixed")
            }
            floor = sum(2 * n * k for n, k in shapes[:4]) / BANDWIDTH * 1e6
            text = ", ".join(f"{name} {own:.1f} us ({pair:.1f} with norms)" for name, (own, pair) in sums.items())
            print(f"{model}, one layer, M {rows}: {text}; floor at 4.26 TB/s {floor:.1f} us")
    print(f"{report['seconds']} s in all")


if __name__ == "__main__":
    raise SystemExit(main())
