"""MTP heads in the engine: what they cache, what they draft, and that nothing committed depends on it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from engines import VOCAB, Driver, Sequence_, tiny_engine, tiny_target
from mtp_models import FAMILIES, family_target, mtp_engine, mtp_head
from torch import Tensor

from speculator.heads.mtp import MtpHead
from speculator.heads.mtp_exact import MtpPlan, exact_mtp
from speculator.heads.probe import DenseProbe, GrowingAttention, fitting
from speculator.types import Draft, DraftShape, SamplingParams
from target.attention.dense import dense_attend
from target.decoder import Decoder

PROMPTS = [[5, 9, 33, 2], list(range(1, 40)), [7], [60, 1]]
CHAIN, TREE = DraftShape(depth=5), DraftShape(depth=4, nodes=14, branching=4)
SAMPLED = SamplingParams(temperature=0.9, seed=11)
KINDS: dict[str, dict[str, object]] = {
    "one": {},
    "pre-norm": {"norm_output": False},
    "B(n)": {"boundaries": (6,)},
    "hidden first": {"hidden_first": True},
    "row 0 zeroed": {"zero_first": True},
    "own tables": {"own_embed": True, "own_lm_head": True},
    "two modules": {"modules": 2},
    "four modules": {"modules": 4, "norm_output": False, "own_lm_head": True},
}


@pytest.fixture(scope="module")
def target() -> Iterator[Decoder]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tiny_target()
    torch.set_num_threads(threads)


def run(
    target: Decoder, head: MtpHead | None, params: list[SamplingParams], shape: DraftShape | None
) -> list[Sequence_]:
    driver = Driver(tiny_engine(target, head), scatter=1)
    sessions = driver.start(PROMPTS, params, shape)
    driver.rounds(sessions, 30, [shape] * len(PROMPTS))
    return sessions


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [CHAIN, TREE, DraftShape(depth=1)], ids=["chain", "tree", "depth 1"])
def test_what_is_committed_does_not_depend_on_the_head(target: Decoder, kind: str, shape: DraftShape) -> None:
    params = [SamplingParams(), SAMPLED, SamplingParams(), SAMPLED]
    plain = [s.produced[:30] for s in run(target, None, params, None)]
    assert [s.produced[:30] for s in run(target, mtp_head(target, **KINDS[kind]), params, shape)] == plain


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("modules", "shape"), [(1, CHAIN), (1, TREE), (3, CHAIN)], ids=["chain", "tree", "modules"])
def test_every_family_is_lossless(family: str, modules: int, shape: DraftShape) -> None:
    target = family_target(family)
    params = [SamplingParams(), SAMPLED, SamplingParams()]
    prompts = [some[:20] for some in PROMPTS[:3]]

    def produced(head: MtpHead | None, shape: DraftShape | None) -> list[list[int]]:
        driver = Driver(mtp_engine(target, head), scatter=1)
        sessions = driver.start(prompts, params, shape)
        driver.rounds(sessions, 16, [shape] * 3)
        return [s.produced[:16] for s in sessions]

    assert produced(mtp_head(target, modules=modules), shape) == produced(None, None)


class Recorder(GrowingAttention):
    """Whole-sequence attention that can be asked for the keys and values it saw."""

    def seen(self, layer: int) -> Tensor:
        return torch.stack(self._seen[layer], dim=2)[0]


def fresh(target: Decoder, head: MtpHead, tokens: list[int]) -> list[Tensor]:
    """Keys and values of each module after a whole-sequence pass over the rows whose tokens are all known."""
    given, attend = torch.tensor([tokens]), Recorder()
    rows = len(tokens) - 1
    positions = torch.arange(rows)[None]
    hidden = target(given[:, :rows], positions, GrowingAttention(), head.taps)
    output, kept = head.fuse(head.features(hidden)), []
    for k in range(head.lookback + 1):
        true = rows - k
        stage = head.stage(k)
        output = head.stage(k)(output[:, :true], given[:, 1 + k :], positions[:, :true], attend)
        kept.append(attend.seen(head.first_layer + k))
        output = stage.recycle(output)
    return kept


def cached(engine: object, layer: int, session: Sequence_, rows: int) -> Tensor:
    cache = engine.cache  # type: ignore[attr-defined]
    slots = [session.pages[i // cache.page_size] * cache.page_size + i % cache.page_size for i in range(rows)]
    return cache.layers[layer][slots]


@pytest.mark.parametrize("modules", [1, 2, 3, 4])
@pytest.mark.parametrize("depth", [1, 2, 5])
@torch.inference_mode()
def test_the_cache_of_every_module_is_that_of_a_whole_pass(target: Decoder, modules: int, depth: int) -> None:
    """After any mix of rounds: drafts of the head, right, half right and wrong ones, rows of one token and chunks."""
    head = mtp_head(target, modules=modules)
    truth = [s.produced for s in run(target, None, [SamplingParams()] * 4, None)]
    driver = Driver(tiny_engine(target, head), scatter=1)
    shape = DraftShape(depth=depth)
    sessions = driver.start(PROMPTS, [SamplingParams()] * 4, shape)
    generator = torch.Generator().manual_seed(0)

    def drafter(s: Sequence_) -> Draft:
        right = int(torch.randint(0, depth + 1, (), generator=generator))
        after = truth[s.row][len(s.produced) : len(s.produced) + depth]
        tokens = tuple(t if i < right else (t + 1) % VOCAB for i, t in enumerate(after))
        return Draft(tokens, tuple(range(-1, len(tokens) - 1)))

    for count in (4, 9, 16):
        driver.rounds(sessions, count, [shape] * 4, drafter)
        for s in sessions:
            tokens = s.tokens[: s.cached + 1]
            for k, expected in enumerate(fresh(target, head, tokens)):
                found = cached(driver.engine, head.first_layer + k, s, len(expected))
                torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("modules", [1, 2, 3, 4])
@torch.inference_mode()
def test_chains_are_those_of_whole_passes(target: Decoder, modules: int) -> None:
    """Each drafted token is the best after a pass of all modules over the sequence and the drafts before it."""
    head = mtp_head(target, modules=modules)
    driver = Driver(tiny_engine(target, head), scatter=1)
    sessions = driver.start(PROMPTS, [SamplingParams()] * 4, CHAIN)
    for _ in range(3):
        for s in sessions:
            assert s.draft is not None
            assert list(s.draft.tokens) == dense_chain(target, head, s.tokens, CHAIN.depth)
        driver.rounds(sessions, min(len(s.produced) for s in sessions) + 1, [CHAIN] * 4)


@torch.inference_mode()
def test_a_row_that_changes_hands_forgets(target: Decoder) -> None:
    head = mtp_head(target, modules=3)
    driver = Driver(tiny_engine(target, head), scatter=1)
    first = driver.start(PROMPTS, [SamplingParams()] * 4, CHAIN)
    driver.rounds(first, 5, [CHAIN] * 4)
    for s in driver.start([prompt[::-1] for prompt in PROMPTS], [SamplingParams()] * 4, CHAIN):
        assert s.draft is not None
        assert list(s.draft.tokens) == dense_chain(target, head, s.tokens, CHAIN.depth)


def dense_chain(target: Decoder, head: MtpHead, tokens: list[int], depth: int) -> list[int]:
    """Drafts by definition: module k over every row, its last tokens drafted; then the last module feeds itself."""
    given, rows = torch.tensor([tokens]), len(tokens) - 1
    positions = torch.arange(rows)[None]
    output = head.fuse(head.features(target(given[:, :rows], positions, GrowingAttention(), head.taps)))
    drafts: list[int] = []
    for k in range(min(depth, head.lookback + 1)):
        stage, attend = head.stage(k), GrowingAttention()
        fed = torch.tensor([[*tokens, *drafts]])[:, 1 + k : 1 + k + rows]
        made = stage(output, fed, positions, attend)
        drafts.append(int(stage.logits(made[:, -1]).argmax()))
        output = stage.recycle(made)
    for extra in range(depth - head.lookback - 1):
        made = stage(output[:, -1:], torch.tensor([[drafts[-1]]]), torch.tensor([[rows + extra]]), attend)
        drafts.append(int(stage.logits(made[:, -1]).argmax()))
        output = stage.recycle(made)
    return drafts


EXACT = [
    MtpPlan(),
    MtpPlan(lag=1, needs="token"),
    MtpPlan(lag=4, hidden_first=True),
    MtpPlan(norm_output=False),
    MtpPlan(raw_input=True),
    MtpPlan(raw_input=True, norm_output=False, lag=3),
    MtpPlan(modules=2),
    MtpPlan(modules=3, norm_output=False),
    MtpPlan(modules=4, lag=4),
    MtpPlan(modules=6, lag=3, raw_input=True, norm_output=False),
]
SPOKEN = [[(7 * i + 3 * j * j) % 24 for j in range(9 + 11 * i)] for i in range(3)]


def exact_sessions(plan: MtpPlan, shape: DraftShape) -> list[Sequence_]:
    target, head = exact_mtp(plan)
    assert isinstance(head, MtpHead)
    driver = Driver(tiny_engine(target, head), scatter=1)
    sessions = driver.start(SPOKEN, [SamplingParams()] * 3, shape)
    driver.rounds(sessions, 8, [shape] * 3)
    # wrong drafts for a while: the rows that rested on them must be run again
    driver.rounds(sessions, 14, [shape] * 3, lambda s: Draft((1,), (-1,)))
    for s in sessions:
        s.accepted.clear()
    driver.rounds(sessions, 40, [shape] * 3)
    return sessions


@pytest.mark.parametrize("plan", EXACT, ids=str)
def test_exact_modules_are_always_accepted(plan: MtpPlan) -> None:
    shape = DraftShape(depth=5)
    assert {a for s in exact_sessions(plan, shape) for a in s.accepted} == {5}


@pytest.mark.parametrize("plan", [plan for plan in EXACT if plan.modules == 1], ids=str)
def test_one_exact_module_is_always_right_in_a_tree(plan: MtpPlan) -> None:
    shape = DraftShape(depth=4, nodes=16, branching=4)
    assert {a for s in exact_sessions(plan, shape) for a in s.accepted} == {4}


def memoryless(family: str, modules: int) -> tuple[Decoder, MtpHead]:
    """A target whose next token follows from the last one alone, and modules that read it off the embedding."""
    target = family_target(family)
    head = mtp_head(target, modules=modules)
    for layer in (*target.layers, *(head.stage(k).get_submodule("layer") for k in range(modules))):
        for name, parameter in layer.named_parameters():
            if name.startswith(("attention.o.", "mlp.down", "mlp.experts.down", "mlp.shared.down")):
                parameter.data.zero_()
    size = target.config.hidden_size
    for k in range(modules):
        module = head.stage(k)
        assert isinstance(module, MtpHead)
        module.embedding_norm.weight.data.fill_(1.0)
        module.norm.weight.data.copy_(target.norm.weight)
        module.eh_proj.weight.data.zero_()
        module.eh_proj.weight.data[:, size if module.record.hidden_first else 0 :][:, :size] = torch.eye(size)
    return target, head


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("modules", [1, 3])
def test_a_memoryless_target_of_every_family_is_always_guessed(family: str, modules: int) -> None:
    target, head = memoryless(family, modules)
    driver = Driver(mtp_engine(target, head), scatter=1)
    sessions = driver.start(PROMPTS[:3], [SamplingParams()] * 3, CHAIN)
    driver.rounds(sessions, 24, [CHAIN] * 3)
    assert {a for s in sessions for a in s.accepted} == {5}
    assert DenseProbe(target, PROMPTS[:3], new_tokens=12, depth=4)(head).rates == (1.0,) * 4


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_the_attention_of_the_probe_is_that_of_the_family(family: str) -> None:
    target = family_target(family)
    tokens, positions = torch.tensor([PROMPTS[1]]), torch.arange(len(PROMPTS[1]))[None]
    expected = target(tokens, positions, dense_attend(target.config)).final
    attend = fitting(GrowingAttention(), target.config)
    parts = [target(tokens[:, cut], positions[:, cut], attend).final for cut in (slice(0, 30), slice(30, None))]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-4, atol=1e-4)
