"""Kernels of tree rounds on a CUDA device beside torch's operations; whole rounds of trees: test_round_fused_gpu."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from speculator.round_state import MODES
from tests.unit.test_tree_kernels import SHAPES, Reader, both, same_growth

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(find_spec("triton") is None, reason="needs triton"),
]
GPU = torch.device("cuda")


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize(("k", "depth", "nodes"), SHAPES)
def test_a_dynamic_tree_is_that_of_the_twin(k: int, depth: int, nodes: int, warm: bool) -> None:
    """Few different scores, so that many are equal; many of them; and read or written."""
    ids = torch.arange(99, device=GPU) * 3 + 5
    for seed, coarseness in enumerate((1, 3, 50, 1 << 20)):
        for rows in (1, 8):
            found = Reader(rows, k, coarseness, warm, GPU).levels(depth, seed)
            same_growth(found, nodes, ids)
    if not warm:
        same_growth([one.ranking() for one in found], nodes, None)


@pytest.mark.parametrize("mode", MODES[:2])
@pytest.mark.parametrize("rows, nodes, depth", [(1, 32, 6), (8, 32, 6), (5, 63, 10), (3, 7, 2), (64, 9, 3)])
def test_any_verdict_is_that_of_torch(rows: int, nodes: int, depth: int, mode: str) -> None:
    for seed in range(6):
        both(rows, nodes, depth, mode, seed, GPU)
