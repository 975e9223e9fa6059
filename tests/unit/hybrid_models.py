"""Tiny hybrid targets of every family, heads for them, and an engine, shared by the hybrid tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from mtp_models import mtp_head, randomise
from torch import Tensor, nn

from speculator.engine import Engine
from speculator.heads.base import DraftHead
from speculator.heads.load import build_head
from speculator.types import EngineInfo
from target.cache import PagedCache
from target.config import parse_config
from target.decoder import Decoder
from target.gated import GatedSharedMoE
from target.layers import ZeroCentredNorm
from tests.unit.engines import tiny_record

VOCAB = 61
SIZES: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=512, linear_num_key_heads=2, linear_num_value_heads=4,
    linear_key_head_dim=8, linear_value_head_dim=8, rms_norm_eps=1e-6, tie_word_embeddings=False,
    rope_parameters={"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.5},
)  # fmt: skip
EXPERTS = dict(
    num_experts=8, num_experts_per_tok=3, moe_intermediate_size=24, shared_expert_intermediate_size=32,
    norm_topk_prob=True,
)  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "next": {"architectures": ["Qwen3NextForCausalLM"], **EXPERTS},
    "dense": {"architectures": ["Qwen3_5ForCausalLM"]},
    "moe": {"architectures": ["Qwen3_5MoeForCausalLM"], **EXPERTS},
}


def hybrid_target(family: str = "dense", seed: int = 0, **changes: object) -> Decoder:
    target = Decoder(parse_config({**SIZES, **FAMILIES[family], **changes}))
    randomise(target, seed)
    return target.requires_grad_(False).eval()


def hybrid_head(target: Decoder, kind: str, seed: int = 1) -> DraftHead:
    if kind == "mtp":
        return mtp_head(target, seed)
    head = build_head(tiny_record(kind, boundaries=(1, 2, 3) if kind == "eagle3" else ()), target)
    randomise(head, seed)
    return head.requires_grad_(False).eval()


def hybrid_engine(
    target: Decoder, head: DraftHead | None, rows: int = 8, pages: int = 600, page_size: int = 4, **changes: Any
) -> Engine:
    groups = [target.cache_layers] + ([head.cache_layers] if head else [])
    cache = PagedCache(groups, pages, page_size, torch.float32)
    info = EngineInfo(
        target_model="tiny", draft_model="tiny", draft_method=head.record.kind if head else "none", vocab_size=VOCAB,
        eos_token_ids=(), max_context=512, max_rows=rows, page_size=page_size, total_pages=pages,
        scratch_tokens=160, prefill_chunk=16, max_branching=1, **changes,
    )  # fmt: skip
    return Engine(info, target, head, cache)


def token_by_token(patch: pytest.MonkeyPatch, model: nn.Module) -> None:
    """Run what rounds by how many tokens share a pass one token at a time: products, norms, experts."""
    for kind in {type(m) for m in model.modules() if isinstance(m, nn.Linear | GatedSharedMoE)}:
        patch.setattr(kind, "forward", _each(kind.forward))
    patch.setattr(ZeroCentredNorm, "normed", _each(ZeroCentredNorm.normed))


def _each(forward: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """A forward over x [R, T, ...] as R * T of [1, 1, ...], each laid out as if it had come alone."""

    def each(module: nn.Module, x: Tensor) -> Tensor:
        if x.dim() < 3:
            return forward(module, x)
        rows = [[forward(module, _own(t)) for t in row.split(1, dim=1)] for row in x.split(1)]
        return torch.cat([torch.cat(row, dim=1) for row in rows])

    return each


def _own(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)
