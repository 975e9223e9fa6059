"""A tiny DeepSeek-style target (MLA, MoE) with MTP modules, of random weights."""

from __future__ import annotations

import torch

from speculator.heads.base import DraftHead, TargetWeights
from speculator.heads.mtp import MtpHead
from speculator.heads.record import HeadRecord
from target.config import parse_config
from target.decoder import Decoder, init_weights
from tests.unit.engines import VOCAB

LATENT = dict(
    architectures=["DeepseekV3ForCausalLM"], vocab_size=VOCAB, hidden_size=32, intermediate_size=48,
    moe_intermediate_size=16, num_hidden_layers=4, num_nextn_predict_layers=1, num_attention_heads=4,
    num_key_value_heads=4, q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
    n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, n_group=1, topk_group=1, topk_method="noaux_tc",
    scoring_func="sigmoid", norm_topk_prob=True, routed_scaling_factor=1.0, first_k_dense_replace=1,
    rope_theta=10000.0, rms_norm_eps=1e-6, max_position_embeddings=512,
)  # fmt: skip


def latent_pair(modules: int = 1, device: str = "cpu") -> tuple[Decoder, DraftHead]:
    """A target and a head of `modules` MTP modules, ready to serve."""
    config = parse_config(LATENT)
    target = Decoder(config)
    init_weights(target, torch.Generator().manual_seed(0), std=0.25)
    record = HeadRecord(
        kind="mtp", hidden_size=32, target_hidden_size=32, vocab_size=VOCAB, draft_vocab_size=VOCAB,
        intermediate_size=16, num_layers=1, num_heads=4, num_kv_heads=4, head_dim=16, own_lm_head=False,
        norm_output=True, modules=modules,
    )  # fmt: skip
    target = target.to(device).requires_grad_(False).eval()
    shared = TargetWeights(target.embed.weight, target.head_weight, config)
    head = MtpHead(record, shared, config.num_layers)
    init_weights(head, torch.Generator().manual_seed(1), std=0.25)
    return target, head.to(device).requires_grad_(False).eval()
