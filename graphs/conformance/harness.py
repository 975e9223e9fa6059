"""One pass of a backend in every way there is: eager, warmed up, recorded, replayed.

Owns: states over a batch's tensors, passes over all layers, capture through the real GraphManager, and comparing. Must
never know which rule a test is about.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphs.conformance.backend import Backend, Batch, Traits
from graphs.conformance.world import World, given_to
from graphs.graph import Graph, Prepared, Stage
from graphs.manager import GraphManager
from graphs.recorder import Recorder
from graphs.shape import GraphShape, Ladder
from graphs.state import AttentionState

Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Kit:
    """What the tests are run with: the backend under test, the same one unbroken, and a recorder for the device."""

    backend: Callable[[], Backend]
    unbroken: Callable[[], Backend]
    recorder: Callable[[], Recorder]
    device: torch.device

    @property
    def traits(self) -> Traits:
        return self.backend().traits

    def worlds(self, rows: int, page_size: int = 0) -> tuple[World, World]:
        """Two caches with the same sequences: of the backend under test, and of the unbroken one that judges it.

        They are the same backend except where the test is about a broken twin, which must not judge itself.
        """
        return self._world(self.backend(), rows, page_size), self._world(self.unbroken(), rows, page_size)

    def _world(self, backend: Backend, rows: int, page_size: int) -> World:
        traits = backend.traits
        return World(backend, self.device, page_size or traits.page_sizes[0], rows, traits.longest)


def shape_of(batch: Batch) -> GraphShape:
    return GraphShape(*batch.tokens.shape)


def values_of(batch: Batch) -> dict[str, Tensor]:
    """The tensors of a batch by name: what a state has buffers for."""
    return {name: value for name, value in batch._asdict().items() if isinstance(value, Tensor)}


def over(buffers: Inputs, batch: Batch) -> Batch:
    """The batch with a state's buffers in place of its tensors."""
    fields: dict[str, Any] = dict(buffers)
    return batch._replace(**fields)


def state_of(world: World, batch: Batch) -> AttentionState:
    """A state with buffers of its own and a plan over them."""
    backend, cache = world.backend, world.cache
    return AttentionState(
        shape_of(batch),
        values_of(batch),
        lambda buffers: backend.plan(cache, over(buffers, batch)),
        shared=(cache, *backend.shared(cache)),
    )


def layers(world: World, plan: Any, inputs: Inputs) -> list[Tensor]:
    """One pass: every layer once."""
    return [
        world.backend.run(plan, layer, q, *given_to(world.backend, own, world.scale))
        for layer, (q, own) in enumerate(zip(inputs["q"], inputs["own"], strict=True))
    ]


def eager(world: World, batch: Batch) -> Tensor:
    """The pass on a cache prepared for it, with a plan of its own: [layers, R, T, heads, width]."""
    world.fill(batch)
    return torch.stack(layers(world, state_of(world, batch).plan, world.inputs(batch)))


def prepared(world: World, batch: Batch) -> Prepared:
    """A pass to warm up or record, over static inputs."""
    state, inputs = state_of(world, batch), world.inputs(batch)
    return Prepared(state, inputs, lambda: layers(world, state.plan, inputs), world.backend.decisions(batch))


def captured(kit: Kit, world: World, *batches: Batch, recorder: Recorder | None = None) -> GraphManager:
    """One graph for the shape of each batch, recorded at that batch's lengths by the manager that serves use."""
    recorder = recorder or kit.recorder()
    at = {shape_of(batch): batch for batch in batches}

    def factory(shape: GraphShape, stage: Stage) -> Prepared:
        world.fill(at[shape])
        return prepared(world, at[shape])

    manager = GraphManager("conformance", recorder, Ladder(at), factory)
    manager.capture()
    return manager


def graph_of(manager: GraphManager, batch: Batch) -> Graph:
    graph = manager.pick(*batch.tokens.shape)
    assert graph is not None, manager.reason
    return graph


def update(world: World, state: AttentionState, batch: Batch) -> None:
    """Bring a state to a batch: its buffers in place, then what the backend derived from them."""
    state.refresh(values_of(batch))
    world.backend.refresh(state.plan, over(state.buffers, batch))


def replayed(world: World, graph: Graph, batch: Batch) -> Tensor:
    """The recorded pass replayed for a batch, on a cache prepared for it."""
    world.fill(batch)
    update(world, graph.state, batch)
    graph.load(world.inputs(batch))
    return torch.stack(graph.replay(world.backend.decisions(batch)))


def valid(batch: Batch) -> Tensor:
    """[R, T] bool: which queries are not padding."""
    steps = torch.arange(batch.tokens.shape[1], device=batch.counts.device)
    return steps < batch.counts[:, None]


def worst(got: Tensor, right: Tensor, batch: Batch) -> str:
    """Where two results [layers, R, T, heads, width] of a batch are furthest apart; padding does not count."""
    apart = (got.double() - right.double()).abs().flatten(3).amax(-1)
    apart = apart.masked_fill(~valid(batch), 0)
    apart = torch.where(apart.isnan(), float("inf"), apart)
    layer, row, step = (int(i) for i in torch.unravel_index(apart.argmax(), apart.shape))
    size = float(apart[layer, row, step])
    amount = f"{size:.3g} off" if size < float("inf") else "NaN or infinite"
    length = int(batch.context[row]) + batch.offset
    return f"{amount} in layer {layer}, row {row}, query {step}, which has {length} tokens before the pass"


def same(got: Tensor, right: Tensor, batch: Batch) -> bool:
    """Bit for bit, padding left out; NaN equals nothing."""
    mask = valid(batch)
    return bool(torch.equal(got[:, mask], right[:, mask]))


def close(got: Tensor, right: Tensor, batch: Batch, tolerance: float) -> bool:
    mask = valid(batch)
    return torch.allclose(got[:, mask].double(), right[:, mask].double(), tolerance, tolerance)
