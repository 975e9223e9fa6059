"""What `speculator bench ranks` runs: published shapes whole, and the random shard of one that a rank holds.

Owns: which shapes there are, their small likenesses, and whether a shard fits a device. Must never measure anything.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from speculator.bench.synthetic import LLAMA_8B, SHAPES, eagle3_record, random_weights
from speculator.errors import ConfigError
from speculator.heads.base import DraftHead, TargetWeights
from speculator.heads.load import HEADS, lend
from speculator.heads.record import HeadRecord
from speculator.heads.shard import shard_record
from speculator.ranks.team import Team
from target.config import ModelConfig, parse_config
from target.decoder import Decoder
from target.errors import PlanError
from target.parallel import ALONE, TENSOR, Axis, ParallelDecoder, add_up

LLAMA_70B: Mapping[str, Any] = {
    **LLAMA_8B, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8,
}  # fmt: skip
SHARES = "-tp4"  # ends the names of shapes that are one rank's share already
WHOLE = {name: shape for name, shape in SHAPES.items() if not name.endswith(SHARES)}
WHOLE["llama-3.1-70b"] = (LLAMA_70B, 32000)
ROOM = 0.9  # of a device's memory that weights may take


class Shape(NamedTuple):
    """A target and the draft vocabulary of its EAGLE-3 head."""

    name: str
    config: ModelConfig
    draft_vocab: int
    dtype: torch.dtype


def shape_of(name: str, small: bool) -> Shape:
    """The shape `name`, or its small likeness: as many heads, everything else tiny."""
    raw, draft_vocab = WHOLE[name]
    if small:
        tiny = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "head_dim": 8, "vocab_size": 512}
        raw, draft_vocab = {**raw, **tiny, "torch_dtype": "float32"}, 256
    return Shape(
        f"{name}, small" if small else name, parse_config(raw), draft_vocab, getattr(torch, raw["torch_dtype"])
    )


def build_shard(shape: Shape, team: Team, divided: str) -> tuple[Decoder, DraftHead]:
    """A rank's shard of a random target, and of a random head or a whole one that is the same on all ranks."""
    axis = team.mesh.tensor
    torch.manual_seed(team.rank)
    target = random_weights(_bare_target(shape, axis), shape.dtype, team.device)
    record = eagle3_record(target.whole, shape.draft_vocab)
    own = axis if divided == "shard" else ALONE
    head = _bare_head(record, lend(record, target), own, target.config.num_layers)
    torch.manual_seed(0)  # what every rank holds whole must be the same; that pieces are too does not show in times
    head = random_weights(head, shape.dtype, team.device)
    head.target_ids = torch.arange(shape.draft_vocab, device=team.device)
    return target, head


def _bare_target(shape: Shape, axis: Axis) -> ParallelDecoder:
    with torch.device("meta"):
        return ParallelDecoder(shape.config, axis)


def _bare_head(record: HeadRecord, shared: TargetWeights, axis: Axis, layers: int) -> DraftHead:
    with torch.device("meta"):
        head = HEADS["eagle3"](shard_record(record, axis.size), shared, layers)
    add_up(head, axis)
    return head


def shard_bytes(shape: Shape, size: int, divided: str) -> int:
    """Bytes of the weights that one of `size` ranks holds; PlanError or ConfigError where they do not divide."""
    axis = Axis(TENSOR, 0, size)
    target, record = _bare_target(shape, axis), eagle3_record(shape.config, shape.draft_vocab)
    shared = TargetWeights(target.embed.weight, target.head_weight, shape.config)
    head = _bare_head(record, shared, axis if divided == "shard" else ALONE, shape.config.num_layers)
    count = sum(p.numel() for model in (target, head) for p in model.parameters())
    if size > 1:  # the head reads the whole embedding, which is gathered
        count += shape.config.vocab_size * shape.config.hidden_size
    return count * shape.dtype.itemsize


def check_fits(shape: Shape, size: int, divided: str, device: torch.device) -> None:
    """ConfigError that says why `size` ranks of this machine cannot run the shape."""
    try:
        each = shard_bytes(shape, size, divided)
    except PlanError as error:
        raise ConfigError(str(error)) from None
    if device.type == "cuda" and size > torch.cuda.device_count():
        raise ConfigError(f"{size} ranks need {size} CUDA devices, and this machine has {torch.cuda.device_count()}")
    have, need = _memory(device), each if device.type == "cuda" else each * size
    if need > ROOM * have:
        where = "on each device" if device.type == "cuda" else "in all"
        text = f"{shape.name} over {size} ranks takes {need / 2**30:.0f} GiB {where} and there are {have / 2**30:.0f}"
        raise ConfigError(f"{text}: take more ranks, or --small")


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
