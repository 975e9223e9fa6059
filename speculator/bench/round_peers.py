"""Peers of `speculator bench round`, in the same run: torch.compile and vLLM, each beside our figure for the same work.

Owns: which of our figures a peer is compared to. Must never time anything itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from speculator.bench.round_compiled import peer_passes
from speculator.bench.round_vllm import vllm_rounds
from speculator.bench.synthetic import SHAPES


def compiled_passes(
    name: str, queries: Sequence[int], context: int, repeats: int, device: torch.device
) -> list[dict[str, Any]]:
    """The target's passes at one context: compiling takes minutes."""
    found = peer_passes(SHAPES[name][0], queries, context, device, repeats)
    peer = "torch.compile" + (" + CUDA graph" if device.type == "cuda" else ", not compiled on a CPU")
    return [
        {"peer": peer, "queries": count, "context": context, "ms": round(seconds * 1e3, 4)}
        for count, seconds in found.items()
    ]


def vllm_passes(
    name: str, job: Mapping[str, Any], depth: int, device: torch.device, folder: Path | None
) -> list[dict[str, Any]]:
    """Plain decoding and rounds of `depth`; see `vllm_rounds` for the job."""
    if device.type != "cuda":
        return [{"peer": "vLLM", "error": "runs beside a GPU only"}]
    found = []
    for levels in sorted({0, depth}):
        found += vllm_rounds(*SHAPES[name], {**job, "depth": levels}, folder)
    return found


def compare(peers: Sequence[dict[str, Any]], passes: Sequence[Any], rounds: Sequence[Any]) -> None:
    """Put the ratio to ours beside every figure of a peer; of several ways of recording ours, to the fastest."""
    for peer in peers:
        mine = min(_same_work(peer, passes, rounds), default=None) if "ms" in peer else None
        if mine is not None:
            peer["ours_ms"], peer["ratio"] = mine, round(peer["ms"] / mine, 3)


def _same_work(peer: Mapping[str, Any], passes: Sequence[Any], rounds: Sequence[Any]) -> list[float]:
    """Our times of what a peer did."""
    if "queries" in peer or (peer["depth"], peer["rows"]) == (0, 1):
        wanted = peer.get("queries", 1), peer["context"]
        return [row["ms"] for row in passes if (row["queries"], row["context"]) == wanted]
    work = f"chain {peer['depth']}", peer["rows"], peer["context"]
    return [row["ms"] for row in rounds if "ms" in row and (row["draft"], row["rows"], row["context"]) == work]
