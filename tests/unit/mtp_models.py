"""Tiny targets of the families with MTP modules, and random modules for them, shared by the MTP tests."""

from __future__ import annotations

from pathlib import Path

import torch

from speculator.engine import Engine
from speculator.heads.load import build_head
from speculator.heads.mtp import MtpHead, mtp_record
from speculator.heads.mtp_save import save_mtp
from speculator.passes import EagerPasses
from speculator.types import EngineInfo
from target.attention.mla import MlaAttention
from target.attention.sdpa import SdpaAttention
from target.cache import PagedCache
from target.config import parse_config
from target.decoder import Decoder, init_weights
from target.save import save_target

SIZES: dict[str, object] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
EXPERTS: dict[str, object] = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
    "norm_topk_prob": True,
}
LATENT: dict[str, object] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
FAMILIES: dict[str, dict[str, object]] = {
    "mimo": {"architectures": ["MiMoForCausalLM"], "head_dim": 8, "attention_bias": True},
    "deepseek": {"architectures": ["DeepseekV3ForCausalLM"], **EXPERTS, **LATENT},
    "glm": {"architectures": ["Glm4MoeForCausalLM"], **EXPERTS, "head_dim": 16, "attention_bias": True},
    "glm-lite": {"architectures": ["Glm4MoeLiteForCausalLM"], **EXPERTS, **LATENT},
    "glm-qk-norm": {"architectures": ["Glm4MoeForCausalLM"], **EXPERTS, "head_dim": 16, "use_qk_norm": True},
}


def randomise(module: torch.nn.Module, seed: int, std: float = 0.25) -> None:
    """Norms, biases and gate corrections too, so that a forgotten one shows."""
    generator = torch.Generator().manual_seed(seed)
    init_weights(module, generator, std)
    for name, parameter in module.named_parameters():
        if parameter.dim() == 1:
            centre = 0.0 if name.endswith("bias") else 1.0
            parameter.data.normal_(centre, 0.2, generator=generator)
    for name, buffer in module.named_buffers():
        if name.endswith("correction"):
            buffer.normal_(0.0, 0.2, generator=generator)


def family_target(family: str, seed: int = 0, **changes: object) -> Decoder:
    target = Decoder(parse_config({**SIZES, **FAMILIES[family], **changes}))
    randomise(target, seed)
    return target.requires_grad_(False).eval()


def mtp_head(target: Decoder, seed: int = 1, **changes: object) -> MtpHead:
    order = {"hidden_first": target.config.architecture == "MiMoForCausalLM"}
    head = build_head(mtp_record(target.config, **{**order, **changes}), target)
    randomise(head, seed)
    assert isinstance(head, MtpHead)
    return head.requires_grad_(False).eval()


def save_pair(target: Decoder, head: MtpHead, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    save_target(target, folder, dtype)
    save_mtp(head, folder, dtype)
    return folder


def mtp_engine(target: Decoder, head: MtpHead | None, pages: int = 600, page_size: int = 4) -> Engine:
    """An engine on the reference attention of the target's family."""
    c = target.config
    groups = [target.cache_layers] + ([head.cache_layers] if head else [])
    cache = PagedCache(groups, pages, page_size, torch.float32)
    info = EngineInfo(
        target_model="tiny", draft_model="tiny", draft_method="mtp" if head else "none", vocab_size=c.vocab_size,
        eos_token_ids=(), max_context=512, max_rows=8, page_size=page_size, total_pages=pages,
        scratch_tokens=160, prefill_chunk=16,
    )  # fmt: skip
    attention = MlaAttention(cache, c.mla.rank, backend="torch") if c.mla else SdpaAttention(cache)
    return Engine(info, target, head, cache, EagerPasses(target, head, attention, attention))
