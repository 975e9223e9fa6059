"""`speculator bench hybrid`: passes, commits and MTP rounds of a gated DeltaNet hybrid, and the bits of its states.

Owns: the settings, the report and what is printed. Weights are random and acceptance is forced, so every output says
that it is synthetic. Must never compare figures of two runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from graphs.errors import GraphError
from speculator.bench import hybrid_states as states
from speculator.bench.provenance import provenance
from speculator.bench.round_floor import bandwidth, pass_bytes, round_bytes, settle
from speculator.bench.round_forced import Depths
from speculator.bench.round_ledger import profiled
from speculator.bench.round_play import PROFILED, WRAP, play, recorded
from speculator.bench.round_policy import plain_seconds, policy_paces
from speculator.bench.round_show import show_tables
from speculator.bench.synthetic import HYBRIDS, hybrid_engine
from speculator.engine import Engine
from speculator.errors import ConfigError
from speculator.load import SCRATCH_TOKENS, resolve_device
from speculator.recorded import Sizes
from speculator.types import DraftShape

MODES = ("off", "split")
PARTS = ("times", "states")
MOST_NAMES = 40  # kernels that a report lists
SAYS = "synthetic: random weights, acceptance forced to {accept:g} tokens a round"


def main(argv: list[str] | None = None) -> int:
    """Run the bench; exit code 1 when states that should be equal are not."""
    args = _parser().parse_args(argv)
    _check(args)
    report = run(args)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    _show(report)
    return 0 if all(row["equal"] for row in report["states"] if row["way"] == states.WAYS[0]) else 1


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--shape", choices=HYBRIDS, default="hybrid-nano")
    p.add_argument("--device", default="auto")
    p.add_argument("--threads", type=int, default=0, help="CPU threads, 0 is torch's choice")
    p.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    p.add_argument("--queries", type=int, nargs="+", default=list(range(1, 9)), help="tokens that a pass verifies")
    p.add_argument("--context", type=int, default=512, help="tokens of each row before a pass")
    p.add_argument("--graphs", choices=MODES, default="split", help="how the passes of rounds are recorded")
    p.add_argument("--depths", type=int, nargs="+", default=[1, 2, 3], help="of the chains")
    p.add_argument("--accept", type=float, default=2.0, help="tokens that a round is forced to commit, on average")
    p.add_argument("--rounds", type=int, default=40, help="timed passes, commits and rounds of each setting")
    p.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, help="times of passes and rounds, bits of states"
    )
    p.add_argument("--state-rounds", type=int, default=2000, help="rounds whose states are compared")
    p.add_argument("--state-layers", type=int, default=4, help="layers of the target in that, 0 for all")
    p.add_argument("--json", type=Path, help="write the figures here too")
    return p


def _check(args: argparse.Namespace) -> None:
    counts = [*args.batches, *args.queries, *args.depths, args.context, args.rounds, args.state_rounds]
    if min(counts) < 1:
        names = "--batches, --queries, --depths, --context, --rounds and --state-rounds"
        raise ConfigError(f"{names} must be at least 1.")
    if not 1 <= args.accept <= min(args.depths) + 1:
        raise ConfigError(f"--accept must be between 1 and {min(args.depths) + 1}, the most that every depth commits.")
    if args.state_layers < 0:
        raise ConfigError("--state-layers must not be negative.")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The whole report."""
    return {
        "bench": "hybrid",
        "synthetic": True,
        "says": SAYS.format(accept=args.accept),
        "provenance": provenance(),
        "shape": args.shape,
        "device": str(resolve_device(args.device)),
        **(_timed(args) if "times" in args.parts else {}),
        "states": _compared(args) if "states" in args.parts else [],
    }


def _timed(args: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    rows, longest = max(args.batches), args.context + WRAP + max(args.queries)
    engine = hybrid_engine(args.shape, args.device, rows, _sets(args, rows, longest))
    speed = bandwidth(engine.device)
    with engine.recurrent.anywhere():
        return {
            "bandwidth_tb_s": round(speed / 1e12, 4),
            "passes": [row for batch in args.batches for row in _passes(engine, args, batch, speed)],
            "rounds": [_rounds(engine, args, depth, speed) for depth in args.depths],
            "policy": [_policy(engine, args)],
        }


def _sets(args: argparse.Namespace, rows: int, longest: int) -> dict[str, object]:
    """No recordings by itself, and room for all rows."""
    return {
        "graphs.mode": "off",
        "engine.threads": args.threads,
        "engine.max_context": longest,
        "engine.kv_tokens": rows * (longest + SCRATCH_TOKENS + 64),
        "draft.depth": max(args.depths),
    }


# ---- passes and commits


def _passes(engine: Engine, args: argparse.Namespace, rows: int, speed: float) -> list[dict[str, Any]]:
    """Passes of several tokens beside the one of a token, which is the first."""
    found: list[dict[str, Any]] = []
    for queries in sorted({1, *args.queries}):
        found.append(_pass(engine, args, rows, queries, speed))
        plain = found[0]
        found[-1]["ratio"] = round(found[-1]["ms"] / plain["ms"], 3)
        both = [row["ms"] + row["commit_ms"] for row in (found[-1], plain)]
        found[-1]["ratio_with_commit"] = round(both[0] / both[1], 3)
    return found


def _pass(engine: Engine, args: argparse.Namespace, rows: int, queries: int, speed: float) -> dict[str, Any]:
    batch = states.batch_of(engine, rows, queries, args.context)
    seconds = states.pass_seconds(engine, batch, args.rounds)
    on_device, on_host = states.commit_seconds(engine, batch, batch.counts, args.rounds)
    moved = _traffic(engine, rows, queries)
    floor = (pass_bytes(engine, rows, args.context) + moved["in_all"]["pass_reads"]) / speed
    return {
        "rows": rows,
        "queries": queries,
        "ms": round(1e3 * seconds, 4),
        "floor_ms": round(1e3 * floor, 4),
        "of_floor": round(seconds / floor, 3),
        **_launches(lambda: states.said(engine, batch), engine.device),
        "commit_ms": round(1e3 * on_device, 4),
        "commit_host_ms": round(1e3 * on_host, 4),
        "state_bytes": moved,
        "as_arguments": states.metered(engine, batch, batch.counts)._asdict() == moved["in_all"],
    }


def _launches(run: Any, device: torch.device) -> dict[str, Any]:
    """Kernels of a pass, those that take longest by name; on a CPU operations."""
    with torch.inference_mode():
        ledger = profiled(lambda: _settled(run, device), PROFILED, device)
    if ledger is None:
        return {}
    names = [[name[:80], count, round(us, 1)] for name, (count, us) in list(ledger.names.items())[:MOST_NAMES]]
    return {"launches": ledger.kernels, "by_kernel": names}


def _settled(run: Any, device: torch.device) -> None:
    run()
    settle(device)


def _traffic(engine: Engine, rows: int, queries: int) -> dict[str, Any]:
    delta, layers = engine.model.config.delta, len(engine.model.state_layers)
    assert delta is not None
    each = states.traffic(delta, rows, queries, engine.model.embed.weight.dtype)
    whole = each.times(layers)
    kept = layers * states.snapshots(delta, rows, queries)
    return {"layers": layers, "a_layer": each._asdict(), "in_all": whole._asdict(), "snapshots_would_write": kept}


# ---- rounds


def _rounds(engine: Engine, args: argparse.Namespace, depth: int, speed: float) -> dict[str, Any]:
    """MTP rounds of one session between plain decoding of it, so that a machine that grows slower counts for both."""
    shape, depths = DraftShape(depth), Depths(args.accept, depth, engine.device)
    about = {"depth": depth, "graphs": args.graphs, "context": args.context}
    try:
        with recorded(engine, args.graphs, _sizes(engine, shape), depths):
            plain = plain_seconds(engine, 1, args.context)
            played = play(engine, 1, args.context, shape, args.rounds, depths)
            plain += plain_seconds(engine, 1, args.context)
    except GraphError as error:
        return {**about, "error": str(error)}
    seconds, token = statistics.median(played.seconds), statistics.median(plain)
    floor = round_bytes(engine, shape, 1, played.context) / speed
    return {
        **about,
        "ms": round(1e3 * seconds, 4),
        "floor_ms": round(1e3 * floor, 4),
        "plain_ms": round(1e3 * token, 4),
        "committed": round(played.committed, 3),
        "tok_s": round(played.committed / seconds, 1),
        "plain_tok_s": round(1 / token, 1),
        "ratio": round(played.committed * token / seconds, 3),
        "replayed": played.replayed,
    }


def _sizes(engine: Engine, shape: DraftShape) -> Sizes:
    page = engine.info.page_size
    return Sizes(1, -(-(engine.info.max_context + SCRATCH_TOKENS) // page), page, shape)


def _policy(engine: Engine, args: argparse.Namespace) -> dict[str, Any]:
    """What the depth policy drafts once it knows its costs, and its pace beside plain decoding."""
    sizes = _sizes(engine, DraftShape(max(args.depths)))
    return policy_paces(engine, args.graphs, sizes, args.context, args.accept)


# ---- states


def _compared(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Committed states beside those of plain decoding, on a target of its own."""
    torch.manual_seed(0)
    depth = max(args.depths)
    longest = states.PROMPT + args.state_rounds * (depth + 1) + depth + 1
    engine = hybrid_engine(args.shape, args.device, 2, _sets(args, 2, longest), args.state_layers)
    layers = engine.model.config.num_layers
    found = [states.committed_states(engine, way, args.state_rounds, depth) for way in states.WAYS]
    return [{"layers": layers, "depth": depth, **row} for row in found]


# ---- what is printed


def _show(report: dict[str, Any]) -> None:
    times = ("ms", "floor_ms", "of_floor")
    passes = report.get("passes", [])
    tables = (
        ("passes (synthetic)", ("rows", "queries", *times, "ratio", "launches", *COMMIT), passes),
        ("bytes of states, all layers", ("rows", "queries", *BYTES), [_bytes(row) for row in passes]),
        ("MTP rounds of one session (synthetic)", ("depth", "graphs", *ROUND, "error"), report.get("rounds", [])),
        ("the depth policy beside plain decoding (synthetic)", POLICY, report.get("policy", [])),
        ("committed states beside plain decoding's", ("way", "layers", "rounds", "tokens", *ENDS), report["states"]),
    )
    title = f"{report['shape']} on {report['device']}, {report['says']}"
    show_tables(report["provenance"], title, report.get("bandwidth_tb_s"), tables)


COMMIT = ("commit_ms", "commit_host_ms", "ratio_with_commit")
BYTES = (*states.Traffic._fields, "snapshots_would_write", "as_arguments")
ROUND = ("ms", "floor_ms", "plain_ms", "committed", "tok_s", "plain_tok_s", "ratio", "replayed")
POLICY = ("graphs", "accept", "context", "plain_tok_s", "policy_tok_s", "ratio", "drafts", "costs_ms", "error")
ENDS = ("accepted", "equal", "first")


def _bytes(row: dict[str, Any]) -> dict[str, Any]:
    moved = row["state_bytes"]
    kept = {"snapshots_would_write": moved["snapshots_would_write"], "as_arguments": row["as_arguments"]}
    return {"rows": row["rows"], "queries": row["queries"], **moved["in_all"], **kept}
