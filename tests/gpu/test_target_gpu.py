"""The target on CUDA: what transformers computes, and what the proven CPU passes compute for trees and batches."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from target.attention.base import bind
from target.load import load_target
from target.model import Hidden
from tests.gpu.sync import no_waiting
from tests.unit.targets import FAMILIES, LAYERS, Rig, reference_hidden, save_reference, some_tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ALL = tuple(range(LAYERS + 1))
LENGTH = 37


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """float32 means float32: no TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(scope="module", params=list(FAMILIES))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = tmp_path_factory.mktemp("model")
    save_reference(made, request.param)
    return made


def rigs(folder: Path) -> tuple[Rig, Rig]:
    """On the CPU and on the GPU."""
    return Rig(load_target(folder, torch.float32)), Rig(load_target(folder, torch.float32, "cuda"))


def same(got: Hidden, expected: Hidden) -> None:
    for mine, reference in zip((got.final, *got.taps), (expected.final, *expected.taps), strict=True):
        torch.testing.assert_close(mine.cpu(), reference.cpu(), rtol=1e-4, atol=1e-4)


def tree(nodes: int, seed: int) -> tuple[list[int], list[int], list[int]]:
    """Tokens, ancestor masks and depths of a random tree below the context."""
    draw, masks, depths = random.Random(seed), [1], [0]
    for i in range(1, nodes):
        parent = draw.randrange(i)
        masks.append(masks[parent] | 1 << i)
        depths.append(depths[parent] + 1)
    return some_tokens(nodes, seed), [m - (1 << 64) if m >> 63 else m for m in masks], depths


@pytest.mark.parametrize("sizes", [[LENGTH], [5, 1, 16, 2, 13], [1] * LENGTH], ids=["whole", "chunks", "one by one"])
def test_parity_with_transformers(folder: Path, sizes: list[int]) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    tokens, (_, rig) = some_tokens(LENGTH), rigs(folder)
    got = rig.feed(tokens, rig.table(LENGTH), sizes, ALL)
    with torch.inference_mode():
        same(got, reference_hidden(theirs, torch.tensor([tokens])))
        logits = theirs(torch.tensor([tokens])).logits
    torch.testing.assert_close(rig.model.logits(got.final).cpu(), logits, rtol=1e-4, atol=1e-4)


def test_a_batch_of_trees_equals_the_cpu_and_reads_no_unwritten_memory(folder: Path) -> None:
    """Prompts, then trees of 1..64 nodes in one batch, then a level stored above them."""
    prompts = [some_tokens(n, n) for n in (10, 1, 21)]
    trees = [tree(n, n) for n in (3, 64, 1)]
    outputs = []
    for rig in rigs(folder):
        tables = [rig.table(100) for _ in prompts]
        for layer in rig.cache.layers:
            layer[1:] = math.nan
        states = [rig.run(rig.batch(prompts, [0, 0, 0], tables), ALL)]
        tokens, masks, depths = (list(part) for part in zip(*trees, strict=True))
        contexts = [len(p) for p in prompts]
        states.append(rig.run(rig.batch(tokens, contexts, tables, masks, depths), ALL))
        level = rig.batch(
            [[7, 8], [9], [6, 5]], contexts, tables, [[1, 5], [1], [1, 1]], [[1, 2], [1], [1, 1]], offset=64
        )
        states.append(rig.run(level, ALL))
        counts = [list(map(len, prompts)), list(map(len, tokens)), [2, 1, 2]]
        outputs.append([_valid(s, c) for s, c in zip(states, counts, strict=True)])
    for cpu, gpu in zip(*outputs, strict=True):
        same(gpu, cpu)


def _valid(hidden: Hidden, counts: list[int]) -> Hidden:
    def joined(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[row, :count] for row, count in enumerate(counts)])

    return Hidden(joined(hidden.final), tuple(joined(tap) for tap in hidden.taps))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature:UserWarning")
def test_the_body_of_a_pass_never_waits_for_the_device(folder: Path) -> None:
    _, rig = rigs(folder)
    batch = rig.batch([some_tokens(5), some_tokens(3)], [0, 0], [rig.table(8), rig.table(8)])
    with torch.inference_mode():
        attend = bind(rig.attention, batch)
        with no_waiting():
            rig.model.logits(rig.model(batch.tokens, batch.positions, attend, ALL).final)


def rms(x: torch.Tensor) -> float:
    return float(x.float().pow(2).mean().sqrt())


@pytest.mark.parametrize("family", ["llama", "mistral-window", "qwen2", "qwen3"])
def test_bfloat16_errs_no_more_than_transformers(tmp_path: Path, family: str) -> None:
    """As on the CPU: root-mean-square distance from float32 at most 1.25 times that of transformers."""
    exact = save_reference(tmp_path, family)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="eager")
    theirs, ours = theirs.eval().cuda(), load_target(tmp_path, torch.bfloat16, "cuda")
    mine, other = 0.0, 0.0
    for seed in range(8):
        tokens, rig = some_tokens(LENGTH, seed), Rig(ours)
        with torch.inference_mode():
            truth = exact(torch.tensor([tokens])).logits
            got = ours.logits(rig.feed(tokens, rig.table(LENGTH), [LENGTH], ()).final)
            mine += rms(got.cpu().float() - truth) ** 2
            other += rms(theirs(torch.tensor([tokens], device="cuda")).logits.cpu().float() - truth) ** 2
    assert math.sqrt(mine / other) < 1.25, math.sqrt(mine / other)
