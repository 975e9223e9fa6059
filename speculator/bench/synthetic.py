"""Engines of published shapes with random weights, to time passes without a checkpoint.

Must never be used where acceptance or text matters; whoever prints a figure of one says that it is synthetic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from speculator.config import load
from speculator.engine import Engine
from speculator.heads.base import DraftHead, TargetWeights
from speculator.heads.eagle3 import Eagle3Head
from speculator.heads.load import lend
from speculator.heads.mtp import MtpHead, mtp_record
from speculator.heads.record import HeadRecord
from speculator.load import build_engine, resolve_device
from target.config import ModelConfig, parse_config
from target.decoder import Decoder
from target.deltanet import GatedDeltaNet

Pair = tuple[Decoder, DraftHead]
REMEMBERS = -5.0  # a bias with which a random gated delta rule keeps 98 % of its state from token to token

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
QWEN3_8B: Mapping[str, Any] = {
    **LLAMA_8B, "architectures": ["Qwen3ForCausalLM"], "vocab_size": 151936, "intermediate_size": 12288,
    "head_dim": 128, "num_hidden_layers": 36, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
}  # fmt: skip
LLAMA_1B: Mapping[str, Any] = {
    **LLAMA_8B, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64,
    "tie_word_embeddings": True,
}  # fmt: skip
# What one of four tensor-parallel ranks holds of a 70B: heads, inner columns and vocabulary divided, no all-reduce.
LLAMA_70B_SHARE: Mapping[str, Any] = {
    **LLAMA_8B, "vocab_size": 32064, "hidden_size": 8192, "intermediate_size": 7168, "num_hidden_layers": 80,
    "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 128,
}  # fmt: skip
# name -> config.json, draft vocabulary of the EAGLE-3 head
SHAPES: Mapping[str, tuple[Mapping[str, Any], int]] = {
    "llama-8b": (LLAMA_8B, 32000),
    "llama-3.1-8b": (LLAMA_8B, 32000),
    "qwen3-8b": (QWEN3_8B, 32000),
    "llama-3.2-1b": (LLAMA_1B, 32000),
    "llama-3.1-70b-tp4": (LLAMA_70B_SHARE, 8000),
    "llama-tiny": ({**LLAMA_8B, "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4,
                    "num_attention_heads": 4, "num_key_value_heads": 2, "torch_dtype": "float32"}, 256),
}  # fmt: skip
HYBRID_27B: Mapping[str, Any] = dict(
    architectures=["Qwen3_5ForCausalLM"],
    vocab_size=248320,
    hidden_size=5120,
    intermediate_size=17408,
    num_hidden_layers=64,
    num_attention_heads=24,
    num_key_value_heads=4,
    head_dim=256,
    linear_num_key_heads=16,
    linear_num_value_heads=48,
    linear_key_head_dim=128,
    linear_value_head_dim=128,
    rms_norm_eps=1e-6,
    rope_parameters={"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
    max_position_embeddings=262144,
    torch_dtype="bfloat16",
)
# name -> config.json of a gated DeltaNet hybrid, which drafts with one MTP module
HYBRIDS: Mapping[str, Mapping[str, Any]] = {
    "hybrid-4b": {**HYBRID_27B, "hidden_size": 2560, "intermediate_size": 9216, "num_hidden_layers": 32,
                  "num_attention_heads": 16, "linear_num_value_heads": 32, "tie_word_embeddings": True},
    "qwen3.6-27b": HYBRID_27B,
    "hybrid-nano": {**HYBRID_27B, "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128,
                    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
                    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
                    "linear_value_head_dim": 16, "torch_dtype": "float32"},
}  # fmt: skip


def synthetic_engine(name: str, device: str, sessions: int, sets: Mapping[str, Any]) -> Engine:
    """An engine around a target and an EAGLE-3 head of the shape `name`, depth 7, with the configuration `sets`."""
    raw, draft_vocab = SHAPES[name]
    return _engine(name, device, sessions, sets, lambda where: _pair(raw, draft_vocab, where))


def hybrid_engine(name: str, device: str, sessions: int, sets: Mapping[str, Any], layers: int = 0) -> Engine:
    """The same around a hybrid target and an MTP module; `layers` keeps the first ones only, 0 all of them."""
    raw = {**HYBRIDS[name], **({"num_hidden_layers": layers} if layers else {})}
    return _engine(name, device, sessions, sets, lambda where: _hybrid_pair(raw, where))


def _engine(
    name: str, device: str, sessions: int, sets: Mapping[str, Any], pair: Callable[[torch.device], Pair]
) -> Engine:
    where = resolve_device(device)
    more = {"model.target": name, "model.head": name, "model.device": device, "draft.depth": 7, **sets}
    config = load(None, [*(f"{key}={value}" for key, value in more.items()), f"engine.max_sessions={sessions}"])
    return build_engine(config, where, lambda: pair(where))


def _hybrid_pair(raw: Mapping[str, Any], device: torch.device) -> tuple[Decoder, MtpHead]:
    dtype: torch.dtype = getattr(torch, raw["torch_dtype"])
    with torch.device("meta"):
        target = Decoder(parse_config(raw))
    target = random_weights(target, dtype, device)
    for layer in (module for module in target.modules() if isinstance(module, GatedDeltaNet)):
        layer.dt_bias.fill_(REMEMBERS), layer.conv.normal_(0, 0.5)
    with torch.device("meta"):
        head = MtpHead(mtp_record(target.config), lend(mtp_record(target.config), target), len(target.cache_layers))
    return target, random_weights(head, dtype, device)


def _pair(raw: Mapping[str, Any], draft_vocab: int, device: torch.device) -> tuple[Decoder, Eagle3Head]:
    dtype: torch.dtype = getattr(torch, raw["torch_dtype"])
    with torch.device("meta"):
        target = Decoder(parse_config(raw))
    target = random_weights(target, dtype, device)
    with torch.device("meta"):
        shared = TargetWeights(target.embed.weight, target.head_weight)
        head = Eagle3Head(eagle3_record(target.config, draft_vocab), shared, target.config.num_layers)
    head = random_weights(head, dtype, device)
    head.target_ids = torch.arange(draft_vocab, device=device)
    return target, head


Module = TypeVar("Module", bound=nn.Module)


def random_weights(module: Module, dtype: torch.dtype, device: torch.device) -> Module:
    """Weights of the size that training starts from, made on the device."""
    module = module.to(dtype).to_empty(device=device)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.02) if parameter.dim() > 1 else parameter.fill_(1)
    return module.requires_grad_(False).eval()


def eagle3_record(target: ModelConfig, draft_vocab: int) -> HeadRecord:
    """Of an EAGLE-3 head with a layer like the target's."""
    c = target
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
