"""MTP modules compute what transformers' own reference drafter computes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transformers
from engines import Driver
from mtp_models import family_target, mtp_engine, mtp_head, save_pair
from torch import Tensor
from transformers import AutoModelForCausalLM

from speculator.heads.load import load_head
from speculator.heads.mtp import MtpHead
from speculator.types import DraftShape, SamplingParams
from target.attention.dense import dense_attend
from target.decoder import Decoder
from target.load import load_target

modeling = pytest.importorskip("transformers.modeling_layers")
caches = pytest.importorskip("transformers.cache_utils")
if "MtpModel" not in vars(modeling) or "MtpCache" not in vars(caches):
    pytest.skip(f"transformers {transformers.__version__} has no MTP reference", allow_module_level=True)

transformers.utils.logging.disable_progress_bar()

FAMILIES = ("deepseek", "glm", "glm-qk-norm")  # transformers has no reference for glm4_moe_lite


class Twins(NamedTuple):
    """The same folder read by us and by transformers."""

    target: Decoder
    head: MtpHead
    reference: transformers.PreTrainedModel
    drafter: torch.nn.Module


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=[(f, n) for f in FAMILIES for n in (1, 3)], ids=lambda p: f"{p[0]}-{p[1]}")
def twins(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Twins:
    family, modules = request.param
    made = family_target(family)
    folder: Path = save_pair(made, mtp_head(made, modules=modules), tmp_path_factory.mktemp("model"))
    target = load_target(folder, torch.float32)
    head = load_head(folder, target, torch.float32)
    assert isinstance(head, MtpHead)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    # the reference finds modules by the layer numbers of the published models
    numbers = [rf"model\.layers\.{made.config.num_layers + i}\..*" for i in range(modules)]
    reference._keys_to_ignore_on_load_unexpected = numbers
    return Twins(target, head, reference, modeling.MtpModel.from_pretrained(reference).eval())


@torch.no_grad()
def reference_drafts(twins: Twins, tokens: list[int]) -> tuple[list[int], Tensor]:
    """One greedy draft of each module after `tokens`, and the logits [modules, V] they were taken from."""
    model, drafter = twins.reference, twins.drafter
    given = torch.tensor([tokens])
    final = model(given[:, :-1], output_hidden_states=True).hidden_states[-1]
    cache = caches.MtpCache(config=model.config.get_mtp_config())
    positions = torch.arange(1, len(tokens))[None]
    drafts, logits, _ = drafter(
        input_ids=given[:, 1:], last_hidden_states=final, attention_mask=None, position_ids=positions, mtp_cache=cache
    )
    return drafts[0].tolist(), logits[0]


@torch.no_grad()
def our_drafts(target: Decoder, head: MtpHead, tokens: list[int]) -> tuple[list[int], Tensor]:
    attend, rows = dense_attend(target.config), len(tokens) - 1
    positions = torch.arange(rows)[None]
    state = target(torch.tensor([tokens[:-1]]), positions, attend).final
    drafts: list[int] = []
    logits: list[Tensor] = []
    for k in range(head.lookback + 1):
        stage = head.stage(k)
        fed = torch.tensor([[*tokens, *drafts]])[:, 1 + k : 1 + k + rows]
        output = stage(state, fed, positions, attend)
        logits.append(stage.logits(output[0, -1]))
        drafts.append(int(logits[-1].argmax()))
        state = stage.recycle(output)
    return drafts, torch.stack(logits)


def some_tokens(length: int, seed: int = 3) -> list[int]:
    return torch.randint(0, 60, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("length", [2, 7, 40])
def test_logits_of_every_module(twins: Twins, length: int) -> None:
    tokens = some_tokens(length)
    expected_drafts, expected = reference_drafts(twins, tokens)
    drafts, logits = our_drafts(twins.target, twins.head, tokens)
    assert len(drafts) == twins.head.record.modules
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert drafts == expected_drafts


def test_drafts_of_the_engine_round_by_round(twins: Twins) -> None:
    """Chunked prompts, caches that went through rejected drafts: still the chain of a fresh reference."""
    shape = DraftShape(depth=twins.head.record.modules)
    driver = Driver(mtp_engine(twins.target, twins.head), scatter=1)
    sessions = driver.start([some_tokens(23), some_tokens(5, 4), some_tokens(2, 5)], [SamplingParams()] * 3, shape)
    for _ in range(4):
        for s in sessions:
            assert s.draft is not None
            assert list(s.draft.tokens) == reference_drafts(twins, s.tokens)[0]
        driver.rounds(sessions, min(len(s.produced) for s in sessions) + 1, [shape] * 3)
