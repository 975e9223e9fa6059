"""`speculator bench round`: the time of a round, its ledger and its floor, with peers beside it in the same run.

Owns: the settings, the report and what is printed. Weights are random and acceptance is forced, so every output says
that it is synthetic. Must never compare figures of two runs.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from graphs.errors import GraphError
from speculator.bench.pairs import load_pair
from speculator.bench.provenance import provenance
from speculator.bench.round_floor import bandwidth, pass_bytes, round_bytes
from speculator.bench.round_forced import Depths
from speculator.bench.round_ledger import in_milliseconds
from speculator.bench.round_peers import compare, compiled_passes, vllm_passes
from speculator.bench.round_play import MODES, WRAP, Played, play, recorded, time_pass
from speculator.bench.round_plot import write_plot
from speculator.bench.round_policy import policy_paces
from speculator.bench.round_show import show
from speculator.bench.synthetic import SHAPES, synthetic_engine
from speculator.engine import Engine
from speculator.errors import ConfigError
from speculator.load import SCRATCH_TOKENS
from speculator.recorded import Sizes
from speculator.types import DraftShape

BUNDLED = "bundled"
MOST_NAMES = 60  # kernels that a report lists
QUERIES = (1, 8, 64)
WORDS = "synthetic: {weights} weights, acceptance forced to {accept:g} tokens a round"


class Setting(NamedTuple):
    """One round to be timed."""

    mode: str
    shape: DraftShape
    rows: int
    context: int


def main(argv: list[str] | None = None) -> int:
    """Run the bench; exit code 0."""
    args = _parser().parse_args(argv)
    _check(args)
    report = run(args)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if args.plot:
        write_plot(report, args.plot)
    show(report)
    return 0


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--shape", nargs="+", choices=[*SHAPES, BUNDLED], default=[BUNDLED], help="one after another")
    p.add_argument("--target", help="target folder instead of the bundled pair's")
    p.add_argument("--head", help="head folder")
    p.add_argument("--device", default="auto")
    p.add_argument("--threads", type=int, default=0, help="CPU threads, 0 is torch's choice")
    p.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    p.add_argument("--contexts", type=int, nargs="+", default=[512, 4096], help="tokens of each row before the rounds")
    p.add_argument("--graphs", nargs="+", choices=MODES, default=list(MODES), help="how passes are recorded")
    p.add_argument("--depth", type=int, default=7, help="of the chain; 0 leaves it out")
    p.add_argument("--tree", type=int, nargs=3, metavar=("NODES", "DEPTH", "BRANCHING"), default=[32, 6, 8],
                   help="of the dynamic tree; 0 0 0 leaves it out")  # fmt: skip
    p.add_argument("--accept", type=float, default=4.0, help="tokens that a round is forced to commit, on average")
    p.add_argument("--rounds", type=int, default=40, help="timed rounds of each setting")
    p.add_argument("--policy-accept", type=float, nargs="+", default=[],
                   help="also the depth policy beside plain decoding, at each of these forced acceptances")  # fmt: skip
    p.add_argument("--policy-batches", type=int, nargs="+", default=[], help="of that; default: those of --batches")
    p.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", dest="sets", help="any key of the configuration"
    )
    p.add_argument("--peer", action="store_true", help="also torch.compile + CUDA graph, and vLLM where there is one")
    p.add_argument("--vllm", type=Path, help="folder with a vLLM, for --peer; default: as Python finds it")
    p.add_argument("--json", type=Path, help="write the figures here too")
    p.add_argument("--plot", type=Path, help="write a PNG here")
    return p


def _check(args: argparse.Namespace) -> None:
    counts = [*args.batches, *args.contexts, args.rounds]
    if min(counts) < 1:
        raise ConfigError("--batches, --contexts and --rounds must be at least 1.")
    if not drafts(args):
        raise ConfigError("There is no round to time: --depth and --tree are both 0.")
    shallow = min(shape.depth for shape in drafts(args))
    if not 1 <= args.accept <= shallow + 1:
        most = f"{shallow + 1}, the most that a draft of depth {shallow} commits"
        raise ConfigError(f"--accept must be between 1 and {most}.")
    if args.policy_accept and not 1 <= min(args.policy_accept) <= max(args.policy_accept) <= args.depth + 1:
        raise ConfigError(f"--policy-accept must be between 1 and {args.depth + 1}.")


def drafts(args: argparse.Namespace) -> list[DraftShape]:
    """The chain and the tree that the arguments ask for."""
    nodes, depth, branching = args.tree
    chain = [DraftShape(args.depth)] if args.depth else []
    return chain + ([DraftShape(depth, nodes, branching)] if nodes else [])


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The whole report, shape by shape."""
    return {
        "bench": "round",
        "synthetic": True,
        "provenance": provenance(),
        "shapes": [_shape_report(name, args) for name in args.shape],
    }


def _shape_report(name: str, args: argparse.Namespace) -> dict[str, Any]:
    engine = _engine(name, args)
    speed = bandwidth(engine.device)
    report: dict[str, Any] = {
        "shape": name,
        "says": WORDS.format(weights="trained" if name == BUNDLED else "random", accept=args.accept),
        "device": str(engine.device),
        "bandwidth_tb_s": round(speed / 1e12, 4),
        "passes": _passes(engine, args, speed),
        "rounds": _rounds(engine, args, speed),
        "policy": _policy(engine, args),
        "peers": [],
    }
    device = engine.device
    del engine  # its memory goes to the peers
    _empty(device)
    if args.peer and name != BUNDLED:
        report["peers"] = _peers(name, args, device)
        compare(report["peers"], report["passes"], report["rounds"])
        _empty(device)
    return report


def _peers(name: str, args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    found = compiled_passes(name, QUERIES, min(args.contexts), args.rounds, device)
    _empty(device)
    job = {"batches": args.batches, "contexts": args.contexts, "accept": args.accept}
    return found + vllm_passes(name, job, args.depth, device, args.vllm)


def _empty(device: torch.device) -> None:
    gc.collect()  # recordings and what they hold are cyclic
    if device.type == "cuda":
        torch.cuda.empty_cache()


# ---- ours


def _engine(name: str, args: argparse.Namespace) -> Engine:
    """An engine that records nothing by itself, with room for the largest batch at the longest context."""
    rows, longest = max(args.batches + args.policy_batches), _longest(args)
    room = rows * (longest + SCRATCH_TOKENS + 64)
    sets: dict[str, object] = {"graphs.mode": "off", "engine.kv_tokens": room, "engine.max_context": longest}
    sets |= dict(_pair(text) for text in args.sets)
    if name == BUNDLED:
        engine = load_pair(args, rows, sets).engine
    else:
        engine = synthetic_engine(name, args.device, rows, {**sets, "engine.threads": args.threads})
    _check_room(engine, room)
    return engine


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise ConfigError(f'--set takes section.key=value, not "{text}".')
    return key, value


def _check_room(engine: Engine, room: int) -> None:
    held = (engine.info.total_pages - 1) * engine.info.page_size
    if held < room:
        raise ConfigError(f"The largest batch needs {room} tokens of KV cache, memory holds {held}: ask for less.")
    if engine.head is None:
        raise ConfigError("A round needs a head: name one with --head.")


def _longest(args: argparse.Namespace) -> int:
    longest: int = max(args.contexts) + WRAP + max(QUERIES)
    return longest


def _passes(engine: Engine, args: argparse.Namespace, speed: float) -> list[dict[str, Any]]:
    """The target alone, one row."""
    rows = []
    for context in args.contexts:
        for queries in QUERIES:
            seconds = time_pass(engine, queries, context, args.rounds)
            floor = pass_bytes(engine, 1, context) / speed
            rows.append({"queries": queries, "context": context, **_beside(seconds, floor)})
    return rows


def _beside(seconds: float, floor: float) -> dict[str, float]:
    return {"ms": round(seconds * 1e3, 4), "floor_ms": round(floor * 1e3, 4), "of_floor": round(seconds / floor, 3)}


def _rounds(engine: Engine, args: argparse.Namespace, speed: float) -> list[dict[str, Any]]:
    found = []
    for shape in drafts(args):
        depths = Depths(args.accept, shape.depth, engine.device)
        for rows in args.batches:
            for mode in args.graphs:
                settings = [Setting(mode, shape, rows, context) for context in args.contexts]
                found += _one_recording(engine, args, settings, depths, speed)
    return found


def _one_recording(
    engine: Engine, args: argparse.Namespace, settings: Sequence[Setting], depths: Depths, speed: float
) -> list[dict[str, Any]]:
    """Rounds that the same recordings serve: one mode, one shape, one number of rows."""
    first = settings[0]
    try:
        with recorded(engine, first.mode, _sizes(engine, first.shape, first.rows), depths):
            return [_timed(engine, setting, args.rounds, depths, speed) for setting in settings]
    except GraphError as error:
        return [{**_named(setting), "error": str(error)} for setting in settings]


def _sizes(engine: Engine, shape: DraftShape, rows: int) -> Sizes:
    page = engine.info.page_size
    return Sizes(rows, -(-(engine.info.max_context + SCRATCH_TOKENS) // page), page, shape)


def _policy(engine: Engine, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The depth policy beside plain decoding, at the shortest context."""
    found, shape = [], DraftShape(args.depth)
    mode = args.graphs[-1]
    for accept in args.policy_accept if args.depth else ():
        for rows in args.policy_batches or args.batches:
            sizes = _sizes(engine, shape, rows)
            found.append(policy_paces(engine, mode, sizes, min(args.contexts), accept))
    return found


def _named(setting: Setting) -> dict[str, Any]:
    shape = setting.shape
    words = f"chain {shape.depth}" if shape.is_chain else f"tree {shape.nodes}, depth {shape.depth}"
    return {"graphs": setting.mode, "draft": words, "rows": setting.rows, "context": setting.context}


def _timed(engine: Engine, setting: Setting, rounds: int, depths: Depths, speed: float) -> dict[str, Any]:
    played = play(engine, setting.rows, setting.context, setting.shape, rounds, depths)
    seconds = statistics.median(played.seconds)
    floor = round_bytes(engine, setting.shape, setting.rows, played.context) / speed
    return {
        **_named(setting),
        **_beside(seconds, floor),
        "spread_ms": _spread(played.seconds),
        "committed": round(played.committed, 3),
        "tokens_per_second": round(setting.rows * played.committed / seconds, 1),
        "replayed": played.replayed,
        **_ledger(played, seconds),
    }


def _spread(seconds: Sequence[float]) -> list[float]:
    """The 5th and the 95th percentile in milliseconds, between which nine of ten rounds lie."""
    if len(seconds) < 2:
        return [round(1e3 * seconds[0], 4)] * 2
    cuts = statistics.quantiles(seconds, n=20)
    return [round(1e3 * cuts[0], 4), round(1e3 * cuts[-1], 4)]


def _ledger(played: Played, seconds: float) -> dict[str, Any]:
    """The ledger, and what the host adds: the time of a round in which its span on the device is not under way."""
    if played.ledger is None:
        return {}
    found: dict[str, Any] = {
        "ledger_ms": in_milliseconds(played.ledger, seconds * 1e3),
        "kernels": played.ledger.kernels,
    }
    names = list(played.ledger.names.items())[:MOST_NAMES]
    found["by_kernel"] = [[name[:80], count, round(us, 1)] for name, (count, us) in names]
    if played.ledger.span is None:
        return found
    return {**found, "host_us": round(max(0.0, seconds * 1e6 - played.ledger.span), 1)}
