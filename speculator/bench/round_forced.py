"""Acceptance forced to a mean: the target's logits are bent so that drafts are accepted as deep as was drawn.

Owns: how deep each round accepts, and the bending. Must never be used where text matters: what comes out is noise, and
whoever prints a figure of it says that it is synthetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from speculator.passes import EagerPasses, Passes, Relay, Verified
from target.batch import Batch
from target.readout import Asked, Readout
from target.states import StatePass

SURE = 3e4  # a logit that every float type holds and nothing else reaches
DRAWN = 1024  # depths that are drawn ahead and used in turns
GOLDEN = 0.6180339887498949  # what spreads points evenly, however many
STRIDE = 37  # between the draws of two rows
MOST_ROWS = 4096  # of a batch


def conditional(mean: float, depth: int) -> float:
    """The conditional acceptance, alike at every level, at which drafts of `depth` commit `mean` tokens a round.

    ValueError unless `mean` lies between 1 and depth + 1.
    """
    if not 1 <= mean <= depth + 1:
        raise ValueError(f"drafts of depth {depth} commit 1 to {depth + 1} tokens a round, not {mean:g}")
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**level for level in range(depth + 1)) < mean else (low, middle)
    return high


class Depths:
    """How many levels each round of each row accepts, as a list on the device that rounds walk through."""

    def __init__(self, mean: float, depth: int, device: torch.device) -> None:
        survival = conditional(mean, depth) ** torch.arange(1, depth + 1, dtype=torch.float64)
        points = (torch.arange(DRAWN, dtype=torch.float64) * GOLDEN + 0.5) % 1  # every few of them are spread evenly
        self.drawn = (points[:, None] < survival).sum(1).to(device)
        self.turns = STRIDE * torch.arange(MOST_ROWS, device=device)

    def restart(self) -> None:
        """From the first draw again, so that two ways of running are asked the same."""
        self.turns.copy_(STRIDE * torch.arange(MOST_ROWS))

    def next(self, rows: int) -> Tensor:
        """[R] int64; every call takes the next ones, in a recorded pass too."""
        self.turns.add_(1).remainder_(DRAWN)
        return self.drawn.index_select(0, self.turns[:rows])


def bend(verified: Verified, batch: Batch, levels: Tensor) -> Verified:
    """Answers under which row r accepts the first `levels[r]` nodes on the way to its deepest one, and no other."""
    drafted = batch.tokens[:, 1:]

    def logits() -> Tensor:
        below, wanted = _wanted(batch, levels)
        value = torch.where(wanted, SURE, -SURE).to(verified.logits.dtype)
        rows = torch.arange(len(drafted), device=drafted.device)[:, None].expand_as(value)
        verified.logits[rows, below, drafted] = value
        return verified.logits

    def read(asked: Asked) -> Readout | None:
        found = verified.read(asked)
        if found is None:
            return None
        if batch.ancestors is None:
            return found._replace(columns=_bent_chain(found.columns, batch.tokens, levels))
        return found._replace(columns=_bent(found.columns, batch.tokens, *_wanted(batch, levels)))

    return Verified(verified.features, logits, read)


def _wanted(batch: Batch, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Of drafted nodes [R, T - 1] their parents, and whether they are to be accepted."""
    parents, depths, way = _tree(batch)
    return parents[:, 1:], (way & (depths <= levels[:, None]))[:, 1:]


def _bent_chain(columns: Tensor, tokens: Tensor, levels: Tensor) -> Tensor:
    """`_bent` of chains in few operations, since they are on the clock: a refused token gives way to its neighbour."""
    drafted, steps = tokens[:, 1:], torch.arange(tokens.shape[1] - 1, device=tokens.device)
    bent = columns.view_as(tokens)
    bent[:, :-1] = torch.where(steps < levels[:, None], drafted, (drafted - 1).abs())
    return columns


def _bent(columns: Tensor, tokens: Tensor, below: Tensor, wanted: Tensor) -> Tensor:
    """The target's tokens [R * T, 1] after nodes [R, T], if it draws `wanted` [R, T - 1] drafts and no other."""
    ids = torch.arange(tokens.shape[1] + 1, device=tokens.device)
    nobodys = (ids[:, None] != tokens[:, None, :]).all(-1).long().argmax(1, keepdim=True)
    own = columns.view_as(tokens)
    own = torch.where((own[..., None] == tokens[:, None, :]).any(-1), nobodys, own)
    nowhere = tokens.shape[1]
    spare = torch.nn.functional.pad(own, (0, 1))
    return spare.scatter(1, torch.where(wanted, below, nowhere), tokens[:, 1:])[:, :-1].reshape(-1, 1)


def _tree(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Parents [R, T], levels [R, T], and which nodes lie on the way to each row's deepest node [R, T] bool."""
    nodes = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
    valid = nodes < batch.counts[:, None]
    if batch.ancestors is None:
        return (nodes - 1).clamp(min=0).expand_as(valid), nodes.expand_as(valid), valid
    depths = batch.positions - batch.context[:, None]
    above = ((batch.ancestors[..., None] >> nodes) & 1).bool() & (nodes != nodes[:, None])
    deepest = torch.where(valid, depths, -1).argmax(1)
    mask = batch.ancestors.gather(1, deepest[:, None])
    way = ((mask >> nodes) & 1).bool() & valid
    return torch.where(above, nodes, 0).amax(-1), depths, way


class ForcedEager(EagerPasses):
    """Eager passes whose verification is bent; a recorded round takes the bending with it."""

    def __init__(self, inner: EagerPasses, depths: Depths) -> None:
        super().__init__(inner.model, inner.head, inner.attention, inner.head_attention, inner.states)
        self.depths = depths

    def verify(self, batch: Batch, states: StatePass | None = None) -> Verified:
        found = super().verify(batch, states)
        return bend(found, batch, self.depths.next(len(batch.tokens))) if batch.tokens.shape[1] > 1 else found


class ForcedPasses(Relay):
    """Any passes, with their verification bent afterwards."""

    def __init__(self, inner: Passes, depths: Depths) -> None:
        super().__init__(inner)
        self.depths = depths

    def verify(self, batch: Batch, *states: StatePass | None) -> Verified:
        found = super().verify(batch, *states)
        return bend(found, batch, self.depths.next(len(batch.tokens))) if batch.tokens.shape[1] > 1 else found
