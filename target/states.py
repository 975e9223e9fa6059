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
from target.pdl import pdl_on
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

    def rows(self, inputs: DeltaInputs, windows: Tensor, slots: Tensor) -> tuple[Tensor, DeltaRows]:
        """`delta_rows` after the inputs that windows [slots, kernel - 1, channels] hold."""

    def read(
        self, store: Tensor, slots: Tensor, q: Tensor, rows: DeltaRows, counts: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Results [R, T, heads, value_dim]; with `counts` [R], also the matrices [R, ...] after so many tokens."""

    def replay(self, store: Tensor, slots: Tensor, rows: DeltaRows, counts: Tensor) -> None:
        """Move the slots on by the first `counts` [R] tokens, in the operations of `read`."""


class TorchRule:
    """Token by token in torch: the oracle."""

    def rows(self, inputs: DeltaInputs, windows: Tensor, slots: Tensor) -> tuple[Tensor, DeltaRows]:
        return delta_rows(inputs, windows.index_select(0, slots))

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

    return TritonRule(pdl_on(device))


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

    def advance(self, slots: Tensor, kept: DeltaRows, counts: Tensor) -> None:
        """Replay the first `counts` [R] tokens of `kept`, parts [layers, R, ...], in slots [R] of all layers at once.

        One launch for all of them: a commit is not recorded, and a launch for each would take longer than its work.
        """
        layers = torch.arange(len(self.matrices), device=slots.device)
        places, counts = (layers[:, None] * self.slots + slots).flatten(), counts.repeat(len(layers))
        rows = DeltaRows(*(part.flatten(0, 1) for part in kept))
        self.rule.replay(self.matrices.flatten(0, 1), places, rows, counts)
        self.windows.flatten(0, 1).index_copy_(0, places, window_after(rows.window, counts, self.kernel))

    def copy(self, source: Tensor, destination: Tensor) -> None:
        """Copy slots [N] int64 to others; all are read before any is written."""
        for store in (self.windows, self.matrices):
            store.index_copy_(1, destination, store.index_select(1, source))


class StatePass:
    """One pass of R rows over the committed states of `slots` [R] int64, which it reads and does not write.

    `recur` is what recurrent layers call, layer by layer. Then comes one `commit`:
    - of a pass that verifies drafts (`counts` None), with how many tokens of each row were accepted. What the layers
      took in is kept, and its accepted prefix is replayed from the committed state in the operations of decoding, so
      that the committed state is the one of plain decoding bit for bit, given the same inputs (ReplaySSM's way);
    - of a pass that rejects nothing, a prompt's or a plain decoding step, whose `counts` [R] valid tokens are known
      before it runs: only the states after them are kept, and `commit()` writes them.
    A row with count 0 keeps its state; padded rows have the null slot and count 0. Nothing is read on the host, so
    pass and commit can be recorded, together or apart: `kept` is what a recording must hold on to between them.
    """

    def __init__(self, states: StateCache, slots: Tensor, counts: Tensor | None = None) -> None:
        self.states, self.slots, self.counts = states, slots, counts
        self._rows: dict[int, DeltaRows] = {}  # to replay
        self._ends: dict[int, tuple[Tensor, Tensor]] = {}  # window and matrices after the counts
        self._whole: DeltaRows | None = None

    @property
    def kept(self) -> DeltaRows | None:
        """What a pass that verifies drafts kept of all its layers, each part [layers, R, ...]; None of any other.

        Put together when it is first asked for, which ends the pass.
        """
        if self._rows:
            self._whole = DeltaRows(*(torch.stack(part) for part in zip(*self._rows.values(), strict=True)))
            self._rows = {}
        return self._whole

    def recur(self, layer: int, inputs: DeltaInputs) -> Tensor:
        """[R, T, value_heads, value_dim] float32; see DeltaInputs."""
        states = self.states
        q, rows = states.rule.rows(inputs, states.windows[layer], self.slots)
        out, end = states.rule.read(states.matrices[layer], self.slots, q, rows, self.counts)
        if end is None or self.counts is None:
            self._rows[layer] = rows
        else:
            self._ends[layer] = window_after(rows.window, self.counts, states.kernel), end
        return out

    def adopt(self, kept: DeltaRows) -> None:
        """What a recorded pass over these slots kept, in place of running it: R rows or more of a pass's `kept`."""
        self._whole = DeltaRows(*(part[:, : len(self.slots)] for part in kept))

    def commit(self, accepted: Tensor | None = None) -> None:
        """Move the states on by `accepted` [R] int64 tokens of each row, or by the counts given at the start."""
        counts = self._agreed(accepted)
        if (kept := self.kept) is not None:
            self.states.advance(self.slots, kept, counts)
        for layer, (window, end) in self._ends.items():
            self.states.windows[layer].index_copy_(0, self.slots, window)
            self.states.matrices[layer].index_copy_(0, self.slots, end)
        self._rows, self._ends, self._whole = {}, {}, None

    def _agreed(self, accepted: Tensor | None) -> Tensor:
        ran = len(self._rows or self._ends if self._whole is None else self._whole.k)
        layers = len(self.states.matrices)
        if ran != layers:
            text = f"{ran} of {layers} recurrent layers ran since the last commit"
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
