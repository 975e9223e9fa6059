"""A target over several ranks: the mesh, and a decoder of which each rank holds a shard.

Owns: named axes and their collectives, what a shard of a config is, and where partial results are added up. Must never
know files, drafting, or who started the ranks. Every rank runs the same passes in the same order.

Tensor parallelism as in Megatron-LM (arXiv 1909.08053): heads and inner columns are divided, each attention and each
MLP ends in one sum over the ranks, the vocabulary is divided by rows. Keys and values of a head that several ranks
need are computed by each; latents (MLA) by all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import product
from math import prod
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
import torch.nn.functional as F
from torch import Tensor, nn

from target.config import ModelConfig
from target.decoder import Decoder
from target.deepseek import LatentAttention
from target.errors import PlanError
from target.layers import GatedMLP, SelfAttention
from target.moe import MoE
from target.products import Linear
from target.readout import Asked, Keep, Noise, Readout, read_logits

TENSOR = "tensor"

# Collectives as operations of their own, so that a recorder sees them: c10d's do not say what they write.
_library = torch.library.Library("target_parallel", "DEF")
_library.define("sum_(Tensor(a!) x, str group) -> Tensor(a!)")
_library.define("gather(Tensor x, str group, int size) -> Tensor")


def _named(group: str) -> dist.ProcessGroup:
    found: dist.ProcessGroup = c10d._resolve_process_group(group)  # type: ignore[attr-defined, arg-type, unused-ignore]
    return found


Waiting = Callable[[], AbstractContextManager[None]]
_waiting: dict[str, Waiting] = {}  # by group, as torch keeps the groups themselves: an operation knows only the name


def in_collective(group: str) -> AbstractContextManager[None]:
    """What every collective of a group is in while it is called, also where a recording on a CPU calls it again."""
    return _waiting.get(group, nullcontext)()


_gather_into: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before 2.13


def _sum(x: Tensor, group: str) -> Tensor:
    with in_collective(group):
        dist.all_reduce(x, group=_named(group))
    return x


def _gather(x: Tensor, group: str, size: int) -> Tensor:
    out = x.new_empty(size, *x.shape)
    with in_collective(group):
        _gather_into(out, x.contiguous()[None], group=_named(group))
    return out


_library.impl("sum_", _sum, "CompositeExplicitAutograd")
_library.impl("gather", _gather, "CompositeExplicitAutograd")


@dataclass(frozen=True)
class Axis:
    """One way of dividing the work: this process is `rank` of `size` ranks; `group` names their process group."""

    name: str
    rank: int = 0
    size: int = 1
    group: str = ""

    @property
    def process_group(self) -> dist.ProcessGroup:
        """For sends from rank to rank; an axis of one rank has none."""
        return _named(self.group)

    def on_collectives(self, waiting: Waiting) -> None:
        """Call every collective of this axis inside `waiting()`."""
        _waiting[self.group] = waiting

    def sum(self, x: Tensor) -> Tensor:
        """Add `x` (contiguous) up over the ranks, in place; all ranks get the same bits."""
        if self.size == 1:
            return x
        return torch.ops.target_parallel.sum_(x, self.group)  # type: ignore[no-any-return]

    def gather(self, x: Tensor) -> Tensor:
        """The tensors of all ranks, which have one shape: [...] -> [size, ...]."""
        if self.size == 1:
            return x[None]
        return torch.ops.target_parallel.gather(x, self.group, self.size)  # type: ignore[no-any-return]


ALONE = Axis(TENSOR)


@dataclass(frozen=True)
class Mesh:
    """All ranks as a grid with named axes, of which each rank knows its own lines."""

    axes: Mapping[str, Axis]

    @property
    def tensor(self) -> Axis:
        return self.axes.get(TENSOR, ALONE)

    @classmethod
    def build(cls, sizes: Mapping[str, int], backend: str, timeout: timedelta) -> Mesh:
        """Divide the ranks of the default group; axes outermost first, neighbours along the last. Call on every rank.

        Raises PlanError when the sizes do not make up the number of ranks.
        """
        world = dist.get_world_size()
        if prod(sizes.values()) != world:
            raise PlanError(f"a mesh of {_grid(sizes)} needs {prod(sizes.values())} ranks, and {world} run")
        return cls({name: lines_of(sizes, name, backend, timeout) for name in sizes})


def lines_of(sizes: Mapping[str, int], name: str, backend: str, timeout: timedelta) -> Axis:
    """This rank's line along one axis of the grid of all ranks, with a new process group. Call on every rank."""
    grid = torch.arange(dist.get_world_size()).view(*sizes.values())
    return _axis(name, grid.movedim(list(sizes).index(name), -1), backend, timeout)


def _grid(sizes: Mapping[str, int]) -> str:
    return " x ".join(f"{size} {name}" for name, size in sizes.items())


def _axis(name: str, lines: Tensor, backend: str, timeout: timedelta) -> Axis:
    """This rank's line among `lines` [..., size]; every rank makes every group, as torch wants it."""
    me, found = dist.get_rank(), Axis(name)
    for place in product(*map(range, lines.shape[:-1])):
        ranks = lines[place].tolist()
        group = dist.new_group(ranks, timeout=timeout, backend=backend) if len(ranks) > 1 else None
        if me in ranks and group is not None:
            found = Axis(name, ranks.index(me), len(ranks), group.group_name)
    return found


# ---- what a rank holds


def check_divides(config: ModelConfig, size: int) -> None:
    """PlanError that names what `size` ranks cannot divide."""
    if size == 1:
        return
    if config.delta is not None:
        raise PlanError(f"{config.architecture} has recurrent layers, which tensor parallelism does not divide")
    wrong = [f"{n} {what}" for what, n in _divided(config).items() if n % size]
    if wrong:
        raise PlanError(f"{size} ranks do not divide {' and '.join(wrong)} of {config.architecture}")
    kv = config.num_kv_heads
    if config.mla is None and kv % size and size % kv:
        raise PlanError(f"{kv} key-value heads of {config.architecture} do not divide over, or repeat on {size} ranks")


def _divided(config: ModelConfig) -> dict[str, int]:
    sizes = {"attention heads": config.num_heads}
    if config.moe is None or config.moe.dense_layers:
        sizes["inner columns of an MLP"] = config.intermediate_size
    if config.moe is not None:
        sizes["inner columns of an expert"] = config.moe.inner_size
        sizes["inner columns of the shared expert"] = config.moe.shared_size
    return sizes


def shard_config(config: ModelConfig, size: int) -> ModelConfig:
    """The config of what one of `size` ranks holds; the vocabulary is left whole. PlanError where it cannot be."""
    check_divides(config, size)
    moe = config.moe
    if moe is not None:
        moe = replace(moe, inner_size=moe.inner_size // size, shared_size=moe.shared_size // size)
    return replace(
        config,
        num_heads=config.num_heads // size,
        num_kv_heads=max(1, config.num_kv_heads // size),
        intermediate_size=max(1, config.intermediate_size // size),
        moe=moe,
    )


def vocabulary_rows(vocab: int, size: int) -> int:
    """Rows of a table over the vocabulary that each rank holds; the last rank's may end in padding."""
    return -(-vocab // size)


PARTS = (SelfAttention, LatentAttention, GatedMLP, MoE)  # of a layer


class ParallelDecoder(Decoder):
    """The shard of a target that one rank holds. `config` is the shard's, `whole` the target's.

    Hidden states, taps and logits are whole on every rank, and the same bits on all of them. `noise` answers questions
    about sampled tokens where no kernel does.
    """

    noise: Noise | None = None

    def __init__(self, whole: ModelConfig, axis: Axis) -> None:
        super().__init__(shard_config(whole, axis.size))
        self.whole, self.axis = whole, axis
        rows = vocabulary_rows(whole.vocab_size, axis.size)
        self.embed = VocabularyEmbedding(rows, whole.hidden_size, axis)
        self.lm_head = None if whole.tied else Linear(whole.hidden_size, rows, bias=False)
        add_up(self.layers, axis)

    def logits(self, final: Tensor) -> Tensor:
        """F [..., H] -> [..., V]: the whole vocabulary, gathered."""
        parts = self.axis.gather(self.product(final, self.head_weight, None))
        return parts.movedim(0, -2).flatten(-2)[..., : self.whole.vocab_size]

    def read(self, final: Tensor, asked: Asked) -> Readout | None:
        """Each rank answers for its own rows of the vocabulary, and a few numbers of each are gathered."""
        rows, first = self.head_weight.shape[0], self.axis.rank * self.head_weight.shape[0]
        fewest = self.whole.vocab_size - (self.axis.size - 1) * rows
        if asked.best > fewest or (asked.keep is not None and not 0 < 2 * asked.keep.width <= rows):
            return None
        mine = min(rows, self.whole.vocab_size - first)  # padding is no token
        ids = asked.ids
        if asked.keys is not None:
            ids = torch.arange(first, first + mine, device=final.device) if ids is None else ids[first : first + mine]
        found = self._read_own(final, self.head_weight[:mine], asked._replace(ids=ids))
        return None if found is None else merge(found._replace(columns=found.columns + first), self.axis)

    def _read_own(self, final: Tensor, weight: Tensor, asked: Asked) -> Readout | None:
        if asked.keep is not None:
            asked = asked._replace(keep=self._of_all(asked.keep))
        found = self.ask(final, weight, self.product, asked)
        if found is not None or (asked.keys is not None and self.noise is None):
            return found
        logits = self.product(final.flatten(0, -2), weight, None)
        return read_logits(logits, asked, self.noise or _no_noise)

    def _of_all(self, keep: Keep) -> Keep:
        """A filter that hears each rank's own best values and judges by the best of all."""

        def floor(own: Tensor) -> Tensor:
            found = self.axis.gather(own).movedim(0, 1).flatten(1)
            return keep.floor(found.topk(own.shape[1], dim=1).values)

        return Keep(keep.width, floor)

    def table(self, shard: Tensor) -> Tensor:
        """The whole of a table over the vocabulary of which each rank holds a `shard`."""
        return self.axis.gather(shard).flatten(0, 1)[: self.whole.vocab_size]


def _no_noise(keys: Tensor, ids: Tensor) -> Tensor:
    raise AssertionError("greedy questions draw no noise")


def merge(own: Readout, axis: Axis) -> Readout:
    """The answer over all columns from the ranks' answers over theirs, in one collective; all ranks get the same."""
    best, ranked = own.columns.shape[1], own.score_total is not None
    totals = [own.total, own.score_total if own.score_total is not None else own.total, own.finite.float()]
    named = own.columns.to(torch.int32).view(torch.float32)  # bits on their way, not numbers
    packed = torch.cat((named, own.scores, own.logits, torch.stack(totals, 1)), dim=1)
    columns, scores, logits, rest = axis.gather(packed).split_with_sizes((best, best, best, 3), dim=-1)
    columns, scores, logits = (part.movedim(0, 1).flatten(1) for part in (columns, scores, logits))
    places = scores.sort(dim=1, descending=True, stable=True).indices[:, :best]
    total, score_total, finite = rest.unbind(-1)
    return Readout(
        columns=columns.contiguous().view(torch.int32).long().gather(1, places),
        scores=scores.gather(1, places),
        logits=logits.gather(1, places),
        total=total.logsumexp(0),
        score_total=score_total.logsumexp(0) if ranked else None,
        finite=(finite > 0).all(0),
    )


def whole_config(target: Decoder) -> ModelConfig:
    """The config of the target that `target` is, or is a shard of."""
    return target.whole if isinstance(target, ParallelDecoder) else target.config


def whole_table(target: Decoder, shard: Tensor) -> Tensor:
    """[V, H] of a table that `target` holds whole or as a `shard`; a collective where it is a shard."""
    return target.table(shard) if isinstance(target, ParallelDecoder) else shard


class VocabularyEmbedding(nn.Embedding):
    """Rows of an embedding that is divided by tokens: a rank adds zero for the tokens of others."""

    def __init__(self, rows: int, size: int, axis: Axis) -> None:
        super().__init__(rows, size)
        self.axis, self.first = axis, axis.rank * rows

    def forward(self, tokens: Tensor) -> Tensor:
        mine = tokens - self.first
        elsewhere = (mine < 0) | (mine >= self.num_embeddings)
        found = F.embedding(mine.clamp(0, self.num_embeddings - 1), self.weight)
        return self.axis.sum(found.masked_fill(elsewhere[..., None], 0))


def add_up(layers: nn.Module, axis: Axis) -> None:
    """Let every attention and MLP inside end in the sum over the ranks of an axis."""
    if axis.size == 1:
        return
    if isinstance(layers, PARTS):
        layers.register_forward_hook(lambda module, inputs, partial: axis.sum(partial))
        return
    for child in layers.children():
        add_up(child, axis)
