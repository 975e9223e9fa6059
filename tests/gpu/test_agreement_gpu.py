"""Votes over NCCL, where two GPUs are at hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from graphs.agreement import Agreement, DisagreementError, Group
from tests.unit.ranks import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


def vote(rank: int) -> list[object]:
    """One question agreed on, one not, one more agreed on."""
    torch.cuda.set_device(rank)
    agreement = Agreement(Group(dist.new_group(backend="nccl"), f"cuda:{rank}"))
    agreed = agreement.has_batch("32x8", True, 2048, 512)
    with pytest.raises(DisagreementError) as caught:
        agreement.has_batch("64x8", rank == 0, 512 >> rank, 512)
    return [agreed, str(caught.value), agreement.draft_length(3)]


def test_ranks_agree_and_disagree_over_nccl(tmp_path: Path) -> None:
    first, second = run_ranks(vote, 2, tmp_path, limit=60.0, afresh=True)
    assert first.value == second.value, (first, second)
    agreed, text, length = first.value
    assert (agreed, length) == (True, 3)
    assert "rank 1: no, room for 256 tokens where 512 are needed; rank 0: yes" in text
