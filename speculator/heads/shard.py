"""A head divided over ranks as its target is: which record, pieces and places one rank has.

Owns: that division of a head's file. Attention and MLPs are divided; what reads features or the vocabulary stays
whole, so drafting needs two sums a layer and nothing else. Must never know formats or collectives.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from torch import Tensor

from speculator.errors import ConfigError
from speculator.heads.record import HeadRecord
from target.parallel import Axis
from target.shards import TABLES, piece_of
from target.weights import Slot


def shard_record(record: HeadRecord, size: int) -> HeadRecord:
    """The record of what one of `size` ranks holds; ConfigError that names what they cannot divide."""
    sizes = {"attention heads": record.num_heads, "inner columns": record.intermediate_size}
    wrong = [f"{count} {what}" for what, count in sizes.items() if count % size]
    if not wrong and record.num_kv_heads % size and size % record.num_kv_heads:
        wrong = [f"{record.num_kv_heads} key-value heads"]
    if wrong:
        text = f"{size} ranks do not divide {' and '.join(wrong)} of the draft head"
        raise ConfigError(f'{text}: set parallel.head to "replicate"')
    return replace(
        record,
        num_heads=record.num_heads // size,
        num_kv_heads=max(1, record.num_kv_heads // size),
        intermediate_size=record.intermediate_size // size,
    )


def shard_tensors(tensors: Iterable[tuple[str, Tensor]], kv_heads: int, axis: Axis) -> Iterator[tuple[str, Tensor]]:
    """A rank's pieces of published tensors; tables over the vocabulary stay whole."""
    for name, tensor in tensors:
        yield name, tensor if name.endswith(TABLES) else piece_of(name, tensor, kv_heads, axis)


def shard_slots(slots: Mapping[str, Slot], rows: Mapping[str, int]) -> dict[str, Slot]:
    """The places of pieces that have so many `rows`: those of one parameter follow each other as before."""
    ends: dict[tuple[str, int | None], int] = {}
    found = {}
    for name, slot in sorted(slots.items(), key=lambda item: item[1].rows.start if item[1].rows else 0):
        if slot.rows is not None:
            start = ends.get((slot.parameter, slot.expert), 0)
            ends[slot.parameter, slot.expert] = start + rows[name]
            slot = slot._replace(rows=range(start, start + rows[name]))
        found[name] = slot
    return found
