"""Prompt prefill in segments: the cuts, what is handed over, buckets, and the guard.

The GPU tests run this file again with CUDA graphs: only `device` differs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from graph_toys import DIM, LAYERS, VOCAB, Toy, same

from graphs.errors import CaptureError, SideEffectError
from graphs.piecewise import CaptureGuard, PiecewiseManager, in_rows
from graphs.shape import GraphShape, Ladder, token_ladder

BUCKETS = Ladder.grid([1], token_ladder(32, 8))


@pytest.fixture
def device() -> str:
    return "cpu"


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def toy(device: str) -> Toy:
    return Toy(device)


@pytest.fixture
def recorder(toy: Toy) -> Iterator[Any]:
    recorder = toy.recorder()
    yield recorder
    recorder.close()


class Prompts:
    """A model over [1, N] tokens that leaves attention to whoever runs it."""

    def __init__(self, toy: Toy) -> None:
        self.toy, self.side_effect = toy, lambda: None

    def forward(self, inputs: dict[str, torch.Tensor], attend: Any) -> torch.Tensor:
        toy = self.toy
        x = first = toy.embed[inputs["tokens"]]
        for layer in range(LAYERS):
            q, k, v = (x @ toy.qkv[layer]).chunk(3, -1)
            x = x + attend(layer, q, k, v, window=None)
            self.side_effect()
            x = x + torch.tanh(x @ toy.mlp[layer])
        return x + first  # read in the last segment, made in the first

    def inputs(self, shape: GraphShape) -> dict[str, torch.Tensor]:
        return self.toy.inputs(shape)


def causal(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None) -> torch.Tensor:
    """Over [R, T, DIM]; reads the host, as a backend that plans per call may."""
    length = int(torch.full((), q.shape[1], device=q.device).item())
    seen = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    weights = (q @ k.mT).masked_fill(~seen, float("-inf")).softmax(-1)
    return weights @ v + layer


@pytest.fixture
def prompts(toy: Toy) -> Prompts:
    return Prompts(toy)


def manager_of(prompts: Prompts, recorder: Any, **changes: Any) -> PiecewiseManager:
    given = dict(forward=prompts.forward, build_inputs=prompts.inputs, build_attend=lambda shape: causal) | changes
    return PiecewiseManager("prompt", recorder, BUCKETS, **given)


def tokens(toy: Toy, count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB, (1, count), generator=generator).to(toy.device)


def eager(prompts: Prompts, graph: Any, given: torch.Tensor, attend: Any) -> torch.Tensor:
    """On the padded bucket, in which attention leaves zeros where it was not asked."""

    def padded(*args: Any, **kwargs: Any) -> torch.Tensor:
        result = attend(*args, **kwargs)
        whole = result.new_zeros(args[1].shape)
        whole[:, : result.shape[1]] = result
        return whole

    inputs = prompts.inputs(graph.shape)
    inputs["tokens"][:, : given.shape[1]] = given
    return prompts.forward(inputs, padded)


@pytest.mark.parametrize("count", [1, 8, 9, 20, 32])
def test_segments_and_attention_are_the_pass_bit_for_bit(toy, prompts, recorder, count):
    manager = manager_of(prompts, recorder)
    manager.capture()
    graph, given = manager.pick(count), tokens(toy, count)
    assert graph.shape.query_len == min(shape.query_len for shape in BUCKETS if shape.query_len >= count)
    assert len(graph.segments) == LAYERS + 1
    graph.load({"tokens": given})
    assert same(graph.replay(causal), eager(prompts, graph, given, causal))


def test_a_bucket_holds_rows_of_any_shape(toy, prompts, recorder):
    manager = manager_of(prompts, recorder)
    manager.capture()
    for rows, length in ((2, 5), (5, 2), (1, 10), (3, 3)):
        given = tokens(toy, rows * length, seed=rows)
        graph = manager.pick(rows * length)
        attend = in_rows(causal, rows, length, graph.shape.query_len)
        graph.load({"tokens": given})
        got = graph.replay(attend)[0, : rows * length].view(rows, length, DIM)
        assert same(graph.outputs, eager(prompts, graph, given, attend))
        alone = prompts.forward({"tokens": given.view(rows, length)}, causal)
        torch.testing.assert_close(got, alone)


def test_what_one_replay_leaves_does_not_reach_the_next(toy, prompts, recorder):
    manager = manager_of(prompts, recorder)
    manager.capture()
    graph, few = manager.pick(32), tokens(toy, 20)
    poison = recorder.poison()
    for count in (32, 20, 32):
        given = tokens(toy, count, seed=count)
        graph.load({"tokens": given})
        attend = in_rows(causal, 1, count, 32)
        assert same(graph.replay(attend), eager(prompts, graph, given, attend))
        poison.replay()
    assert few.shape == (1, 20)


def test_the_model_may_keep_what_attention_gave(toy, prompts, recorder):
    def forward(inputs, attend):
        x = toy.embed[inputs["tokens"]]
        first = attend(0, x, x, x, window=None)
        second = attend(1, first, x, x, window=None)
        return first + second * 2

    manager = manager_of(prompts, recorder, forward=forward)
    manager.capture()
    graph, given = manager.pick(8), tokens(toy, 8)
    graph.load({"tokens": given})
    assert same(graph.replay(causal), forward({"tokens": given}, causal))


def test_attention_of_any_signature_with_results_of_another_shape(toy, prompts, recorder):
    def latent(scale, q, *, latent):
        return (q @ latent.mT * scale).softmax(-1) @ latent[..., :4]

    def forward(inputs, attend):
        x = toy.embed[inputs["tokens"]]
        return attend(0.5, x, latent=x * 2).repeat(1, 1, 2)

    manager = manager_of(prompts, recorder, forward=forward, build_attend=lambda shape: latent)
    manager.capture()
    graph, given = manager.pick(16), tokens(toy, 16)
    graph.load({"tokens": given})
    assert same(graph.replay(latent), forward({"tokens": given}, latent))


def test_every_cut_and_bucket_hands_over_in_the_same_memory(toy, prompts, recorder):
    manager = manager_of(prompts, recorder)
    manager.capture()
    assert manager.hand_over.bytes == 4 * 32 * DIM * 4, "q, k, v and the result of the largest bucket, once"
    manager.close()
    assert manager.hand_over.bytes == 0


def test_too_many_tokens_and_too_early_run_eager_with_a_reason(toy, prompts, recorder):
    manager = manager_of(prompts, recorder)
    assert manager.pick(4) is None
    manager.capture()
    assert manager.pick(33) is None
    manager.pick(4).replay(causal)
    assert manager.counts.eager == {"not captured yet": 1, "no shape holds 1 rows of 33": 1}
    assert manager.counts.replayed == 1
    manager.serve()
    with pytest.raises(CaptureError, match="while serving"):
        manager.capture()


def test_a_pass_that_cannot_be_recorded_leaves_nothing(toy, prompts, recorder):
    prompts.side_effect = lambda: toy.embed.sum().item()
    manager = manager_of(prompts, recorder)
    with pytest.raises(CaptureError):
        manager.capture()
    assert not manager.ready and not recorder.recording
    assert manager.reason.startswith("capture failed")
    prompts.side_effect = lambda: None
    manager.capture()
    graph, given = manager.pick(8), tokens(toy, 8)
    graph.load({"tokens": given})
    assert same(graph.replay(causal), eager(prompts, graph, given, causal))


@pytest.mark.parametrize(("learnt", "recorded", "text"), [(1, 2, "more often"), (2, 1, "less often")])
def test_attention_must_be_called_as_in_the_warm_up(toy, prompts, recorder, learnt, recorded, text):
    def forward(inputs, attend):
        x = toy.embed[inputs["tokens"]]
        for layer in range(recorded if recorder.recording else learnt):
            x = attend(layer, x, x, x, window=None)
        return x

    manager = manager_of(prompts, recorder, forward=forward)
    with pytest.raises(CaptureError, match=text):
        manager.capture()
    assert not recorder.recording


def test_tensors_hidden_in_an_argument_are_refused(toy, prompts, recorder):
    def forward(inputs, attend):
        x = toy.embed[inputs["tokens"]]
        return attend(0, (x, x))

    manager = manager_of(prompts, recorder, forward=forward, build_attend=lambda shape: lambda layer, pair: pair[0])
    with pytest.raises(CaptureError, match="inside argument 1"):
        manager.capture()


# the guard


def test_a_side_effect_inside_a_capture_is_refused(toy, prompts, recorder):
    guard = CaptureGuard()
    prompts.side_effect = lambda: guard.consume("writing expert counts")
    manager = manager_of(prompts, recorder, guard=guard)
    with pytest.raises(SideEffectError, match="writing expert counts .* inside the warm-up of a prefill capture"):
        manager.warm_up()
    assert not guard.inside


def test_a_side_effect_may_ask_and_wait(toy, prompts, recorder):
    guard, written, seen = CaptureGuard(), [], []

    def side_effect():
        seen.append(guard.where.value)
        if not guard.inside:
            guard.consume("writing expert counts")
            written.append(1)

    prompts.side_effect = side_effect
    manager = manager_of(prompts, recorder, guard=guard)
    manager.capture()
    assert written == []
    assert set(seen) == {"the warm-up of a prefill capture", "a prefill capture"}
    graph = manager.pick(8)
    graph.replay(causal)
    assert written == [], "a replay runs no host code of a segment"
    prompts.forward(prompts.inputs(graph.shape), causal)
    assert len(written) == LAYERS


def test_a_side_effect_inside_a_recorded_segment_is_refused(toy, prompts, recorder):
    guard = CaptureGuard()
    prompts.side_effect = lambda: guard.consume("writing") if recorder.recording else None
    manager = manager_of(prompts, recorder, guard=guard)
    with pytest.raises(SideEffectError, match="inside a prefill capture"):
        manager.capture()
    assert not guard.inside and not recorder.recording


def test_attention_between_segments_may_act_on_the_host(toy, prompts, recorder):
    guard, calls = CaptureGuard(), []

    def attend(layer, *args, **kwargs):
        guard.consume("counting")
        calls.append(layer)
        return causal(layer, *args, **kwargs)

    manager = manager_of(prompts, recorder, guard=guard)
    manager.capture()
    manager.pick(8).replay(attend)
    assert calls == list(range(LAYERS))
