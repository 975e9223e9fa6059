"""A toy transformer over a paged cache with lazily planned attention, and the comparison of replay with eager.

The attention has FlashMLA's discipline in small: its plan is an empty object, the first call that gets it plans from
the lengths and marks it, later calls take it as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from graphs.graph import Graph
from graphs.recorder import CudaRecorder, Recorder
from graphs.shape import GraphShape
from graphs.state import AttentionState, fill
from graphs.tape import TapeRecorder

LAYERS, DIM, VOCAB, PAGE = 2, 16, 50, 4
PAD_SLOT = PAGE - 1  # of page 0, the null page


class LazyPlan:
    """Which stored tokens each row's kernel looks at; empty until a call of `limits` fills it."""

    def __init__(self) -> None:
        self.initialised = False
        self.limit: Tensor | None = None

    def limits(self, buffers: Mapping[str, Tensor]) -> Tensor:
        """[R, 1, 1] int64; planned on first use, and never again."""
        if not self.initialised:
            self.limit = buffers["context"] + buffers["counts"]
            self.initialised = True
        assert self.limit is not None
        return self.limit[:, None, None]


@dataclass
class Rows:
    """A batch: context lengths, and the tokens that follow."""

    context: list[int]
    tokens: list[list[int]]
    pages: int = 16  # a row's pages, one after the other, beginning after the null page

    @property
    def rows(self) -> int:
        return len(self.context)

    @property
    def width(self) -> int:
        return max(map(len, self.tokens))


def some_rows(context: Sequence[int], width: int, seed: int = 0) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    return Rows(list(context), torch.randint(VOCAB, (len(context), width), generator=generator).tolist())


@dataclass
class Toy:
    """The model, its cache, and states over it."""

    device: str = "cpu"
    most_rows: int = 32
    pages: int = 16
    plans: list[LazyPlan] = field(default_factory=list)  # every plan that was made, in order

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(1)

        def draw(*shape: int) -> Tensor:
            return (torch.randn(*shape, generator=generator) / 4).to(self.device)

        self.embed, self.place = draw(VOCAB, DIM), draw(PAGE * self.pages, DIM)
        self.qkv = [draw(DIM, 3 * DIM) for _ in range(LAYERS)]
        self.mlp = [draw(DIM, DIM) for _ in range(LAYERS)]
        self.fuse = draw(2 * DIM, DIM)
        slots = (self.most_rows * self.pages + 1) * PAGE
        self.cache = draw(LAYERS, slots, 2, DIM)  # as if every token before had been stored

    # what a manager is given

    def recorder(self, **options: Any) -> Recorder:
        return TapeRecorder(**options) if self.device == "cpu" else CudaRecorder(self.device)

    def state(self, shape: GraphShape, make_plan: Any = None) -> AttentionState:
        """A state for warm-up: short rows on the null page."""
        values = {
            "context": torch.zeros(shape.rows, dtype=torch.int64),
            "counts": torch.ones(shape.rows, dtype=torch.int64),
            "pages": torch.zeros(shape.rows, self.pages, dtype=torch.int64),
        }
        values = {name: value.to(self.device) for name, value in values.items()}
        return AttentionState(shape, values, make_plan or self.new_plan)

    def new_plan(self, buffers: Mapping[str, Tensor]) -> LazyPlan:
        self.plans.append(LazyPlan())
        return self.plans[-1]

    def inputs(self, shape: GraphShape) -> dict[str, Tensor]:
        return {"tokens": torch.zeros(shape.rows, shape.query_len, dtype=torch.int64, device=self.device)}

    def head_inputs(self, shape: GraphShape) -> dict[str, Tensor]:
        features = torch.zeros(shape.rows, shape.query_len, DIM, device=self.device)
        return {**self.inputs(shape), "features": features}

    # the passes

    def forward(self, state: AttentionState, inputs: Mapping[str, Tensor], plan: Any = None) -> Tensor:
        """The target's pass: final hidden states [R, T, DIM]."""
        return self.run(self.embed[inputs["tokens"]], state.buffers, plan or state.plan)

    def head(self, state: AttentionState, inputs: Mapping[str, Tensor], plan: Any = None) -> Tensor:
        """The head's pass over features and tokens."""
        both = torch.cat((inputs["features"], self.embed[inputs["tokens"]]), dim=-1)
        return self.run(both @ self.fuse, state.buffers, plan or state.plan)

    def step(self, state: AttentionState, inputs: Mapping[str, Tensor], step: int, above: Any) -> tuple[Tensor, Tensor]:
        """A draft step: the next tokens [R, 1] and the hidden states they come from."""
        tokens = inputs["tokens"] if step == 0 else above[0]
        hidden = self.run(self.embed[tokens], state.buffers, state.plan)
        return (hidden @ self.embed.T).argmax(-1), hidden

    @staticmethod
    def next_step(state: AttentionState, step: int) -> None:
        """One more token is stored."""
        state.buffers["context"].add_(1)

    def run(self, x: Tensor, buffers: Mapping[str, Tensor], plan: LazyPlan) -> Tensor:
        own = buffers["context"][:, None] + torch.arange(x.shape[1], device=x.device)  # [R, T]
        x = x + self.place[own.clamp(max=self.place.shape[0] - 1)]
        for layer in range(LAYERS):
            x = x + self.attend(layer, (x @ self.qkv[layer]).chunk(3, -1), own, buffers, plan)
            x = x + torch.tanh(x @ self.mlp[layer])
        return x

    def attend(
        self, layer: int, qkv: Sequence[Tensor], own: Tensor, buffers: Mapping[str, Tensor], plan: LazyPlan
    ) -> Tensor:
        q, k, v = qkv
        store, every = self.cache[layer], torch.arange(self.pages * PAGE, device=q.device)
        valid = torch.arange(q.shape[1], device=q.device) < buffers["counts"][:, None]
        page = buffers["pages"].gather(1, (own // PAGE).clamp(max=self.pages - 1))
        slots = (page * PAGE + own % PAGE).masked_fill(~valid, PAD_SLOT)
        store.index_copy_(0, slots.flatten(), torch.stack((k, v), 2).flatten(0, 1))
        keys, values = store[buffers["pages"][:, every // PAGE] * PAGE + every % PAGE].unbind(2)
        seen = (every <= own[..., None]) & (every < plan.limits(buffers))
        weights = (q @ keys.mT).masked_fill(~seen, -1e9).softmax(-1)
        return weights.masked_fill(~seen, 0) @ values  # nothing at all for padding, which sees nothing

    # batches

    def values(self, batch: Rows) -> dict[str, Tensor]:
        """What a state's refresh takes."""
        counts = [len(tokens) for tokens in batch.tokens]
        first = torch.arange(batch.rows)[:, None] * self.pages + 1
        pages = (first + torch.arange(self.pages)).to(self.device)
        return {"context": self.ints(batch.context), "counts": self.ints(counts), "pages": pages}

    def load(self, batch: Rows) -> dict[str, Tensor]:
        """What a graph's load takes."""
        return {"tokens": self.ints([tokens + [0] * (batch.width - len(tokens)) for tokens in batch.tokens])}

    def ints(self, values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def stored(self) -> Tensor:
        """The cache without the null page, where padding writes."""
        return self.cache[:, PAGE:].clone()

    # eager is the oracle

    def eager(self, graph: Graph, batch: Rows, inputs: Mapping[str, Tensor], body: Any) -> tuple[Any, Tensor]:
        """`body(state, inputs)` on the graph's padded shape with its own state; also the cache, which is put back."""
        state, padded = self.state(graph.shape), {name: torch.zeros_like(t) for name, t in graph.inputs.items()}
        state.refresh(self.values(batch))
        fill(padded, inputs, {})
        before = self.cache.clone()
        result, after = body(state, padded), self.stored()
        self.cache.copy_(before)
        return result, after

    def agrees(self, graph: Graph, batch: Rows, body: Any = None, inputs: Mapping[str, Tensor] | None = None) -> bool:
        """Refresh, load and replay as a server would, and compare everything with eager, bit for bit."""
        inputs = self.load(batch) if inputs is None else inputs
        expected, stored = self.eager(graph, batch, inputs, body or self.forward)
        graph.state.refresh(self.values(batch))
        graph.load(inputs)
        return same(graph.replay(graph.decisions), expected) and torch.equal(self.stored(), stored)


def same(one: Any, other: Any) -> bool:
    """Equal bit for bit, in any nesting of tuples."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    return len(one) == len(other) and all(map(same, one, other))
