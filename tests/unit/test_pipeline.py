"""Stages of a target by themselves: how layers are divided, what is handed on, and how outcomes are laid out."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
from hybrid_models import hybrid_target
from torch import Tensor

from graphs.tape import TapeRecorder
from speculator.errors import DraftNotFoundError, NumericalError
from speculator.ranks.link import Loopback
from speculator.ranks.outcome import Layout, failed
from speculator.recorded import Sizes
from speculator.results import Committed, collect
from speculator.sizing import Load, _largest_passes
from speculator.staged import StagedPasses, StagedRecorded, recorded_passes, staged_passes
from speculator.types import DraftShape, Step
from target.batch import Batch, causal_positions
from target.cache import PagedCache
from target.decoder import Decoder
from target.errors import PlanError
from target.load import load_target
from target.names import decoder_slots
from target.pipeline import Stage, check_stages, pack, stage_slots, taps_before, unpack
from target.save import save_target
from tests.unit.engines import tiny_config, tiny_head, tiny_target
from tests.unit.targets import save_reference

TAPS = (2, 3, 4)


@pytest.mark.parametrize(("layers", "size"), [(6, 2), (7, 2), (7, 3), (61, 4), (5, 5), (1, 1)])
def test_layers_are_divided_and_the_last_stage_has_fewest(layers: int, size: int) -> None:
    spans = [Stage(index, size).span(layers) for index in range(size)]
    assert [layer for span in spans for layer in span] == list(range(layers))
    counts = list(map(len, spans))
    assert counts == sorted(counts, reverse=True) and counts[0] - counts[-1] <= 1


def test_targets_that_stages_cannot_share_are_named() -> None:
    with pytest.raises(PlanError, match="7 stages need a layer each, and LlamaForCausalLM has 6"):
        check_stages(tiny_config(), 7)
    hybrid = hybrid_target().config
    with pytest.raises(PlanError, match=r"has recurrent layers, whose states no pipeline of stages moves"):
        check_stages(hybrid, 2)
    check_stages(hybrid, 1)


@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "qwen3_moe", "qwen2-window"])
def test_every_published_tensor_goes_to_one_stage(family: str, tmp_path: Path) -> None:
    save_reference(tmp_path, family, num_hidden_layers=4)
    whole = load_target(tmp_path, torch.float32)
    stages = [load_target(tmp_path, torch.float32, stage=Stage(i, 3)) for i in range(3)]
    held = [set(stage_slots(decoder_slots(whole.config), stage)) for stage in stages]
    twice = {name for name in held[0] if name in held[1] | held[2]} | (held[1] & held[2])
    assert set.union(*held) == set(decoder_slots(whole.config)) and twice == {"model.norm.weight"}
    for stage in stages:
        for mine, layer in zip(stage.layers, stage.span, strict=True):
            for ours, theirs in zip(mine.parameters(), whole.layers[layer].parameters(), strict=True):
                assert torch.equal(ours, theirs)


def test_the_embedding_of_tied_tables_is_on_both_ends(tmp_path: Path) -> None:
    save_target(tiny_target(tie_word_embeddings=True), tmp_path)
    stages = [load_target(tmp_path, torch.float32, stage=Stage(i, 3)) for i in range(3)]
    assert [len(stage.embed.weight) for stage in stages] == [61, 0, 61]


def test_taps_travel_from_the_stage_that_has_them() -> None:
    assert [taps_before((0, 2, 3, 6), Stage(i, 2).span(6)) for i in range(2)] == [0, 3]
    hidden = unpack(torch.arange(24.0).view(3, 2, 2, 2))
    assert torch.equal(pack(hidden), torch.arange(24.0).view(3, 2, 2, 2))


# ---- hand-over


class Wire:
    """Both ends of a link in one process; what is sent arrives as it is then when it is received."""

    def __init__(self, stage: Stage, way: deque[Tensor]) -> None:
        self.stage, self._way, self.drained = stage, way, 0
        self._place = torch.zeros(0)

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        sent = self._way.popleft()
        assert sent.shape == shape and sent.dtype == dtype and sent.is_contiguous()
        if self._place.shape != shape:
            self._place = torch.zeros(shape, dtype=dtype)
        return self._place.copy_(sent)

    def send(self, tensor: Tensor) -> None:
        self._way.append(tensor)

    def drain(self) -> None:
        self.drained += 1


class Pair:
    """Two stages of the tiny target, eager and recorded, and the whole of it."""

    def __init__(self, folder: Path) -> None:
        save_target(tiny_target(3), folder)
        self.whole = load_target(folder, torch.float32)
        self.head = tiny_head(self.whole, "eagle3")
        self.wire: deque[Tensor] = deque()
        self.stages = [self._stage(folder, i) for i in range(2)]
        self.recorders = [TapeRecorder(poison_between_replays=True) for _ in range(2)]
        sizes = Sizes(2, 16, 4, DraftShape(3))
        pairs = zip(self.stages, self.recorders, strict=True)
        self.recorded = [StagedRecorded(eager, recorder, sizes, torch.device("cpu")) for eager, recorder in pairs]

    def _stage(self, folder: Path, index: int) -> StagedPasses:
        model = load_target(folder, torch.float32, stage=Stage(index, 2))
        head = self.head if index else None
        cache = cache_of(model, [self.head.cache_layers] if index else [])
        if head is not None:
            head = tiny_head(self.whole, "eagle3")
            for layer in head.layers:
                layer.attention.layer = len(model.cache_layers)
        return staged_passes(Wire(Stage(index, 2), self.wire), TAPS, model, head, cache)  # type: ignore[arg-type]

    @torch.inference_mode()
    def verify(self, passes: Any, batch: Batch) -> Any:
        first, last = passes
        assert first.verify(batch).logits.numel() == 0
        found = last.verify(batch)
        return found.features.clone(), found.logits.clone()


def leaves(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else [found.final, *found.taps]


def cache_of(model: Decoder, more: list[Any]) -> PagedCache:
    cache = PagedCache([model.cache_layers, *more], 40, 4, torch.float32)
    for layer in cache.layers:
        layer[cache.page_size :] = torch.randn(
            layer[cache.page_size :].shape, generator=torch.Generator().manual_seed(len(cache.layers))
        )
    return cache


def batch_of(rows: int, length: int, context: int, seed: int) -> Batch:
    tokens = torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(seed))
    held = torch.full((rows,), context)
    pages = torch.arange(1, 1 + 16 * rows).view(rows, 16)
    counts = torch.full((rows,), length)
    return Batch(tokens, causal_positions(held, length), held, counts, pages, longest=context + length)


def test_a_stage_recorded_at_one_length_replays_at_another(tmp_path: Path) -> None:
    """Graphs are captured over nothing; batches are long, short, and smaller than what was recorded."""
    pair = Pair(tmp_path)
    for passes in pair.recorded:
        passes.capture()
    for rows, context, seed in ((2, 50, 0), (1, 3, 1), (2, 7, 2), (1, 50, 3)):
        batch = batch_of(rows, 4, context, seed)
        wanted = pair.verify(pair.stages, batch)
        found = pair.verify(pair.recorded, batch)
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-3)
        for passes in pair.recorded:  # the same pass run eager on the padded shape, bit for bit
            graph = next(g for g in passes.verifying.graphs.values() if (g.shape.rows, g.shape.query_len) == (rows, 4))
            for ours, theirs in zip(leaves(graph.outputs), leaves(passes.twin(passes.verifying, graph)), strict=True):
                assert torch.equal(ours, theirs)
    assert [passes.tally()["target verify"] for passes in pair.recorded] == [(4, 0), (4, 0)]
    assert not pair.wire


def test_what_a_graph_gave_is_sent_before_it_is_written_over(tmp_path: Path) -> None:
    """The captured output is what travels, so the next replay waits until it has left."""
    pair = Pair(tmp_path)
    first = pair.recorded[0]
    first.capture()
    link = pair.stages[0].link
    with torch.inference_mode():
        first.verify(batch_of(2, 4, 9, 0))
        [sent] = pair.wire
        held = sent.clone()
        before = link.drained  # type: ignore[attr-defined]
        first.verify(batch_of(2, 4, 9, 1))
    assert link.drained == before + 1  # type: ignore[attr-defined]
    assert pair.wire[1].data_ptr() == sent.data_ptr() and not torch.equal(sent, held)


def test_a_received_state_is_copied_into_the_recorded_input(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    last = pair.recorded[1]
    last.capture()
    graph = last.verifying.pick(2, 4, ("chain",))
    assert graph is not None and graph.inputs["above"].shape == (3, 2, 4, 32)  # taps 2 and 3 are of the first stage
    assert graph.recording.touches(graph.inputs["above"])  # type: ignore[attr-defined]


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_stage_by_itself_runs_the_passes_that_are_measured(index: int, tmp_path: Path) -> None:
    """As before the cache is sized: nothing is received or sent."""
    save_target(tiny_target(3), tmp_path)
    model = load_target(tmp_path, torch.float32, stage=Stage(index, 3))
    cache = PagedCache([model.cache_layers], 2, 4, torch.float32)
    link = Loopback(Stage(index, 3), torch.device("cpu"))
    passes = staged_passes(link, TAPS, model, None, cache)
    sizes = Sizes(2, 16, 4, DraftShape(3), prompt_tokens=8)
    with torch.inference_mode():
        _largest_passes(passes, Load(sizes, 2, 8, True, None, 0.9), torch.device("cpu"))
    recorded = recorded_passes(passes, TapeRecorder(), sizes, torch.device("cpu"), 0)
    recorded.capture()
    assert isinstance(recorded, StagedRecorded) and recorded.verifying.ready and not recorded.feeding.wanted
    assert passes.planes == (0, 2, 4)[index]


# ---- outcomes


def committed(steps: list[int]) -> Committed:
    rows = len(steps)
    tokens = torch.tensor([[5, 6, -1], [7, -1, -1]])[:rows]
    path = torch.tensor([[0, 3, 0], [0, 0, 0]])[:rows]
    logprobs = torch.tensor([[-0.1, -2.5, -9.0], [-1 / 3, 0.0, 0.0]])[:rows]
    return Committed(steps, tokens, torch.tensor([2, 1])[:rows], path, logprobs, torch.ones(rows, dtype=torch.bool))


def test_an_outcome_says_what_the_step_came_to() -> None:
    from speculator.drafting import Drafted

    layout, parts = Layout(5, 7), [committed([2, 0])]
    tree = Drafted(
        torch.tensor([[9, 8, 7]]), torch.tensor([[-1, -1, 0]]), torch.tensor([[-0.25, -0.5, -1.5]]), None, [2], [41]
    )
    out = layout.empty(3, torch.device("cpu"))
    layout.commit(out, torch.tensor([2, 0]), parts[0])
    layout.offer(out, torch.tensor([2]), tree, torch.tensor([41]))
    assert layout.results(out) == collect([Step(row, 0, ()) for row in range(3)], parts, [tree])
    path, kept = layout.verdict(out, torch.tensor([2, 0]), 3)
    assert path.tolist() == [[0, 3, 0], [0, 0, 0]] and kept.tolist() == [2, 1]


@pytest.mark.parametrize("error", [DraftNotFoundError("the draft is gone: ä"), NumericalError("x" * 400)])
def test_an_outcome_carries_the_error_a_step_deserves(error: Any) -> None:
    layout = Layout(5, 7)
    out = failed(layout.empty(2, torch.device("cpu")), error)
    with pytest.raises(type(error)) as caught:
        layout.results(out)
    assert error.message.startswith(caught.value.message) and len(caught.value.message) >= 20
    assert layout.verdict(out, torch.tensor([0]), 5)[1].tolist() == [0]


def test_values_that_are_not_finite_are_an_error() -> None:
    layout = Layout(5, 7)
    out = layout.empty(2, torch.device("cpu"))
    layout.commit(out, torch.tensor([1]), committed([1])._replace(finite=torch.tensor([False])))
    with pytest.raises(NumericalError, match="nothing was committed"):
        layout.results(out)
