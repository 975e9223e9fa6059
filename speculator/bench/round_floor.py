"""What a round must read at least, and how fast this machine reads: the floor under every measured time.

Owns: counting bytes and measuring the bandwidth. Must never know how passes run. Weights count once a pass; of a
mixture of experts every expert counts, so its floor is that of a large batch.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn

from speculator.engine import Engine
from speculator.heads.base import DraftHead
from speculator.types import DraftShape
from target.cache import bytes_per_token
from target.decoder import Decoder

GPU_BYTES, CPU_BYTES = 4 << 30, 64 << 20
EMBEDDING = "embed."  # rows of it are looked up, the table is not read
FUSING = "fc"  # read by the catch-up alone


def bandwidth(device: torch.device, repeats: int = 10) -> float:
    """Bytes a second of a large copy, reading and writing counted."""
    size = GPU_BYTES if device.type == "cuda" else CPU_BYTES
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    source.fill_(1), target.copy_(source)
    times = [_copy_seconds(target, source) for _ in range(repeats)]
    return 2 * size / statistics.median(times)


def _copy_seconds(target: torch.Tensor, source: torch.Tensor) -> float:
    settle(source.device)
    begin = time.perf_counter()
    target.copy_(source)
    settle(source.device)
    return time.perf_counter() - begin


def settle(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def pass_bytes(engine: Engine, rows: int, context: float) -> float:
    """Bytes of one target pass: weights once, keys and values of every row."""
    model = engine.model
    return target_bytes(model) + rows * context * _cached(engine, 0)


def round_bytes(engine: Engine, shape: DraftShape, rows: int, context: float) -> float:
    """Bytes of one round: the target's pass, the catch-up, and a head's pass for every further level."""
    total = pass_bytes(engine, rows, context)
    if engine.head is None:
        return total
    passes = max(1, shape.depth)
    return total + head_bytes(engine.head, shape.depth) + passes * rows * context * _cached(engine, 1)


def target_bytes(model: Decoder) -> int:
    """Weights that a pass reads; a tied embedding is read as lm_head."""
    own = sum(_bytes(p) for name, p in model.named_parameters() if not name.startswith(EMBEDDING))
    return own + (_bytes(model.head_weight) if model.config.tied else 0)


def head_bytes(head: DraftHead, depth: int) -> int:
    """Weights that the catch-up and the draft steps of `depth` levels read."""
    fusing = sum(_bytes(p) for name, p in head.named_parameters() if name.startswith(FUSING))
    catch_up = fusing + sum(_layers(head.stage(k)) for k in range(head.lookback + 1))
    steps = sum(_layers(head.stage(level)) for level in range(1, depth))
    return catch_up + steps + depth * _vocabulary(head)


def _layers(head: nn.Module) -> int:
    """Weights of a head's own layers: nothing that looks up, fuses or ranks."""
    skipped = (EMBEDDING, FUSING, "lm_head.")
    return sum(_bytes(p) for name, p in head.named_parameters() if not name.startswith(skipped))


def _vocabulary(head: DraftHead) -> int:
    if head.lm_head is not None:
        return sum(_bytes(p) for p in head.lm_head.parameters())
    return _bytes(head.embedding_table if head.record.lm_head_is_embed else head.shared.lm_head)


def _cached(engine: Engine, group: int) -> int:
    """Bytes that a pass of the target (0) or the head (1) reads for each token of context."""
    layers = (engine.model.cache_layers, engine.head.cache_layers if engine.head else [])[group]
    return bytes_per_token([layers], engine.cache.layers[0].dtype)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
