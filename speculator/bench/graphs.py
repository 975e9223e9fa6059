"""What recorded passes save and whether they lie: replayed and eager passes side by side, in one run.

Owns: timing passes of one row, a mixed run with graphs off and on, and what capture takes. Must never know how passes
are recorded.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from speculator.bench.bitwise import compare
from speculator.bench.pairs import load_pair
from speculator.bench.provenance import provenance
from speculator.bench.synthetic import SHAPES, synthetic_engine
from speculator.drafting import Start
from speculator.drafts import fitted
from speculator.engine import Engine
from speculator.errors import ConfigError
from speculator.recorded import RecordedPasses
from speculator.types import Draft, DraftShape, Feed, SamplingParams, Step
from target.batch import Batch, causal_positions

LONGEST_PROMPT = 100  # tokens, in the mixed run


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--target", help="target folder (default: the bundled pair)")
    p.add_argument("--head", help="head folder")
    p.add_argument("--synthetic", choices=sorted(SHAPES), help="random weights of a published shape instead")
    p.add_argument("--device", default="auto")
    p.add_argument("--graphs", default="piecewise", choices=("split", "piecewise"))
    p.add_argument("--sessions", type=int, default=8, help="sessions at once of the mixed run")
    p.add_argument("--waves", type=int, default=6, help="times that sessions come and go; 0 skips the mixed run")
    p.add_argument("--context", type=int, default=256, help="tokens before the timed passes")
    p.add_argument("--repeats", type=int, default=50)
    p.add_argument("--memory-share", type=float, default=0.9, help="of the GPU that may be in use")
    p.add_argument("--kv-tokens", type=int, default=0, help="of the cache, as far as it fits (0: the sessions')")
    p.add_argument("--json", type=Path, help="write the figures here too")
    return p


def main() -> int:
    args = parser().parse_args()
    begin = time.perf_counter()
    engine = load(args)
    passes = engine.passes
    assert isinstance(passes, RecordedPasses)
    _check(args, engine)
    report: dict[str, Any] = {"provenance": provenance(), "start_s": round(time.perf_counter() - begin, 1)}
    report["capture"] = capture_figures(passes)
    report["memory"] = memory_figures(engine, passes)
    report["one_row"] = one_row(engine, passes, args.context, args.repeats)
    if args.waves:
        report["mixed"] = mixed_figures(engine, passes, args.sessions, args.waves)
    report["bit_equal"] = bit_equal(engine, passes)
    text = json.dumps(report, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text)
    return 0 if all(report["bit_equal"].values()) and report.get("mixed", {}).get("equal", True) else 1


def load(args: argparse.Namespace) -> Engine:
    more = {"graphs.mode": args.graphs, "engine.memory_share": args.memory_share, "engine.kv_tokens": args.kv_tokens}
    if args.synthetic:
        return synthetic_engine(args.synthetic, args.device, args.sessions, more)
    return load_pair(argparse.Namespace(**vars(args), threads=0), args.sessions, more).engine


def _check(args: argparse.Namespace, engine: Engine) -> None:
    """ConfigError where rows would leave their pages."""
    info = engine.info
    if not 0 <= args.context <= info.max_context:
        raise ConfigError(f"--context must be between 0 and {info.max_context}, what a session may hold.")
    held, needed = (info.total_pages - 1) // args.sessions * info.page_size, LONGEST_PROMPT + info.scratch_tokens
    if args.waves and held < needed:
        raise ConfigError(
            f"A session of the mixed run needs {needed} tokens of KV cache and has {held}: ask for fewer."
        )


def capture_figures(passes: RecordedPasses) -> dict[str, Any]:
    shapes = {manager.name: len(manager.ladder) for manager in passes.managers}
    ready = {manager.name: manager.reason or "ready" for manager in passes.managers}
    return {
        "seconds": passes.capture_seconds,
        "shapes": shapes,
        "state": ready,
        "pool_mib": round(passes.recorder.pool_bytes / 2**20, 1),
    }


def memory_figures(engine: Engine, passes: RecordedPasses) -> dict[str, Any]:
    """What graphs were expected to take and took, and how full the device is beside a cache of this size."""
    figures: dict[str, Any] = {
        "graphs_expected_mib": round(passes.bytes_expected / 2**20, 1),
        "graphs_taken_mib": round(passes.bytes_taken / 2**20, 1),
        "kv_cache_gib": round(engine.cache.bytes / 2**30, 3),
        "kv_cache_tokens": engine.info.total_pages * engine.info.page_size,
    }
    if engine.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(engine.device)
        figures["device_in_use"] = round(1 - free / total, 4)
    return figures


# one row


@torch.inference_mode()
def one_row(engine: Engine, passes: RecordedPasses, context: int, repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each pass of a round at batch 1, eager and replayed."""
    shape = passes.sizes.shape
    batch = chain_batch(engine, 1, passes.sizes.path, context)
    found = {"verify": timed(passes, repeats, lambda p: p.verify(batch))}
    head = engine.head
    if head is None:
        return found
    features = torch.randn(*batch.tokens.shape, head.record.feature_size, device=engine.device)
    features = features.to(head.embedding_table.dtype)
    found["head prefill"] = timed(passes, repeats, lambda p: p.catch_up(batch, features, batch.tokens))
    start = Start(
        output=torch.randn(1, 1 + head.lookback, head.record.hidden_size, device=engine.device).to(features.dtype),
        context=batch.context,
        pages=batch.pages,
        longest=context + 1,
        sampling=engine.rows.sampling([0]),
        coupled=True,
    )
    found["draft decode"] = timed(passes, repeats, lambda p: p.draft(start, shape))
    return found


def chain_batch(engine: Engine, rows: int, queries: int, context: int) -> Batch:
    """Rows in pages of their own behind a context."""
    size, device = engine.info.page_size, engine.device
    each = -(-(context + queries + engine.info.scratch_tokens) // size)
    pages = torch.arange(1, 1 + rows * each, device=device).view(rows, each) % engine.cache.pages
    lengths = torch.full((rows,), context, device=device)
    tokens = torch.randint(0, engine.info.vocab_size, (rows, queries), device=device)
    counts = torch.full((rows,), queries, device=device)
    return Batch(tokens, causal_positions(lengths, queries), lengths, counts, pages, longest=context + queries)


def timed(passes: RecordedPasses, repeats: int, run: Callable[[Any], object]) -> dict[str, float]:
    """Medians over `repeats`, eager and replayed turn by turn."""
    times: dict[str, list[float]] = {"eager_ms": [], "replayed_ms": []}
    for _ in range(5):
        run(passes.eager), run(passes)
    for _ in range(repeats):
        for name, which in (("eager_ms", passes.eager), ("replayed_ms", passes)):
            synchronize(passes.device)
            begin = time.perf_counter()
            run(which)
            synchronize(passes.device)
            times[name].append((time.perf_counter() - begin) * 1e3)
    medians = {name: sorted(values)[len(values) // 2] for name, values in times.items()}
    return {
        **{n: round(v, 4) for n, v in medians.items()},
        "ratio": round(medians["eager_ms"] / medians["replayed_ms"], 2),
    }


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# bit for bit


def bit_equal(engine: Engine, passes: RecordedPasses) -> dict[str, bool]:
    """Every captured shape on random batches: a replay against the pass run eager."""
    found = compare(engine, passes)
    return {f"{name}, {len(shapes)} shapes": all(shapes.values()) for name, shapes in found.items() if shapes}


# a mixed run


def mixed_figures(engine: Engine, passes: RecordedPasses, sessions: int, waves: int) -> dict[str, Any]:
    """The same sessions with graphs off and on: tokens, accepted counts, the share of replayed passes."""
    before = {name: (c.replayed, c.eager.total()) for name, c in passes.counts.items()}
    engine.passes = passes.eager
    expected, eager_s = _timed_waves(engine, sessions, waves)
    engine.passes = passes
    found, replayed_s = _timed_waves(engine, sessions, waves)
    shares = {}
    for name, counts in passes.counts.items():
        replayed = counts.replayed - before[name][0]
        total = replayed + counts.eager.total() - before[name][1]
        shares[name] = round(replayed / total, 4) if total else 1.0
    rounds = sum(len(accepted) for _, accepted in found)
    return {
        "equal": found == expected,
        "tokens_equal": [t for t, _ in found] == [t for t, _ in expected],
        "rounds": rounds,
        "tau_eager": _tau(expected),
        "tau_replayed": _tau(found),
        "share_replayed": shares,
        "eager_s": round(eager_s, 2),
        "replayed_s": round(replayed_s, 2),
    }


Outcome = list[tuple[list[int], list[int]]]


def _tau(outcome: Outcome) -> float:
    counts = [a + 1 for _, accepted in outcome for a in accepted]
    return round(sum(counts) / max(1, len(counts)), 6)


def _timed_waves(engine: Engine, sessions: int, waves: int) -> tuple[Outcome, float]:
    begin = time.perf_counter()
    draw, outcome = random.Random(7), []
    for wave in range(waves):
        outcome += _wave(engine, draw, draw.randint(1, sessions), wave)
    return outcome, time.perf_counter() - begin


def _wave(engine: Engine, draw: random.Random, count: int, wave: int) -> Outcome:
    """Sessions that start together and end one after the other, at the latest when their pages are full."""
    shape, info = fitted(engine.info.default_shape, engine.info), engine.info
    each = (info.total_pages - 1) // count
    width = min(each, -(-(info.max_context + info.scratch_tokens) // info.page_size))
    room = width * info.page_size - info.scratch_tokens
    lines: list[dict[str, Any]] = []
    for row in range(count):
        prompt = [draw.randrange(info.vocab_size) for _ in range(draw.randint(2, LONGEST_PROMPT))]
        temperature, depth = draw.choice((0.0, 0.0, 0.8)), draw.choice((shape.depth, shape.depth, 2, 0))
        engine.open(row, SamplingParams(temperature=temperature, seed=wave * 100 + row), True)
        chain = shape if depth == shape.depth else DraftShape(depth, 0, 1) if shape.is_chain else shape
        pages = list(range(1 + row * each, 1 + row * each + width))
        lines.append(dict(row=row, tokens=prompt, pages=pages, shape=chain, goal=draw.randint(30, 120), accepted=[]))
    _rounds(engine, lines, room)
    return [(line["tokens"], line["accepted"]) for line in lines]


def _rounds(engine: Engine, lines: list[dict[str, Any]], room: int) -> None:
    feeds = [_step(line, 0, feed=Feed(tuple(line["tokens"]), None)) for line in lines]
    for line, result in zip(lines, engine.step(feeds), strict=True):
        line.update(cached=len(line["tokens"]), draft=result.draft)
        line["tokens"] += result.tokens
    made = 0
    while live := [line for line in lines if made < line["goal"] and line["cached"] <= room]:
        steps = [_step(line, line["cached"], draft=line["draft"] or Draft(), root=line["tokens"][-1]) for line in live]
        for line, result in zip(live, engine.step(steps), strict=True):
            line["cached"] += len(result.tokens)
            line["tokens"] += result.tokens
            line["accepted"].append(len(result.accepted))
            line["draft"] = result.draft
        made += 1
    for line in lines:
        engine.close(line["row"])


def _step(line: dict[str, Any], cached: int, **parts: Any) -> Step:
    return Step(line["row"], cached, line["pages"], propose=line["shape"], **parts)


if __name__ == "__main__":
    raise SystemExit(main())
