"""Routed experts divided over ranks that have batches of their own: whole experts on each, all else everywhere.

Owns: the exchange of a mixture's tokens, and which experts of a checkpoint a rank holds. Must never know sessions, or
who decides what ranks run: all of them run the same passes in the same order, an empty batch where one has nothing.

The tokens of all ranks are gathered with their routing, each rank adds what its experts say of any of them, and a sum
over the ranks brings every token home: expert parallelism with attention-data parallelism around it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
import torch.nn.functional as F
from torch import Tensor

from target.config import ModelConfig
from target.config_moe import MoeConfig
from target.decoder import Decoder
from target.errors import PlanError
from target.moe import Experts, MoE
from target.parallel import Axis, in_collective
from target.shards import ROWS, Cut, ShardFiles
from target.weights import Slot

EXPERTS = "experts"  # the name of the axis
STACKED = ("experts.gate_up_proj", "experts.down_proj")  # all experts of a layer in one published tensor

# As an operation of its own, so that a recorder sees it: c10d's do not say what they write.
_library = torch.library.Library("target_experts", "DEF")
_library.define("home(Tensor x, str group, int size) -> Tensor")
_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # its name before 2.13


def _home(x: Tensor, group: str, size: int) -> Tensor:
    named: Any = c10d._resolve_process_group(group)  # type: ignore[attr-defined, arg-type, unused-ignore]
    own = x.new_empty(len(x) // size, *x.shape[1:])
    with in_collective(group):
        _scatter(own, x, group=named)
    return own


_library.impl("home", _home, "CompositeExplicitAutograd")


class Exchange:
    """The way of tokens to the experts of all ranks and back, for all layers of a target.

    Every rank brings equally many tokens. `width` is that number for the pass under way, of which this rank's batch
    may fill less; None where all ranks run batches of one shape, as they do while passes are recorded.
    """

    def __init__(self, axis: Axis) -> None:
        self.axis = axis
        self.width: int | None = None

    @contextmanager
    def of(self, width: int) -> Iterator[None]:
        """Passes inside bring `width` tokens of every rank."""
        before, self.width = self.width, width
        try:
            yield
        finally:
            self.width = before

    def gather(self, x: Tensor) -> Tensor:
        """[n, W] of each rank -> [size * width, W]; what a rank does not fill is zero."""
        missing = 0 if self.width is None else self.width - len(x)
        if missing < 0:
            raise PlanError(f"a batch of {len(x)} tokens joins a pass of {self.width} tokens a rank")
        return self.axis.gather(F.pad(x, (0, 0, 0, missing)) if missing else x).flatten(0, 1)

    def home(self, partial: Tensor, count: int) -> Tensor:
        """[size * width, H] of each rank -> [count, H], the sum over the ranks of this rank's own tokens."""
        whole: Tensor = torch.ops.target_experts.home(partial.contiguous(), self.axis.group, self.axis.size)
        return whole[:count]


class SharedExperts(Experts):
    """The experts of one rank, for the tokens of all; numbers of experts are those of the whole mixture."""

    def __init__(self, size: int, moe: MoeConfig, exchange: Exchange) -> None:
        self.count = moe.experts // exchange.axis.size
        super().__init__(size, replace(moe, experts=self.count))
        self.exchange, self.first = exchange, exchange.axis.rank * self.count

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """x [n, size], weights [n, k] float32 and experts [n, k] int64 of this rank's tokens -> [n, size]."""
        tokens, weights, experts = _unpacked(self.exchange.gather(_packed(x, weights, experts)), x, experts.shape[1])
        mine = experts - self.first
        elsewhere = (mine < 0) | (mine >= self.count)
        partial = super().forward(tokens, weights, mine.masked_fill(elsewhere, self.count))
        return self.exchange.home(partial, len(x))

    def _weigh(self, out: Tensor, weights: Tensor, by_expert: Tensor) -> Tensor:
        """Pairs of other ranks lie behind the last group, where a grouped matmul writes nothing."""
        return (out * weights[:, None]).masked_fill((by_expert == self.count)[:, None], 0)

    def _share(self, weights: Tensor, experts: Tensor) -> Tensor:
        none = weights.new_zeros(weights.shape[0], self.count + 1)
        return none.scatter(1, experts, weights)[:, : self.count]


def _packed(x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """Tokens and their routing in one tensor [n, W] int32 of bits; an expert is its number plus 1, so 0 is nobody."""
    return torch.cat((x.view(torch.int32), weights.view(torch.int32), (experts + 1).int()), dim=1)


def _unpacked(packed: Tensor, like: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    width = packed.shape[1] - 2 * top_k
    x, weights, experts = packed.split_with_sizes((width, top_k, top_k), dim=1)
    return x.contiguous().view(like.dtype), weights.contiguous().view(torch.float32), experts.long() - 1


class ExpertDecoder(Decoder):
    """A target of which each rank holds everything but most routed experts; it runs the rank's own batches."""

    def __init__(self, config: ModelConfig, axis: Axis) -> None:
        check_experts(config, axis.size)
        super().__init__(config)
        self.exchange = Exchange(axis)
        for layer in self.modules():
            if isinstance(layer, MoE):
                layer.experts = SharedExperts(config.hidden_size, layer.gate.moe, self.exchange)


def check_experts(config: ModelConfig, size: int) -> None:
    """PlanError in one sentence where `size` ranks with sessions of their own cannot share the experts of a config."""
    name, moe = config.architecture, config.moe
    if config.delta is not None:
        raise PlanError(f"{name} has recurrent layers, which attention-data parallelism does not serve")
    if moe is None:
        raise PlanError(f"{name} has no experts to share: data parallelism of a dense target is {size} servers")
    if moe.experts % size:
        raise PlanError(f"{size} ranks do not divide {moe.experts} experts of {name}")


def own_slots(slots: Mapping[str, Slot], config: ModelConfig, axis: Axis) -> dict[str, Slot]:
    """The places of what a rank holds: other ranks' experts are left out, its own are counted from 0."""
    assert config.moe is not None
    count = config.moe.experts // axis.size
    first = axis.rank * count
    found = {}
    for name, slot in slots.items():
        if slot.expert is None:
            found[name] = slot
        elif first <= slot.expert < first + count:
            found[name] = slot._replace(expert=slot.expert - first)
    return found


class ExpertFiles(ShardFiles):
    """The tensors of a folder as they are; of those that stack all experts only a rank's own are read."""

    def cut_of(self, name: str) -> Cut | None:
        return Cut(ROWS, self.axis.rank, self.axis.size) if name.endswith(STACKED) else None

    def once(self, name: str, tensor: Tensor) -> Tensor:
        return tensor
