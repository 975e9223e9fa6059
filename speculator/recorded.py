"""The passes of a step as recorded graphs: replayed where a shape was captured, eager where not.

Owns: which shapes are recorded, what a recorded pass reads, and how a batch is put into it. Must never know sessions,
rules or verdicts. Eager passes are the fallback and the oracle.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphs.draft_decode import DraftDecodeGraphManager, depth_of
from graphs.graph import Counts, Graph
from graphs.lifecycle import Lifecycle
from graphs.piecewise import PiecewiseGraph, PiecewiseManager, in_rows
from graphs.prefill_eagle import PrefillEagleGraphManager
from graphs.recorder import Recorder
from graphs.shape import GraphShape, Ladder, Variant, row_ladder, token_ladder
from graphs.state import AttentionState
from graphs.target_verify import TargetVerifyGraphManager
from speculator import drafting
from speculator.drafting import Drafted, Growing, Start
from speculator.heads.base import DraftHead
from speculator.lookback import gather_rows
from speculator.passes import EagerPasses, Fed, Verified
from speculator.sampling import RowSampling
from speculator.types import DraftShape, Extent
from target.attention.base import bind
from target.batch import Batch
from target.deltanet import DeltaRows, HybridAttend
from target.model import Hidden
from target.states import StatePass

Progress = Callable[[str, int, int], None]  # which pass, shapes done, shapes in all
Buffers = Mapping[str, Tensor]
Kept = DeltaRows | tuple[()]  # of a StatePass

log = logging.getLogger(__name__)

NO_STATES = "a target with recurrent layers cannot be warmed up before its states exist"
CHAIN, TREE = ("chain",), ("tree",)
MOST_TOKENS = 1024  # rows times queries of a recorded pass: above it a pass is bound by arithmetic, not by launches


class Sizes(NamedTuple):
    """What the recorded shapes follow from."""

    rows: int  # largest batch of rounds
    pages: int  # width of a page table
    page_size: int
    shape: DraftShape  # the draft that is recorded
    prompt_tokens: int = 0  # largest prompt chunk recorded, over all its rows; 0 runs prompts eager
    every_rule: bool = False  # whether whole rounds under any rule, and with a repetition penalty, are recorded too

    @property
    def capacity(self) -> int:
        """Tokens that a row's page table holds."""
        return self.pages * self.page_size

    @property
    def path(self) -> int:
        """Tokens of the longest accepted path, root included."""
        return self.shape.depth + 1

    @property
    def rungs(self) -> int:
        """Steps of the longest ladder, of rows or of prompt tokens."""
        prompts = len(token_ladder(self.prompt_tokens)) if self.prompt_tokens else 0
        return max(len(row_ladder(self.rows)), prompts)


class RecordedPasses:
    """`Passes` that replay. `capture` before serving; without it everything runs eager and says so.

    `rung` records one step of every ladder only, 0 the largest, to see what memory that takes.
    """

    def __init__(
        self, eager: EagerPasses, recorder: Recorder, sizes: Sizes, device: torch.device, rung: int | None = None
    ) -> None:
        self.eager, self.recorder, self.sizes, self.device, self._rung = eager, recorder, sizes, device, rung
        self._joint: Extent | None = None
        self.verifying = self._verify_manager()
        self.capture_seconds = 0.0
        self.bytes_expected = self.bytes_taken = 0  # by all graphs, as `record_passes` finds
        self.feeding = self._feed_manager()
        self.managers: list[Lifecycle[Any]] = [self.feeding, self.verifying]
        if eager.head is not None:
            self.feeding_head = self._feed_head_manager(eager.head)
            self.catching_up = self._catch_up_manager(eager.head)
            self.drafting = self._draft_manager(eager.head)
            self.managers += [self.feeding_head, self.catching_up, self.drafting]

    @torch.inference_mode()
    def capture(self, progress: Progress | None = None) -> None:
        """Warm up and record every shape of every pass; GraphError says why one failed, and then none is replayed.

        A hybrid without states captures nothing, and says so once.
        """
        if self.eager.model.config.delta is not None and self.eager.states is None:
            self._withhold(NO_STATES)
            return
        begin = time.perf_counter()
        try:
            for manager in self.managers:
                manager.warm_up(ticks(manager.name, progress, "warm-up"))
            for manager in self.managers:
                manager.capture(ticks(manager.name, progress))
        except BaseException as error:
            for manager in self.managers:
                manager.withhold(f"capture failed: {error}")
            raise
        self.capture_seconds = round(time.perf_counter() - begin, 2)
        for manager in self.managers:
            manager.serve()

    def _withhold(self, why: str) -> None:
        if self.verifying.reason != why:
            log.warning("passes run eager: %s", why)
        for manager in self.managers:
            manager.withhold(why)

    @property
    def counts(self) -> dict[str, Counts]:
        """Replayed and eager passes by the name of the pass."""
        return {manager.name: manager.counts for manager in self.managers}

    def tally(self) -> dict[str, tuple[int, int]]:
        return {name: (counts.replayed, counts.eager.total()) for name, counts in self.counts.items()}

    @torch.inference_mode()
    def twin(self, manager: Lifecycle[Any], graph: Graph) -> Any:
        """What a graph's last replay should have given: the same pass run eager on the same buffers, newly planned."""
        state = graph.state.fresh()
        if manager is self.verifying:
            return self._verify_body(state, graph.inputs)
        if manager is self.catching_up:
            return self._catch_up_body(state, graph.inputs)
        growing = None
        for step in range(depth_of(graph.shape)):
            growing = self._draft_body(state, graph.inputs, step, growing)
        return growing

    @contextmanager
    def together(self, extent: Extent) -> Iterator[None]:
        """Passes of the target inside are run by other ranks too, each on its own batch: all pick the same graph."""
        self._joint = extent
        try:
            yield
        finally:
            self._joint = None

    def close(self) -> None:
        for manager in reversed(self.managers):
            manager.close()
        self.recorder.close()

    # prompts: cut at attention

    def _prompts(self, name: str, most: int, forward: Any, inputs: Any, attention: Any) -> PiecewiseManager:
        """Buckets of up to `most` tokens, none for 0."""
        ladder = Ladder.grid((1,), self._rung_of(token_ladder(most)) if most else ())

        def attend(shape: GraphShape) -> Any:
            return partial(attention.run, attention.plan(self._batch(self._zeros(shape))))

        return PiecewiseManager(name, self.recorder if most else None, ladder, forward, inputs, attend)

    def _feed_manager(self) -> PiecewiseManager:
        """Segments hold tokens of any rows, and a state is a row's: prompts of a hybrid are not cut."""
        hybrid = self.eager.model.config.delta is not None
        most = 0 if hybrid else self.sizes.prompt_tokens
        manager = self._prompts("prompt", most, self._feed_body, self._token_inputs, self.eager.attention)
        if hybrid:
            manager.reason = "prompts of a target with recurrent layers are not cut into segments"
        return manager

    def _token_inputs(self, shape: GraphShape) -> Buffers:
        zeros = self._zeros(shape)
        return {"tokens": zeros["tokens"], "positions": zeros["positions"]}

    def _feed_body(self, inputs: Buffers, attend: Any) -> Fed:
        return self.eager.fed(inputs["tokens"], inputs["positions"], attend)

    def feed(self, batch: Batch, states: StatePass | None = None) -> Fed:
        graph = self.feeding.pick(self._joint.tokens if self._joint else batch.tokens.numel())
        if graph is None:
            return self.eager.feed(batch, states)
        graph.load({"tokens": batch.tokens.view(1, -1), "positions": batch.positions.view(1, -1)})
        fed = graph.replay(self._attend_rows(self.eager.attention, batch, graph))
        return Fed(*(_unflat(t, batch) for t in fed))

    def _feed_head_manager(self, head: DraftHead) -> PiecewiseManager:
        """Modules of a chain read each other's rows, so their prompts are not cut into segments."""
        most = 0 if head.lookback else self.sizes.prompt_tokens
        return self._prompts("prompt, head", most, self._feed_head_body, self._true_rows, self.eager.head_attention)

    def _feed_head_body(self, inputs: Buffers, attend: Any) -> Tensor:
        head = self.eager.head
        assert head is not None
        return head(head.fuse(inputs["features"]), inputs["following"], inputs["positions"], attend)  # type: ignore[no-any-return]

    def feed_head(self, batch: Batch, features: Tensor, following: Tensor) -> Tensor:
        graph = self.feeding_head.pick(batch.tokens.numel())
        if graph is None:
            return self.eager.feed_head(batch, features, following)
        flat = {"features": features.flatten(0, 1)[None], "following": following.reshape(1, -1)}
        graph.load({**flat, "positions": batch.positions.view(1, -1)})
        output = _unflat(graph.replay(self._attend_rows(self.eager.head_attention, batch, graph)), batch)
        return gather_rows(output, (batch.counts - 1)[:, None])

    def _attend_rows(self, attention: Any, batch: Batch, graph: PiecewiseGraph) -> Any:
        rows, length = batch.tokens.shape
        return in_rows(bind(attention, batch), rows, length, graph.shape.query_len)

    # verify

    def _verify_manager(self) -> TargetVerifyGraphManager:
        sizes, shapes = self.sizes, list[GraphShape]()
        for query_len in {1, sizes.path}:
            shapes += self._ladder(query_len, CHAIN)
        if not sizes.shape.is_chain:
            shapes += self._ladder(sizes.shape.nodes + 1, TREE)
        build = partial(self._state, self.eager.attention)
        return TargetVerifyGraphManager(self.recorder, Ladder(shapes), self._verify_body, build, self._verify_inputs)

    def _verify_inputs(self, shape: GraphShape) -> Buffers:
        """Where the states of a hybrid's rows lie."""
        if self.eager.states is None:
            return {}
        return {"slots": torch.zeros(shape.rows, dtype=torch.int64, device=self.device)}

    def _verify_body(self, state: AttentionState, inputs: Buffers) -> tuple[Hidden, Kept]:
        """Hidden states, and what recurrent layers keep until the verdict is known."""
        eager = self.eager
        attend: Any = partial(eager.attention.run, state.plan)
        states = None if eager.states is None else StatePass(eager.states, inputs["slots"])
        if states is not None:
            attend = HybridAttend(attend, states.recur)
        hidden = eager.target(state.buffers["tokens"], state.buffers["positions"], attend)
        return hidden, (states.kept if states is not None else None) or ()

    def verify(self, batch: Batch, states: StatePass | None = None) -> Verified:
        rows, queries = batch.tokens.shape
        extent = self._joint or Extent(rows, queries, rows * queries, batch.ancestors is not None)
        graph = self.verifying.pick(extent.rows, extent.queries, TREE if extent.trees else CHAIN)
        if graph is None:
            return self.eager.verify(batch, states)
        graph.state.refresh(self._values(batch))
        if states is not None:
            graph.load({"slots": states.slots})
        hidden, kept = graph.replay()
        if states is not None:
            states.adopt(DeltaRows(*kept))
        final = hidden.final[:rows, :queries]
        taps = tuple(tap[:rows, :queries] for tap in hidden.taps)
        return self.eager.verified(Hidden(final, taps))

    # catch up

    def _catch_up_manager(self, head: DraftHead) -> PrefillEagleGraphManager:
        """A head without look-back runs over rows that the target verified, so it takes the target's states."""
        lengths = {1 + head.lookback, self.sizes.path + head.lookback}
        shapes = [shape for length in lengths for shape in self._ladder(length, CHAIN)]
        attention = self.eager.head_attention
        own: dict[str, Any] = {"build_state": partial(self._state, attention)}
        taken = {"pairs": self.verifying.pairs, "make_plan": partial(self._plan, attention)}
        states = own if head.lookback or self._rung is not None else taken
        inputs = self._true_rows
        return PrefillEagleGraphManager(self.recorder, Ladder(shapes), self._catch_up_body, inputs, **states)

    def _true_rows(self, shape: GraphShape) -> Buffers:
        head = self.eager.head
        assert head is not None
        size = (shape.rows, shape.query_len)
        dtype = head.embedding_table.dtype
        features = torch.zeros(*size, head.record.feature_size, dtype=dtype, device=self.device)
        whole = {name: torch.zeros(size, dtype=torch.int64, device=self.device) for name in ("following", "positions")}
        return {"features": features, **whole}

    def _catch_up_body(self, state: AttentionState, inputs: Buffers) -> Tensor:
        attend = partial(self.eager.head_attention.run, state.plan)
        return self.eager.catch_up_on(self._batch(state.buffers), inputs["features"], inputs["following"], attend)

    def catch_up(self, batch: Batch, features: Tensor, following: Tensor) -> Tensor:
        rows, queries = following.shape
        graph = self.catching_up.pick(rows, queries, CHAIN)
        if graph is None:
            return self.eager.catch_up(batch, features, following)
        graph.state.refresh(self._values(batch))
        graph.load({"features": features, "following": following, "positions": batch.positions})
        outputs: Tensor = graph.replay()
        return outputs[:rows]

    # draft

    def _draft_manager(self, head: DraftHead) -> DraftDecodeGraphManager:
        shape = self.sizes.shape
        rows = self._rung_of(row_ladder(self.sizes.rows))
        variants = [(*_kind(shape), mode) for mode in MODES]
        return DraftDecodeGraphManager(
            self.recorder,
            rows,
            [shape.depth],
            self._draft_body,
            self._draft_state,
            self._draft_inputs,
            _nothing_between,  # a level plans itself, on the device, from the lengths of the round
            variants=variants,
        )

    def _draft_state(self, shape: GraphShape) -> AttentionState:
        zeros = partial(torch.zeros, dtype=torch.int64, device=self.device)
        values = {"context": zeros(shape.rows), "pages": zeros(shape.rows, self.sizes.pages)}
        return AttentionState(shape, values, lambda buffers: None)

    def _draft_inputs(self, shape: GraphShape) -> Buffers:
        head = self.eager.head
        assert head is not None
        size = (shape.rows, 1 + head.lookback, head.record.hidden_size)
        output = torch.zeros(size, dtype=head.embedding_table.dtype, device=self.device)
        reals = {name: torch.zeros(shape.rows, device=self.device) for name in ("temperature", "top_p", "min_p")}
        whole = {name: torch.zeros(shape.rows, dtype=torch.int64, device=self.device) for name in ("top_k", "seed")}
        return {"output": output, **reals, **whole}

    def _draft_body(self, state: AttentionState, inputs: Buffers, step: int, above: Growing | None) -> Any:
        growing = above or self._begin(state, inputs)
        growing.step(step + 1)
        return growing.done() if step + 1 == depth_of(state.shape) else growing

    def _begin(self, state: AttentionState, inputs: Buffers) -> Growing:
        assert self.eager.head is not None
        mode = state.shape.variant[-2]
        start = Start(
            output=inputs["output"],
            context=state.buffers["context"],
            pages=state.buffers["pages"],
            longest=self.sizes.capacity,
            sampling=_sampling(str(mode), inputs),
            coupled=mode in COUPLED,
            static=True,
        )
        return drafting.begin(self.eager.head, self.eager.head_attention, start, self.sizes.shape)

    def draft(self, start: Start, shape: DraftShape) -> Drafted:
        """A shorter chain is the beginning of the recorded one."""
        depth = self.sizes.shape.depth if self._begins(shape) else shape.depth
        rows = start.context.shape[0]
        graph = self.drafting.bundle(depth).pick(rows, (*_kind(shape), _mode(start)))
        if graph is None:
            return self.eager.draft(start, shape)
        graph.state.refresh({"context": start.context, "pages": self._fitting(start.pages)})
        sampling = start.sampling._asdict()
        graph.load({"output": start.output, **{name: sampling[name] for name in SAMPLING}})
        drafted: Drafted = graph.replay()[-1]
        return _cut(drafted, rows, shape)

    def _begins(self, shape: DraftShape) -> bool:
        return shape.is_chain and self.sizes.shape.is_chain and shape.depth <= self.sizes.shape.depth

    # what is recorded, and what it reads

    def _ladder(self, query_len: int, variant: Variant) -> list[GraphShape]:
        rows = row_ladder(max(1, min(self.sizes.rows, MOST_TOKENS // query_len)))
        return [GraphShape(r, query_len, variant) for r in self._rung_of(rows)]

    def _rung_of(self, ladder: tuple[int, ...]) -> tuple[int, ...]:
        return ladder if self._rung is None else ladder[::-1][self._rung : self._rung + 1]

    def _state(self, attention: Any, shape: GraphShape) -> AttentionState:
        return AttentionState(shape, self._zeros(shape), partial(self._plan, attention), shared=(attention,))

    def _values(self, batch: Batch) -> dict[str, Tensor]:
        names: Sequence[str] = ("tokens", "positions", "context", "counts")
        values = {name: getattr(batch, name) for name in names} | {"pages": self._fitting(batch.pages)}
        return values if batch.ancestors is None else {**values, "ancestors": batch.ancestors}

    def _fitting(self, pages: Tensor) -> Tensor:
        """The part of page tables [R, P] that a session of the longest context can reach."""
        return pages[:, : self.sizes.pages]

    def _zeros(self, shape: GraphShape) -> dict[str, Tensor]:
        """A batch of padding: it stores nothing outside the null page."""
        zeros = partial(torch.zeros, dtype=torch.int64, device=self.device)
        rows, queries = shape.rows, shape.query_len
        values = {name: zeros(rows, queries) for name in ("tokens", "positions")}
        values |= {name: zeros(rows) for name in ("context", "counts")}
        values["pages"] = zeros(rows, self.sizes.pages)
        if shape.variant == TREE:
            values["ancestors"] = zeros(rows, queries)
        return values

    def _plan(self, attention: Any, buffers: Buffers) -> Any:
        return attention.plan(self._batch(buffers))

    def _batch(self, buffers: Buffers) -> Batch:
        tensors: dict[str, Any] = dict(buffers)
        return Batch(**tensors, longest=self.sizes.capacity, static=True)


# How the tokens of a draft are drawn; each way is another recorded pass.
GREEDY, NOISE, DRAWN = "greedy", "coupled", "drawn"
FILTERED = "filtered "
MODES = (GREEDY, NOISE, FILTERED + NOISE, DRAWN, FILTERED + DRAWN)
COUPLED = (GREEDY, NOISE, FILTERED + NOISE)
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seed")


def _mode(start: Start) -> str:
    sampling = start.sampling
    if sampling.all_greedy:
        return GREEDY
    drawn = NOISE if start.coupled else DRAWN
    return FILTERED + drawn if sampling.any_top_k or sampling.any_top_p or sampling.any_min_p else drawn


def _sampling(mode: str, inputs: Buffers) -> RowSampling:
    """What the host may know of every batch of this mode."""
    read = {name: inputs[name] for name in SAMPLING}
    return RowSampling.alike(read, greedy=mode == GREEDY, filtered=mode.startswith(FILTERED))


def _kind(shape: DraftShape) -> Variant:
    if shape.parents:
        return ("given tree",)
    return CHAIN if shape.is_chain else (*TREE, shape.nodes, shape.branching)


def _cut(drafted: Drafted, rows: int, shape: DraftShape) -> Drafted:
    """The rows and, of a chain, the levels that were asked for; copied, since the next replay writes over them."""
    nodes = shape.depth if shape.is_chain else drafted.tokens.shape[1]
    tokens, parents, logprobs = (t[:rows, :nodes].clone() for t in drafted[:3])
    q = None if drafted.q is None else drafted.q[:rows, :nodes].clone()
    return Drafted(tokens, parents, logprobs, q)


def _unflat(flat: Tensor, batch: Batch) -> Tensor:
    """[1, N, W] of a bucket -> [R, T, W] of the batch at its beginning."""
    rows, length = batch.tokens.shape
    return flat[0, : rows * length].view(rows, length, -1)


def _nothing_between(state: AttentionState, step: int) -> None:
    return None


def ticks(name: str, progress: Progress | None, what: str = "graphs") -> Callable[[int, int, GraphShape], None] | None:
    """What a manager calls before each shape that it warms up or records."""
    if progress is None:
        return None
    return lambda done, total, shape: progress(f"{what}, {name}", done, total)
