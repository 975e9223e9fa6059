"""Engines of published shapes with random weights, to time passes without a checkpoint.

Must never be used where acceptance or text matters; whoever prints a figure of one says that it is synthetic.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from speculator.config import load
from speculator.engine import Engine
from speculator.heads.base import TargetWeights
from speculator.heads.eagle3 import Eagle3Head
from speculator.heads.record import HeadRecord
from speculator.load import build_engine, resolve_device
from target.config import parse_config
from target.decoder import Decoder

LLAMA_8B: Mapping[str, Any] = dict(
    architectures=["LlamaForCausalLM"],
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    max_position_embeddings=4096,
    torch_dtype="bfloat16",
)
# name -> config.json, draft vocabulary of the EAGLE-3 head
SHAPES: Mapping[str, tuple[Mapping[str, Any], int]] = {
    "llama-8b": (LLAMA_8B, 32000),
    "llama-tiny": ({**LLAMA_8B, "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4,
                    "num_attention_heads": 4, "num_key_value_heads": 2, "torch_dtype": "float32"}, 256),
}  # fmt: skip


def synthetic_engine(name: str, device: str, sessions: int, sets: Mapping[str, Any]) -> Engine:
    """An engine around a target and an EAGLE-3 head of the shape `name`, depth 7, with the configuration `sets`."""
    raw, draft_vocab = SHAPES[name]
    where = resolve_device(device)
    more = {"model.target": name, "model.head": name, "model.device": device, "draft.depth": 7, **sets}
    config = load(None, [*(f"{key}={value}" for key, value in more.items()), f"engine.max_sessions={sessions}"])

    return build_engine(config, where, lambda: _pair(raw, draft_vocab, where))


def _pair(raw: Mapping[str, Any], draft_vocab: int, device: torch.device) -> tuple[Decoder, Eagle3Head]:
    dtype: torch.dtype = getattr(torch, raw["torch_dtype"])
    with torch.device("meta"):
        target = Decoder(parse_config(raw))
    target = _random(target, dtype, device)
    with torch.device("meta"):
        shared = TargetWeights(target.embed.weight, target.head_weight)
        head = Eagle3Head(_record(target, draft_vocab), shared, target.config.num_layers)
    head = _random(head, dtype, device)
    head.target_ids = torch.arange(draft_vocab, device=device)
    return target, head


Module = TypeVar("Module", bound=nn.Module)


def _random(module: Module, dtype: torch.dtype, device: torch.device) -> Module:
    """Weights of the size that training starts from, made on the device."""
    module = module.to(dtype).to_empty(device=device)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.02) if parameter.dim() > 1 else parameter.fill_(1)
    return module.requires_grad_(False).eval()


def _record(target: Decoder, draft_vocab: int) -> HeadRecord:
    c = target.config
    return HeadRecord(
        kind="eagle3",
        hidden_size=c.hidden_size,
        target_hidden_size=c.hidden_size,
        vocab_size=c.vocab_size,
        draft_vocab_size=draft_vocab,
        intermediate_size=c.intermediate_size,
        num_layers=1,
        num_heads=c.num_heads,
        num_kv_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        boundaries=(2, c.num_layers // 2, c.num_layers - 3) if c.num_layers > 4 else (1, 2, 3),
        d2t=True,
    )
