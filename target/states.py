"""States of recurrent layers: one slot a sequence beside the paged cache, read by a pass and moved on by a commit.

Owns: the storage, and that a rejected token never reaches it. Must never know who holds a slot or why.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from target.attention.base import Attention, Plan, bind
from target.attention.choose import OVERRIDE
from target.batch import Batch
from target.deltanet import DeltaInputs, DeltaRows, HybridAttend, delta_rows, delta_rule, replay, window_after
from target.errors import PlanError
from target.products import kernels_need


class StateShape(NamedTuple):
    """What one recurrent layer keeps per sequence: inputs of its convolution, and matrices in float32."""

    kernel: int  # of the convolution, which keeps kernel - 1 inputs
    channels: int
    heads: int
    key_dim: int
    value_dim: int

    def bytes(self, dtype: torch.dtype) -> int:
        """Of one sequence; `dtype` is the model's."""
        return (self.kernel - 1) * self.channels * dtype.itemsize + self.heads * self.key_dim * self.value_dim * 4


class Rule(Protocol):
    """The recurrence over slots [R] int64 of one layer's matrices [slots, heads, key_dim, value_dim]."""

    def read(
        self, store: Tensor, slots: Tensor, q: Tensor, rows: DeltaRows, counts: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Results [R, T, heads, value_dim]; with `counts` [R], also the matrices [R, ...] after so many tokens."""

    def replay(self, store: Tensor, slots: Tensor, rows: DeltaRows, counts: Tensor) -> None:
        """Move the slots on by the first `counts` [R] tokens, in the operations of `read`."""


class TorchRule:
    """Token by token in torch: the oracle."""

    def read(
        self, store: Tensor, slots: Tensor, q: Tensor, rows: DeltaRows, counts: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        out, end = delta_rule(store.index_select(0, slots), q, rows, counts)
        return out, None if counts is None else end

    def replay(self, store: Tensor, slots: Tensor, rows: DeltaRows, counts: Tensor) -> None:
        store.index_copy_(0, slots, replay(store.index_select(0, slots), rows, counts))


def rule_for(device: torch.device) -> Rule:
    """The kernel where it can run, unless the environment variable SPECULATOR_ATTENTION says torch."""
    if kernels_need(device) or os.environ.get(OVERRIDE) == "torch":
        return TorchRule()
    from target.kernels.deltanet import TritonRule

    return TritonRule()


class StateCache:
    """Committed states of `slots` sequences, layer by layer; slot 0 is the null slot and stays zero.

    Only `clear` and the commit of a StatePass write. A slot belongs to one row of a pass at a time.
    """

    def __init__(
        self, layers: Sequence[StateShape], slots: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        if slots < 2:
            raise PlanError(f"states need 2 slots or more, the null slot among them, got {slots}")
        if len(set(layers)) != 1:
            raise PlanError(f"recurrent layers must have one shape, got {sorted(set(layers)) or 'none'}")
        shape, self.slots = layers[0], slots
        self.kernel, count = shape.kernel, len(layers)
        self.windows = torch.zeros(count, slots, shape.kernel - 1, shape.channels, dtype=dtype, device=device)
        sizes = (count, slots, shape.heads, shape.key_dim, shape.value_dim)
        self.matrices = torch.zeros(sizes, dtype=torch.float32, device=device)
        self.rule = rule_for(self.matrices.device)

    @property
    def bytes(self) -> int:
        return self.windows.nbytes + self.matrices.nbytes

    def clear(self, slots: Tensor) -> None:
        """Make slots [N] int64 those of sequences that have not begun."""
        self.windows.index_fill_(1, slots, 0)
        self.matrices.index_fill_(1, slots, 0)

    def copy(self, source: Tensor, destination: Tensor) -> None:
        """Copy slots [N] int64 to others; all are read before any is written."""
        for store in (self.windows, self.matrices):
            store.index_copy_(1, destination, store.index_select(1, source))


class _Kept(NamedTuple):
    """What a pass leaves of one layer: the rows to replay, or where they end."""

    window: Tensor
    rows: DeltaRows | None
    end: Tensor | None


class StatePass:
    """One pass of R rows over the committed states of `slots` [R] int64, which it reads and does not write.

    `recur` is what recurrent layers call, layer by layer. Then comes one `commit`:
    - of a pass that verifies drafts (`counts` None), with how many tokens of each row were accepted. What the layers
      took in is kept, and its accepted prefix is replayed from the committed state in the operations of decoding, so
      that the committed state is the one of plain decoding bit for bit, given the same inputs (ReplaySSM's way);
    - of a pass that rejects nothing, a prompt's or a plain decoding step, whose `counts` [R] valid tokens are known
      before it runs: only the states after them are kept, and `commit()` writes them.
    A row with count 0 keeps its state; padded rows have the null slot and count 0. Nothing is read on the host, so
    pass and commit can be recorded, together or apart: `kept` names what a recording must hold on to between them.
    """

    def __init__(self, states: StateCache, slots: Tensor, counts: Tensor | None = None) -> None:
        self.states, self.slots, self.counts = states, slots, counts
        self._kept: dict[int, _Kept] = {}

    @property
    def kept(self) -> list[tuple[Tensor | None, ...]]:
        return [(k.window, *(k.rows or ()), k.end) for k in self._kept.values()]

    def recur(self, layer: int, inputs: DeltaInputs) -> Tensor:
        """[R, T, value_heads, value_dim] float32; see DeltaInputs."""
        states = self.states
        q, rows = delta_rows(inputs, states.windows[layer].index_select(0, self.slots))
        out, end = states.rule.read(states.matrices[layer], self.slots, q, rows, self.counts)
        self._kept[layer] = _Kept(rows.window, rows if end is None else None, end)
        return out

    def adopt(self, kept: Sequence[tuple[Tensor | None, ...]]) -> None:
        """What a recorded pass over these slots kept, in place of running it: R rows or more of a pass's `kept`."""
        rows = len(self.slots)
        for layer, parts in enumerate(kept):
            window, *held, end = (None if part is None else part[:rows] for part in parts)
            assert window is not None
            self._kept[layer] = _Kept(window, DeltaRows(*held) if held else None, end)  # type: ignore[arg-type]

    def commit(self, accepted: Tensor | None = None) -> None:
        """Move the states on by `accepted` [R] int64 tokens of each row, or by the counts given at the start."""
        counts = self._agreed(accepted)
        for layer, kept in self._kept.items():
            windows, matrices = self.states.windows[layer], self.states.matrices[layer]
            if kept.end is not None:
                matrices.index_copy_(0, self.slots, kept.end)
            elif kept.rows is not None:
                self.states.rule.replay(matrices, self.slots, kept.rows, counts)
            windows.index_copy_(0, self.slots, window_after(kept.window, counts, self.states.kernel))
        self._kept.clear()

    def _agreed(self, accepted: Tensor | None) -> Tensor:
        if len(self._kept) != len(self.states.matrices):
            text = f"{len(self._kept)} of {len(self.states.matrices)} recurrent layers ran since the last commit"
            raise PlanError(f"a pass over states commits once, after it has run: {text}")
        counts = self.counts if accepted is None else accepted
        if counts is None:
            raise PlanError("a pass that verifies drafts commits what was accepted: commit(accepted)")
        if accepted is not None and self.counts is not None:
            raise PlanError("this pass keeps the states after the counts it was made with: commit()")
        return counts


def bind_hybrid(attention: Attention[Plan], batch: Batch, states: StatePass) -> HybridAttend:
    """Plan a pass of a hybrid; PlanError for what a state cannot do."""
    if batch.ancestors is not None:
        text = "a recurrent state holds one past, and every branch of a tree would need a state of its own"
        raise PlanError(f"a hybrid target verifies chains, not trees: {text}")
    if batch.offset:
        raise PlanError("a pass of a hybrid target begins where its committed states end, so its offset is 0")
    if len(states.slots) != len(batch.tokens):
        raise PlanError(f"{len(batch.tokens)} rows need as many state slots, got {len(states.slots)}")
    return HybridAttend(bind(attention, batch), states.recur)
