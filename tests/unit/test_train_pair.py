"""Training and measuring a tiny pair: the unrolled head equals the served recursion, tau equals a plain simulation."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from speculator.config import load as load_config
from speculator.heads.base import DraftHead
from speculator.load import load_engine
from speculator.local import LocalSequence
from speculator.train.answers import Written, load_written, save_written
from speculator.train.attention import hidden_rows
from speculator.train.companion import CompanionTrainer
from speculator.train.data import ANSWER, REPEATED, SKIP, Document, Stream
from speculator.train.decode import DenseCache, decode_sorted
from speculator.train.evaluate import chain_figures, greedy_drafts, replay
from speculator.train.folders import head_folder, load_trained_head, save_trained_head
from speculator.train.head import HeadData, Rows, head_loss, train_head, unroll
from speculator.train.model import new_head, new_target, round_weights, target_config
from speculator.train.pretrain import heldout_losses, language_loss, make_loss, train_phase
from speculator.train.recipe import (
    Companion,
    DeltaRecipe,
    Head,
    Learning,
    MlaRecipe,
    MoeRecipe,
    Phase,
    Refine,
    TargetRecipe,
)
from speculator.train.refine import _documents
from speculator.train.tokenizer import ASSISTANT, END, USER
from speculator.types import DraftShape, SamplingParams
from target.attention.dense import dense_attend
from target.decoder import Decoder
from target.load import load_target
from target.save import save_target

V = 64
SIZES = TargetRecipe(hidden_size=32, layers=4, heads=4, kv_heads=2, head_dim=8, intermediate_size=48)
HEAD = Head(
    intermediate_size=48, heads=4, kv_heads=2, seconds=60, steps=150, rows=8, length=48, unroll=4, taps=(1, 2, 4),
    alive=0.5, acceptance=0.3, learning=Learning(adam=0.01, muon=0.03),
)  # fmt: skip
KINDS = {
    "eagle3": (SIZES, HEAD),
    "mtp": (
        replace(
            SIZES,
            mla=MlaRecipe(rank=16, nope_dim=8, rope_dim=4, value_dim=8),
            moe=MoeRecipe(experts=4, top_k=2, inner_size=16),
        ),
        replace(HEAD, kind="mtp", taps=()),
    ),
    "hybrid": (
        replace(SIZES, delta=DeltaRecipe(key_heads=2, value_heads=4, key_dim=8, value_dim=8)),
        replace(HEAD, kind="mtp", taps=()),
    ),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(kind: str) -> Decoder:
    return noisy(new_target(target_config(KINDS[kind][0], V), seed=0), seed=1)


@pytest.fixture(scope="module")
def head(model: Decoder, kind: str) -> DraftHead:
    return noisy(new_head(model, KINDS[kind][1], KINDS[kind][1].taps, seed=1), seed=2)


M = TypeVar("M", bound=torch.nn.Module)


def noisy(module: M, seed: int) -> M:
    """So that no part of it is too faint to matter."""
    noise = torch.Generator().manual_seed(seed)
    for parameter in module.requires_grad_(False).parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=noise)
    return module


class Served:
    """A head with a growing cache, one chain at a time: what an engine does, without pages."""

    def __init__(self, head: DraftHead) -> None:
        self.head, self.cache = head, dict[int, tuple[Tensor, Tensor]]()
        self.attend = self.latent if head.latent else self.grouped

    def grouped(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        return self._attend(layer, q, k, v, None)

    def latent(self, layer: int, q: Tensor, latent: Tensor, scale: float) -> Tensor:
        assert self.head.shared.config and self.head.shared.config.mla
        each = latent[:, :, None]
        return self._attend(layer, q, each, each[..., : self.head.shared.config.mla.rank], scale)

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        if layer in self.cache:
            k, v = (torch.cat(pair, 1) for pair in zip(self.cache[layer], (k, v), strict=True))
        self.cache[layer] = (k, v)
        mask = torch.ones(q.shape[1], k.shape[1]).tril(k.shape[1] - q.shape[1]).bool()
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2).transpose(1, 2) for x in (k, v))
        return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, scale=scale).transpose(1, 2)

    def catch_up(self, features: Tensor, tokens: Tensor) -> Tensor:
        """features [1, n, F], the n tokens after them -> last output."""
        positions = torch.arange(features.shape[1])[None]
        return self.head(self.head.fuse(features), tokens, positions, self.attend)[:, -1:]

    def go_on(self, output: Tensor, token: Tensor, position: int) -> Tensor:
        return self.head(self.head.recycle(output), token, torch.tensor([[position]]), self.attend)


def features_of(model: Decoder, head: DraftHead, tokens: Tensor) -> Tensor:
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    return head.features(model(tokens, positions, dense_attend(model.config), head.taps))


def test_unrolled_head_is_the_served_recursion(model: Decoder, head: DraftHead) -> None:
    tokens = torch.randint(5, V, (1, 20), generator=torch.Generator().manual_seed(3))
    features, n = features_of(model, head, tokens), 16
    positions = torch.arange(20)[None]
    outputs = unroll(head, features[:, :n], tokens, positions, hidden_rows(torch.zeros(1, n)), 4)
    for t in (0, 4, 15):
        served = Served(head)
        output = served.catch_up(features[:, : t + 1], tokens[:, 1 : t + 2])
        torch.testing.assert_close(outputs[0][:, t], output[:, 0], atol=1e-5, rtol=1e-4)
        for j in range(1, 4):
            output = served.go_on(output, tokens[:, t + 1 + j, None], t + j)
            torch.testing.assert_close(outputs[j][:, t], output[:, 0], atol=1e-5, rtol=1e-4)


def test_modules_teach_the_tables_they_share_and_eagle_heads_do_not(kind: str) -> None:
    model = new_target(target_config(KINDS[kind][0], V), seed=0)
    head = new_head(model, KINDS[kind][1], KINDS[kind][1].taps, seed=0)
    tokens = torch.tensor([[7]])
    output = head(
        torch.ones(1, 1, SIZES.hidden_size), tokens, torch.zeros(1, 1, dtype=torch.int64), Served(head).attend
    )
    head.logits(output).sum().backward()
    assert (model.embed.weight.grad is not None) is (KINDS[kind][1].kind == "mtp")


def packed(tokens: list[int], documents: list[int]) -> Rows:
    positions = [i - documents.index(d) for i, d in enumerate(documents)]
    columns = (torch.tensor([c]) for c in (tokens, documents, positions))
    return Rows(*columns, torch.ones(1, len(tokens), dtype=torch.bool))


def test_packed_documents_do_not_touch(model: Decoder, head: DraftHead, kind: str) -> None:
    draw = random.Random(0)
    first, second, other = ([draw.randrange(5, V) for _ in range(14)] for _ in range(3))
    recipe = replace(KINDS[kind][1], outside=0.0)
    losses = []
    for before in (first, other):
        rows = packed([*before, *second], [0] * 14 + [1] * 14)
        only_second = rows._replace(answers=torch.tensor([[False] * 14 + [True] * 14]))
        losses.append(head_loss(head, model, only_second, recipe, torch.tensor(0.0))[0])
    torch.testing.assert_close(*losses)
    moved = packed([*second, *second], [0] * 14 + [1] * 14)
    assert not torch.allclose(head_loss(head, model, moved, recipe, torch.tensor(0.0))[0], losses[0])


def test_drafts_and_replay_equal_a_simulation(model: Decoder, head: DraftHead) -> None:
    draw = random.Random(1)
    prompts = [[draw.randrange(5, V) for _ in range(n)] for n in (3, 9, 6)]
    answers = decode_sorted(model, prompts, 24, [0.0] * 3, rows=2, seed=0)
    texts = [Written(p, a) for p, a in zip(prompts, answers, strict=True)]
    drafts = greedy_drafts(head, model, texts, depth=3)
    for text, rows in zip(texts, drafts, strict=True):
        rounds = replay(text, rows, depth=3, limit=20)
        assert [r.committed for r in rounds] == simulate(model, head, text, depth=3, limit=20)


def simulate(model: Decoder, head: DraftHead, text: Written, depth: int, limit: int) -> list[int]:
    """Draft, run the target, keep what agrees: from scratch in every round."""
    committed, counts = [*text.prompt, text.answer[0]], []
    while len(committed) < len(text.prompt) + min(limit, len(text.answer)) and committed[-1] != END:
        tokens = torch.tensor([committed])
        served = Served(head)
        output = served.catch_up(features_of(model, head, tokens[:, :-1]), tokens[:, 1:])
        chain = []
        for j in range(depth):
            chain.append(head.logits(output).argmax(-1))
            output = served.go_on(output, chain[-1], len(committed) - 1 + j)
        drafted = torch.cat([tokens, *chain], 1)
        positions = torch.arange(drafted.shape[1])[None]
        best = model.logits(model(drafted, positions, dense_attend(model.config)).final).argmax(-1)[0].tolist()
        before = len(committed)
        for guess in [*(int(c) for c in chain), -1]:
            committed.append(best[len(committed) - 1])
            if committed[-1] in (END,) or committed[-1] != guess:
                break
        counts.append(len(committed) - before)
    return counts


def test_the_engine_drafts_what_training_unrolls(model: Decoder, head: DraftHead, kind: str, tmp_path: Path) -> None:
    """After each round of the real engine, on pages: its chain is that of the unrolled head at this row."""
    save_target(model, tmp_path / "target")
    save_trained_head(head, model, tmp_path)
    target = load_target(tmp_path / "target", torch.float32)
    where = KINDS[kind][1].kind
    saved = load_trained_head(where, target, tmp_path)
    sets = {"target": tmp_path / "target", "head": head_folder(tmp_path, where), "device": "cpu"}
    engine = load_engine(load_config(None, [*(f"model.{k}={v}" for k, v in sets.items()), "engine.max_sessions=1"]))
    seen = set[tuple[int, ...]]()
    for length in range(5, 15):
        prompt = [random.Random(length).randrange(5, V) for _ in range(length)]
        (answer,) = decode_sorted(target, [prompt], 30, [0.0], rows=1, seed=0)
        (rows,) = greedy_drafts(saved, target, [Written(prompt, answer)], depth=4)
        sequence = LocalSequence(engine, 0, SamplingParams(), DraftShape(4))
        sequence.tokens = list(prompt)
        for number in range(4):
            step = sequence.round() if number else sequence.feed()
            sequence.take(step, engine.step([step])[0])
            assert sequence.draft is not None
            assert list(sequence.draft.tokens) == rows[len(sequence.tokens) - 2]
            seen.add(tuple(sequence.draft.tokens))
        assert sequence.tokens == [*prompt, *answer][: len(sequence.tokens)]
        engine.close(0)
    assert len(seen) > 8  # else it would show little


@pytest.mark.parametrize(
    ("drafts", "expected"),
    [([10, 11, 12, 13], [4, 4]), ([0, 0, 0, 0], [1] * 8), ([10, 0, 12, 13], [2] * 4)],
)
def test_replay_counts(drafts: list[int], expected: list[int]) -> None:
    answer = [9, 10, 11, 12, 13, 14, 15, 16, END]
    right = [[*answer[t + 1 :], 99, 99, 99][:3] for t in range(9)]
    rows = [[0] * 3, *[[r if d else 63 for r, d in zip(row, drafts, strict=False)] for row in right]]
    rounds = replay(Written([5, 6], answer), rows, depth=3, limit=100)
    assert [r.committed for r in rounds] == expected
    figures = chain_figures(rounds, 3)
    assert figures["tau"] == round(8 / len(expected), 4) and len(figures["survival"]) == 3


def test_replay_stops_at_the_limit_and_after_an_end() -> None:
    never = [[63] * 3] * 20
    assert len(replay(Written([5], [6] * 15), never, 3, limit=10)) == 9
    assert replay(Written([5], [END]), never, 3, limit=10) == []


def test_the_dense_cache_is_attention_over_the_whole_sequence(model: Decoder) -> None:
    tokens = torch.randint(5, V, (2, 9), generator=torch.Generator().manual_seed(5))
    positions, cache = torch.arange(9).expand_as(tokens), DenseCache(model, 2, 12)
    expected = model(tokens, positions, dense_attend(model.config)).final
    for at, end in ((0, 6), (6, 7), (7, 8), (8, 9)):
        final = model(tokens[:, at:end], positions[:, at:end], cache.attend).final
        cache.at = end
        torch.testing.assert_close(final, expected[:, at:end], atol=1e-5, rtol=1e-4)


def test_decoding_equals_one_by_one(model: Decoder) -> None:
    prompts = [[7, 8, 9], [10, 11, 12, 13, 14, 15], [20]]
    together = decode_sorted(model, prompts, 12, [0.0] * 3, rows=3, seed=0)
    for prompt, answer in zip(prompts, together, strict=True):
        tokens = list(prompt)
        for token in answer:
            positions = torch.arange(len(tokens))[None]
            final = model(torch.tensor([tokens]), positions, dense_attend(model.config)).final
            assert int(model.logits(final[0, -1]).argmax()) == token
            tokens.append(token)
        assert len(answer) == 12 or answer[-1] == END


def toy_stream() -> Stream:
    import numpy as np

    one = [USER, 5, 6, END, ASSISTANT, *range(10, 30), END]
    tokens = np.array(one * 60, np.uint16)
    return Stream(tokens, np.full(len(tokens), ANSWER, np.uint8), np.arange(0, len(tokens), len(one)), True)


def test_a_target_and_its_head_learn_and_survive_saving(tmp_path: Path, kind: str) -> None:
    streams, cpu = {"toy": toy_stream()}, torch.device("cpu")
    sizes, recipe = KINDS[kind]
    model = new_target(target_config(sizes, V), seed=0)
    phase = Phase("p", 60, 60, 8, 48, {"toy": 1.0}, learning=Learning(adam=0.01, muon=0.03))
    before = heldout_losses(model, streams, 40, cpu, rows=4)["toy"]
    train_phase(model, make_loss(model, cpu), phase, streams, cpu, seed=0)
    assert heldout_losses(model, streams, 40, cpu, rows=4)["toy"] < before / 4

    round_weights(model)
    save_target(model, tmp_path / "target")
    loaded = load_target(tmp_path / "target", torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))

    prompts = [[USER, 5, 6, END, ASSISTANT]] * 4
    texts = [Written(p, a) for p, a in zip(prompts, decode_sorted(loaded, prompts, 30, [0.0] * 4, 4, 0), strict=True)]
    assert texts[0].answer == [*range(10, 30), END]
    data = HeadData([t.document() for t in texts], recipe.length, cpu, seed=0)
    head = new_head(loaded, recipe, recipe.taps, seed=0)
    curve = train_head(head, loaded, data, recipe)
    assert curve[-1]["agree_0"] > 0.95

    for _ in range(2):  # the second time over the first
        save_trained_head(head, loaded, tmp_path)
    again = load_trained_head(recipe.kind, loaded, tmp_path)
    round_weights(head)
    assert replace(again.record, rope=head.record.rope) == head.record
    assert greedy_drafts(again, loaded, texts, 3) == greedy_drafts(head, loaded, texts, 3)
    rounds = replay(texts[0], greedy_drafts(again, loaded, texts[:1], 3)[0], 3, 30)
    assert chain_figures(rounds, 3)["tau"] > 3.0


def test_unlikelihood_falls_on_the_repeated_tokens_only() -> None:
    model = new_target(target_config(SIZES, V), seed=0)
    tokens = torch.tensor([[5, 6, 7, 8, 9]])
    unlike = torch.tensor([[0.0, 0.0, 1.0, 0.0]])
    _, value = language_loss(model, tokens, torch.ones(1, 4), unlike)
    positions = torch.arange(4)[None]
    p = model.logits(model(tokens[:, :4], positions, dense_attend(model.config)).final).softmax(-1)[0, 2, 8]
    torch.testing.assert_close(value, -torch.log(1 - p))


def test_refinement_imitates_clean_answers_and_marks_repeated_ones() -> None:
    recipe = Refine(1.0, 1, 1, 1, 1, 1, 1, {})
    prompt = [1, ASSISTANT]
    clean, looping = Written(prompt, [10, 11, 12, END]), Written(prompt, [10, 11, 12, 13] * 3)
    documents: list[Document] = _documents([clean, looping, looping], [0.7, 0.0, 0.7], recipe)
    assert [d.marks.tolist() for d in documents] == [
        [SKIP] * 2 + [ANSWER] * 4,
        [SKIP] * 2 + [SKIP] * 7 + [REPEATED] * 5,
    ]


def test_answers_survive_saving(tmp_path: Path) -> None:
    written = [Written([1, 2, 3], [4]), Written([5], []), Written([6], [7, 8])]
    save_written(written, tmp_path / "a.npz")
    assert load_written(tmp_path / "a.npz") == written


def test_labels_say_how_much_a_target_may_give_way() -> None:
    """Its last norm shapes predictions alone, its layers the features too."""
    reached = {}
    draw = random.Random(3)
    tokens = [draw.randrange(5, V) for _ in range(28)]
    for share in (0.0, 0.5, 1.0):
        target = new_target(target_config(KINDS["eagle3"][0], V), seed=0)
        learner = new_head(target, KINDS["eagle3"][1], KINDS["eagle3"][1].taps, seed=0)
        rows = packed(tokens, [0] * 28)
        head_loss(learner, target, rows, KINDS["eagle3"][1], torch.tensor(0.0), torch.tensor(share))[0].backward()
        norm, layer = target.norm.weight.grad, target.layers[0].mlp.down.weight.grad
        assert layer is not None and layer.abs().sum() > 0
        reached[share] = torch.zeros_like(target.norm.weight) if norm is None else norm
    assert reached[0.0].abs().max() == 0
    torch.testing.assert_close(reached[0.5] * 2, reached[1.0])


def test_a_target_that_says_the_same_to_everybody_must_give_way_less() -> None:
    target = new_target(target_config(SIZES, V), seed=0)
    learner = new_head(target, HEAD, HEAD.taps, seed=0)
    recipe = Companion(
        ("refine",), {"toy": 1.0}, rows=2, length=20, unroll=2, documents=8,
        labels=0.1, refine_labels=0.5, shared_limit=0.2, goal=0.5, refine_goal=0.9,
    )  # fmt: skip
    companion = CompanionTrainer(learner, target, recipe, HEAD, {"toy": toy_stream()}, seed=0)
    answers = [Written([USER, 5, END, ASSISTANT], [*range(10, 20), END]).document()] * 4
    seen = [float(companion.labels)]
    for shared in (0.0, 0.5, 0.5, 0.0, 0.0, 0.0, 0.0):
        companion.read(answers, shared)
        seen.append(float(companion.labels))
    assert seen[:2] == pytest.approx([0.1, 0.5]) and companion.goal == 0.9
    assert seen[3] < seen[2] < seen[1] / 2, "stock phrases: less of the gradient reaches the predictions"
    assert seen[3] < seen[4] < seen[5] <= 0.5, "and more again when they are gone"
