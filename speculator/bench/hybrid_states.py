"""What recurrent states cost and whether they are right: their bytes, the time of a commit, rounds beside decoding.

Owns: these three on one engine. Must never know settings or how figures are shown.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from speculator.bench.round_floor import settle
from speculator.bench.round_forced import DRAWN, Depths, ForcedPasses
from speculator.bench.round_play import WARM, Timer
from speculator.engine import Engine
from speculator.fixed_passes import tokens_of
from speculator.passes import EagerPasses, Verified
from speculator.recurrent import RecurrentRows
from speculator.types import Draft, Feed, SamplingParams, Step
from target.attention.base import bind
from target.batch import Batch, causal_positions
from target.config_hybrid import DeltaNetConfig
from target.deltanet import DeltaInputs, DeltaRows, HybridAttend
from target.model import Hidden
from target.states import Rule, StateCache, StatePass

PROMPT = 16
WAYS = ("token by token", "as served")


def states_of(engine: Engine) -> StateCache:
    """Where the states of a hybrid's rows lie."""
    assert isinstance(engine.recurrent, RecurrentRows)
    return engine.recurrent.cache


# ---- bytes


class Traffic(NamedTuple):
    """Bytes of states and of the rows to replay that one layer moves."""

    pass_reads: int  # committed states
    pass_writes: int  # what a commit replays
    commit_reads: int  # states again, and those rows
    commit_writes: int  # states

    def times(self, layers: int) -> Traffic:
        return Traffic(*(layers * each for each in self))


def traffic(d: DeltaNetConfig, rows: int, queries: int, dtype: torch.dtype) -> Traffic:
    """Of one layer, for `rows` sequences of which `queries` tokens are verified and accepted; from shapes alone."""
    matrices = rows * d.value_heads * d.key_dim * d.value_dim * 4
    past = rows * (d.kernel - 1) * d.channels * dtype.itemsize
    taken = rows * queries * d.channels * dtype.itemsize
    tokens = rows * queries * (d.key_size + d.value_size + 2 * d.value_heads) * 4
    return Traffic(matrices + past, past + taken + tokens, matrices + past + tokens, matrices + past)


def snapshots(d: DeltaNetConfig, rows: int, queries: int) -> int:
    """Bytes that a layer would write if it kept the matrices after every token in place of replaying."""
    return rows * queries * d.value_heads * d.key_dim * d.value_dim * 4


class Metered:
    """A rule that adds up the bytes of what it is given."""

    def __init__(self, rule: Rule) -> None:
        self.rule, self.read_bytes, self.row_bytes, self.moved_bytes = rule, 0, 0, 0

    def rows(self, inputs: DeltaInputs, windows: Tensor, slots: Tensor) -> tuple[Tensor, DeltaRows]:
        return self.rule.rows(inputs, windows, slots)

    def read(
        self, store: Tensor, slots: Tensor, q: Tensor, rows: DeltaRows, counts: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        self.read_bytes += len(slots) * store[0].nbytes
        self.row_bytes += sum(part.nbytes for part in rows)
        return self.rule.read(store, slots, q, rows, counts)

    def replay(self, store: Tensor, slots: Tensor, rows: DeltaRows, counts: Tensor) -> None:
        self.moved_bytes += len(slots) * store[0].nbytes
        self.rule.replay(store, slots, rows, counts)


@torch.inference_mode()
def metered(engine: Engine, batch: Batch, accepted: Tensor) -> Traffic:
    """What all layers together were given in a pass and its commit."""
    states, meter = states_of(engine), Metered(states_of(engine).rule)
    states.rule, before = meter, states.rule
    try:
        run = verify(engine, batch)[1]
        windows = sum(run.slots.numel() * layer[0].nbytes for layer in states.windows)
        rows = meter.row_bytes - sum(_window(engine, batch) for _ in states.windows)
        run.commit(accepted)
    finally:
        states.rule = before
    moved = meter.moved_bytes + windows
    return Traffic(meter.read_bytes + windows, meter.row_bytes, moved + rows, moved)


def _window(engine: Engine, batch: Batch) -> int:
    states = states_of(engine)
    rows, queries = batch.tokens.shape
    return rows * (states.kernel - 1 + queries) * states.windows[0, 0, 0].nbytes


# ---- times


def batch_of(engine: Engine, rows: int, queries: int, context: int) -> Batch:
    """Tokens at random, each row in pages of its own."""
    device, each = engine.device, -(-(context + queries) // engine.info.page_size)
    length = torch.full((rows,), context, device=device)
    return Batch(
        tokens=torch.randint(0, engine.info.vocab_size, (rows, queries), device=device),
        positions=causal_positions(length, queries),
        context=length,
        counts=torch.full((rows,), queries, device=device),
        pages=1 + torch.arange(rows * each, device=device).view(rows, each),
        longest=context + queries,
        static=True,
    )


def verify(engine: Engine, batch: Batch) -> tuple[Verified, StatePass]:
    """A pass over the states of the first rows."""
    assert isinstance(engine.passes, EagerPasses)
    states = StatePass(states_of(engine), torch.arange(1, 1 + len(batch.tokens), device=engine.device))
    return engine.passes.verify(batch, states), states


def said(engine: Engine, batch: Batch) -> tuple[Tensor, DeltaRows | None]:
    """A pass with all that a recording of it gives: logits, and what a commit replays."""
    verified, states = verify(engine, batch)
    return verified.logits, states.kept


@torch.inference_mode()
def pass_seconds(engine: Engine, batch: Batch, repeats: int) -> float:
    """Median seconds of a pass, recorded on a GPU."""
    return Timer(engine.device).median(lambda: said(engine, batch), repeats)


@torch.inference_mode()
def commit_seconds(engine: Engine, batch: Batch, accepted: Tensor, repeats: int) -> tuple[float, float]:
    """Median seconds of a commit: on the device's clock, recorded, and on the host's, as an engine runs it."""
    run = verify(engine, batch)[1]
    kept = run.kept
    assert kept is not None

    def commit() -> None:
        run.adopt(kept)
        run.commit(accepted)

    on_device = Timer(engine.device).median(commit, repeats)
    return on_device, median(_host_seconds(commit, engine.device) for _ in range(WARM + repeats))


def _host_seconds(run: Callable[[], None], device: torch.device) -> float:
    settle(device)
    begin = time.perf_counter()
    run()
    settle(device)
    return time.perf_counter() - begin


# ---- bits


class TokenByToken(EagerPasses):
    """The target one token a pass, as plain decoding has it, but for the recurrence, which takes in the whole draft.

    Products and attention then round alike however many tokens a round verifies. What is left to differ is what a
    commit makes of them.
    """

    def __init__(self, inner: EagerPasses) -> None:
        super().__init__(inner.model, inner.head, inner.attention, inner.head_attention, inner.states)

    def verify(self, batch: Batch, states: StatePass | None = None) -> Verified:
        assert states is not None and len(batch.tokens) == 1
        taken: dict[int, DeltaInputs] = {}
        found = [self._one(one, states, taken) for _, _, one in tokens_of(batch)]
        final = torch.cat([hidden.final for hidden in found], dim=1)
        taps = tuple(torch.cat(parts, dim=1) for parts in zip(*(hidden.taps for hidden in found), strict=True))
        return self.verified(Hidden(final, taps))

    def _one(self, one: Batch, states: StatePass, taken: dict[int, DeltaInputs]) -> Hidden:
        attend = HybridAttend(bind(self.attention, one), partial(_recur_so_far, states, taken))
        return self.target(one.tokens, one.positions, attend)


def _recur_so_far(states: StatePass, taken: dict[int, DeltaInputs], layer: int, inputs: DeltaInputs) -> Tensor:
    """The newest token's result of a pass over all tokens so far."""
    before = taken.get(layer)
    if before is not None:
        mixed, decay, beta = (torch.cat(both, dim=1) for both in zip(before[:3], inputs[:3], strict=True))
        inputs = inputs._replace(mixed=mixed, decay=decay, beta=beta)
    taken[layer] = inputs
    return states.recur(layer, inputs)[:, -1:]


def committed_states(engine: Engine, way: str, rounds: int, depth: int, seed: int = 0) -> dict[str, Any]:
    """Row 0 in rounds that accept at random, row 1 through the same tokens without drafts; states compared each round.

    Ends at the first difference, which it reports.
    """
    draw = torch.Generator().manual_seed(seed)
    with _accepting(engine, way, depth, draw):
        pair = _Pair(engine, draw)
        try:
            for number in range(1, rounds + 1):
                pair.round(depth)
                if differs := pair.difference():
                    return {**pair.told(way, number), "equal": False, "first": differs}
            return {**pair.told(way, rounds), "equal": True}
        finally:
            pair.close()


@contextmanager
def _accepting(engine: Engine, way: str, depth: int, draw: torch.Generator) -> Iterator[None]:
    before, depths = engine.passes, Depths(1, depth, engine.device)
    assert isinstance(before, EagerPasses)
    depths.drawn = torch.randint(0, depth + 1, (DRAWN,), generator=draw).to(engine.device)
    engine.passes = ForcedPasses(TokenByToken(before) if way == WAYS[0] else before, depths)
    try:
        yield
    finally:
        engine.passes = before


class _Pair:
    """Two rows that began with one prompt."""

    def __init__(self, engine: Engine, draw: torch.Generator) -> None:
        self.engine, self.draw, self.tokens = engine, draw, 0
        each = (engine.info.total_pages - 1) // engine.info.max_rows
        self.pages = [list(range(1 + row * each, 1 + (row + 1) * each)) for row in (0, 1)]
        *prompt, self.root = self._random(PROMPT + 1)
        self.cached, self.accepted = PROMPT, [0] * 64
        for row in (0, 1):
            engine.open(row, SamplingParams(), False)
            engine.step([Step(row, 0, self.pages[row], Feed(prompt, self.root))])

    def close(self) -> None:
        for row in (0, 1):
            self.engine.close(row)

    def _random(self, count: int) -> list[int]:
        return torch.randint(0, self.engine.info.vocab_size, (count,), generator=self.draw).tolist()

    def round(self, depth: int) -> None:
        draft = Draft(tuple(self._random(depth)), tuple(range(-1, depth - 1)))
        (result,) = self.engine.step([Step(0, self.cached, self.pages[0], root=self.root, draft=draft)])
        for i, root in enumerate([self.root, *result.tokens[:-1]]):
            self.engine.step([Step(1, self.cached + i, self.pages[1], root=root, draft=Draft())])
        self.accepted[len(result.tokens) - 1] += 1
        self.cached, self.root = self.cached + len(result.tokens), result.tokens[-1]
        self.tokens += len(result.tokens)

    def difference(self) -> str:
        """Where the states of the two rows differ, "" where they are the same bits."""
        states = states_of(self.engine)
        for name, store in (("matrices", states.matrices), ("windows", states.windows)):
            if not torch.equal(store[:, 1], store[:, 2]):
                apart = (store[:, 1].float() - store[:, 2].float()).abs().flatten(1).amax(1)
                layer = int((apart > 0).int().argmax())
                return f"{name} of recurrent layer {layer} by up to {float(apart[layer]):.3g}"
        return ""

    def told(self, way: str, rounds: int) -> dict[str, Any]:
        counts = list(self.accepted)
        while counts and not counts[-1]:
            counts.pop()
        return {"way": way, "rounds": rounds, "tokens": self.tokens, "accepted": counts}
