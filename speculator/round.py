"""Whole rounds as graphs: verify, accept, keep, catch up and draft without the host in between.

Owns: which steps are such rounds, the body that is recorded, and how a batch gets in and out. Must never know sessions
or transports. The passes run one by one are the fallback and the oracle; the body is made of the same parts.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from graphs.graph import Counts, Graph
from graphs.recorder import Recorder
from graphs.round import Plans, RoundGraphManager
from graphs.shape import GraphShape, Ladder, Variant, row_ladder
from graphs.state import AttentionState
from speculator.drafting import Drafted
from speculator.lookback import Lookback
from speculator.passes import EagerPasses
from speculator.recorded import CHAIN, MOST_TOKENS, TREE, Sizes, ticks
from speculator.round_glue import Glue, Kind, Memory, TorchGlue
from speculator.round_result import Flight, Outcome
from speculator.round_state import EVERY, MODES, RoundState
from speculator.rows import Rows
from speculator.sampling import pinned
from speculator.types import DraftShape, Rule, SamplingParams, Step
from target.cache import PagedCache
from target.fused import fused_on

Progress = Callable[[str, int, int], None]  # which pass, shapes done, shapes in all
PLAIN = ("plain",)  # the target alone, one token a round
NOTHING = DraftShape(0)


class Rounds:
    """Recorded rounds over the rows of an engine. `capture` before serving; until then every round is refused.

    Recorded are rounds that verify the draft which the engine itself holds (or none) under the coupled rule, or under
    every rule where `sizes` says so, and draft the shape of `sizes`; where that is a chain, chains of `depths` too, and
    any shorter chain is the beginning of a recorded one. Beside trees, depth 0 alone: the head catches up and drafts
    nothing. `rung` records one row count, 0 the largest, to see what memory that takes, with the `state` of another
    one where that exists. What lies between passes runs on kernels where layers do.
    """

    def __init__(
        self,
        eager: EagerPasses,
        recorder: Recorder,
        sizes: Sizes,
        cache: PagedCache,
        rows: Rows,
        lookback: Lookback | None = None,
        depths: Sequence[int] = (0,),
        rung: int | None = None,
        state: RoundState | None = None,
    ) -> None:
        self.eager, self.sizes, self.cache, self.rows, self.lookback = eager, sizes, cache, rows, lookback
        self.device, self.shape = rows.device, sizes.shape if eager.head else NOTHING
        self.fused = fused_on(rows.device)
        self._rest = [depth for depth in depths if depth == 0]  # chains beside trees
        self.modes = MODES if sizes.every_rule else MODES[: MODES.index(EVERY)]
        self.state = state or self._state()
        if sizes.every_rule:
            rows.watch()
        self.manager = RoundGraphManager(
            recorder,
            self._ladder(depths, rung),
            self._body,
            self._padding,
            self.memory,
            shared=(eager.attention, eager.head_attention),
        )
        self.capture_seconds = 0.0

    def _state(self) -> RoundState:
        rows, every, drawn = self.rows, self.sizes.every_rule, self.shape.is_chain and self.shape.depth
        vocab = rows.vocab if drawn else 0
        return RoundState(rows.count, _nodes(self.shape), self.sizes.pages, rows.device, every, vocab)

    def _ladder(self, depths: Sequence[int], rung: int | None) -> Ladder:
        """Every row count in every mode, for the target alone and, with a head, for each draft."""
        kinds: set[tuple[int, Variant]] = {(1, PLAIN)}
        if self.eager.head is not None:
            kinds.add((1 + _nodes(self.shape), _kind(self.shape)))
            shorter = depths if self.shape.is_chain else self._rest
            kinds |= {(1 + depth, CHAIN) for depth in shorter if depth < self.shape.depth}
        shapes = []
        for queries, kind in kinds:
            rows = row_ladder(max(1, min(self.sizes.rows, MOST_TOKENS // queries)))
            picked = rows if rung is None else rows[::-1][rung : rung + 1]
            shapes += [GraphShape(r, queries, (*kind, mode)) for r in picked for mode in self.modes]
        return Ladder(shapes)

    def _padding(self, shape: GraphShape) -> dict[str, Tensor]:
        return {"orders": torch.tensor([self._nobody] * shape.rows, device=self.device)}

    @property
    def _nobody(self) -> tuple[int, ...]:
        return self.state.spare, -1, 0, 0

    @torch.inference_mode()
    def capture(self, progress: Progress | None = None) -> None:
        """Warm up and record every shape; CaptureError says which failed and why."""
        begin = time.perf_counter()
        self.manager.warm_up(ticks("round", progress, "warm-up"))
        self.manager.capture(ticks("round", progress))
        self.capture_seconds = round(time.perf_counter() - begin, 2)
        self.manager.serve()

    @property
    def counts(self) -> Counts:
        """Replayed rounds, and those that ran pass by pass by their reason."""
        return self.manager.counts

    @torch.inference_mode()
    def twin(self, graph: Graph) -> Tensor:
        """What a replay gives: the same round run eager over the same orders and the same memory, planned anew."""
        return self._body(graph.state.fresh())

    def memory(self) -> Mapping[str, Tensor]:
        """All that lies outside a round's graph and that it reads and writes, by name."""
        kept = {"cached": self.rows.cached, "root": self.rows.root, "output": self.rows.output, **self.state.memory}
        kept |= {f"cache {i}": group for i, group in enumerate(self.cache.groups)}
        if self.sizes.every_rule:
            kept["seen"] = self.rows.watch()
        back = self.lookback
        if back is None:
            return kept
        return kept | {"features": back.features, "following": back.following, "end": back.end, "held": back.held}

    def tally(self) -> dict[str, tuple[int, int]]:
        """Replayed and passed-by rounds by name, as `Passes.tally`."""
        return {self.manager.name: (self.counts.replayed, self.counts.eager.total())}

    def close(self) -> None:
        self.manager.close()

    # what is recorded

    def _body(self, state: AttentionState) -> Tensor:
        """One round of the rows that the orders name: [R, W] int64, see `Layout`."""
        kind = self._kind_of(state.shape)
        passes, glue = self._passes(state), self._glue(kind)
        glue.judge(passes.verify(glue.begin(state.buffers["orders"])))
        if not kind.plain:
            glue.catch_up(passes)
            if kind.drafted.depth:
                glue.draft(passes)
        return glue.result()

    def _glue(self, kind: Kind) -> Glue:
        """What lies between the passes of a round."""
        memory = Memory(self.state, self.rows, self.cache, self.lookback, self.sizes.capacity)
        if not self.fused:
            return TorchGlue(memory, kind)
        from speculator.round_fused import fused_glue

        return fused_glue(memory, kind)

    def _passes(self, state: AttentionState) -> EagerPasses:
        """The passes as they are, with plans that the state knows."""
        plans: Plans = state.plan
        passes = copy.copy(self.eager)
        passes.attention = plans.noting(self.eager.attention)
        passes.head_attention = plans.noting(self.eager.head_attention)
        return passes

    def _kind_of(self, shape: GraphShape) -> Kind:
        drafted = self.shape if _is(TREE, shape) else DraftShape(shape.query_len - 1)
        return Kind(shape.query_len, str(shape.variant[-1]), drafted, _is(PLAIN, shape))

    # which steps are such rounds

    def launch(self, steps: Sequence[Step], number: Callable[[], int]) -> Flight | None:
        """Replay the rounds among `steps`, if one graph takes them all; None, counted, if they must run pass by pass.

        `number` gives the ids of the drafts that are made. Nothing waits for the device.
        """
        picked = [i for i, step in enumerate(steps) if step.draft is not None]
        if not picked:
            return None
        chosen = [steps[i] for i in picked]
        graph = self._graph(chosen, len(chosen) == len(steps))
        if graph is None:
            return None
        rows = [s.row for s in chosen]
        self.state.cover(rows, [s.pages for s in chosen])
        self.state.bound(rows, [s.bounds for s in chosen])
        wants = [self._want(s) for s in chosen]
        orders = [self._order(step) for step in chosen]
        orders += [self._nobody] * (graph.shape.rows - len(orders))
        graph.state.refresh({"orders": pinned(torch.tensor(orders), self.device)})
        result: Tensor = graph.replay()
        ids = [self._number(s.row, want, number) for s, want in zip(chosen, wants, strict=True)]
        return Flight(self._kind_of(graph.shape).layout, result, Outcome(picked, rows, wants, ids))

    def takes(self, steps: Sequence[Step]) -> bool:
        """Whether `launch` would take every one of `steps`; counts nothing."""
        whole = all(step.draft is not None and self._unfit(step) is None for step in steps)
        return whole and self.manager.holds(*self._needed(steps))

    def landed(self, outcome: Outcome) -> None:
        """The results of a round count: its drafts are what the rows hold."""
        for row, want, made in zip(outcome.rows, outcome.wants, outcome.ids, strict=True):
            if want:
                self.rows.keep_q(row, made, self.state.own_q(row, want))

    def _graph(self, chosen: Sequence[Step], whole: bool) -> Graph | None:
        reason = next((why for why in map(self._unfit, chosen) if why), None)
        if reason is None and not whole and MODES[self.state.mode([s.row for s in chosen])] == EVERY:
            reason = "a round that could not be taken back where the rest of its step fails"
        if reason is not None:
            self.manager.refuse(reason)
            return None
        return self.manager.pick(*self._needed(chosen))

    def _needed(self, chosen: Sequence[Step]) -> tuple[int, int, Variant]:
        """Rows, queries and variant that a graph for these steps must hold."""
        rows = [s.row for s in chosen]
        mode = MODES[self.state.mode(rows)]
        nodes = max(max(self._want(s), self._have(s)) for s in chosen)
        speculating = any(self.rows.speculate[row] for row in rows)
        kind = CHAIN if self._rest and not nodes else _kind(self.shape)
        return len(rows), 1 + nodes, (*(kind if speculating else PLAIN), mode)

    def _unfit(self, step: Step) -> str | None:
        """Why a step cannot be a recorded round."""
        params, draft = self.rows.params[step.row], step.draft
        assert draft is not None
        if step.feed is not None:
            return "tokens to feed first"
        if self.eager.states is not None:
            return "the target has recurrent layers"
        rule = self.state.rule(step.row)
        every = self.sizes.every_rule and (rule is not Rule.BLOCK or self.shape.is_chain)
        if rule is not Rule.COUPLED and not every:
            return f"rule {rule.value}"
        if params.repetition_penalty != 1.0 and not every:
            return "a repetition penalty"
        if not self._drafts(step.propose or NOTHING):
            return "another draft shape"
        if step.ahead:
            if self.modes[self.state.mode([step.row])] == EVERY:
                return "a round ahead that could not be taken back"
            known = self.state.left(step.row) is not None and self.state.bounded(step.row)
            return None if known else "a round ahead of none"
        held = not draft.tokens or self.state.holds(step.row, draft.draft_id)
        return None if held else "a draft that the device does not hold"

    def _drafts(self, shape: DraftShape) -> bool:
        """Whether the recorded draft contains one of this shape."""
        if not shape.depth:
            return True
        chains = shape.is_chain and self.shape.is_chain
        return shape.depth <= self.shape.depth if chains else shape == self.shape

    def _want(self, step: Step) -> int:
        """Nodes of the next draft that the caller asked for."""
        shape = step.propose
        if shape is None or not shape.depth or not self.rows.speculate[step.row]:
            return 0
        return _nodes(shape)

    def _have(self, step: Step) -> int:
        """Nodes of the draft to verify."""
        if step.ahead:
            return self.state.left(step.row) or 0
        return len(step.draft.tokens) if step.draft else 0

    def _order(self, step: Step) -> tuple[int, ...]:
        """The device's own length and last token are taken where a round wrote both, else the caller's."""
        assert step.draft is not None
        own = step.ahead or self.state.made(step.row, step.draft.draft_id)
        return step.row, self._have(step), *((-1, -1) if own else (step.cached, step.root))

    def _number(self, row: int, want: int, number: Callable[[], int]) -> int:
        self.state.forget(row)
        self.state.leave(row, want)
        if not want:
            return 0
        made = number()
        self.state.number(row, made, made=True)
        return made

    # what the passes run one by one leave for the next round

    def open(self, row: int, params: SamplingParams) -> None:
        self.state.open(row, params)

    def forget(self, row: int) -> None:
        """The row goes on without a recorded round: its held draft is no longer the next one."""
        self.state.forget(row)

    def hold(self, index: Sequence[int], rows: Tensor, shape: DraftShape, drafted: Drafted) -> None:
        """Keep drafts of rows `index` that were made pass by pass, so that the next round can be a recorded one."""
        if self.eager.head is None or not self._drafts(shape) or (drafted.q is not None and not self.sizes.every_rule):
            return
        self.state.hold(rows, drafted)
        for row, made in zip(index, drafted.ids, strict=True):
            self.state.number(row, made, made=False)


def trial_rounds(
    eager: EagerPasses,
    recorder: Recorder,
    sizes: Sizes,
    cache: PagedCache,
    sessions: int,
    depths: Sequence[int],
    rung: int,
    before: Rounds | None = None,
) -> Rounds:
    """The rounds of one row count over rows of their own, or those of a trial before, to see what memory they take."""
    if before is not None:
        return Rounds(eager, recorder, sizes, cache, before.rows, before.lookback, depths, rung, before.state)
    head = eager.head
    device, dtype, back = cache.layers[0].device, cache.layers[0].dtype, head.lookback if head else 0
    width, vocab = head.record.hidden_size if head else 1, eager.model.config.vocab_size
    rows = Rows(sessions + 1, width, vocab, dtype, device, 1 + back)
    feature = head.record.feature_size if head else 0
    lookback = Lookback(sessions + 1, back, feature, dtype, device) if back else None
    return Rounds(eager, recorder, sizes, cache, rows, lookback, depths, rung)


def _nodes(shape: DraftShape) -> int:
    return shape.depth if shape.is_chain else shape.nodes


def _is(kind: Variant, shape: GraphShape) -> bool:
    return shape.variant[:1] == kind


def _kind(shape: DraftShape) -> Variant:
    return CHAIN if shape.is_chain else (*TREE, shape.nodes, shape.branching, shape.depth)
