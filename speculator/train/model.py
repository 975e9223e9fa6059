"""From the sizes of a recipe to models with fresh weights, and from folders to models that train on.

Owns: what is trained before its first step. Must never know losses or data.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import nn

from speculator.heads.base import DraftHead, TargetWeights
from speculator.heads.eagle3 import Eagle3Head
from speculator.heads.load import build_head
from speculator.heads.mtp import MtpHead, mtp_record
from speculator.heads.record import HeadRecord
from speculator.train.experts import prepare_experts
from speculator.train.recipe import DeltaRecipe, Head, MlaRecipe, MoeRecipe, TargetRecipe
from speculator.train.tokenizer import END
from target.config import ModelConfig, RopeConfig
from target.config_hybrid import DeltaNetConfig
from target.config_mla import MlaConfig
from target.config_moe import MoeConfig
from target.decoder import Decoder, init_weights
from target.deltanet import GatedDeltaNet
from target.load import load_target

PARTIAL_ROTARY = 0.25  # of a head, as hybrids are published
STEPS = (0.001, 0.1)  # softplus(dt_bias) of the slowest and the quickest head of a layer


def target_config(recipe: TargetRecipe, vocab_size: int) -> ModelConfig:
    """The config of a recipe: of DeepSeek-V3's family with latents and experts, Qwen3.5's with states, else Llama's."""
    r, hybrid = recipe, recipe.delta is not None
    mla = _mla_config(r.mla) if r.mla else None
    return ModelConfig(
        architecture="DeepseekV3ForCausalLM" if mla else "Qwen3_5ForCausalLM" if hybrid else "LlamaForCausalLM",
        vocab_size=vocab_size,
        hidden_size=r.hidden_size,
        intermediate_size=r.intermediate_size,
        num_layers=r.layers,
        num_heads=r.heads,
        num_kv_heads=r.heads if mla else r.kv_heads,
        head_dim=mla.query_dim if mla else r.head_dim,
        norm_eps=r.norm_eps,
        rope=RopeConfig(r.rope_theta, max_position=r.max_position),
        tied=True,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=hybrid,
        windows=(None,) * r.layers,
        max_position=r.max_position,
        bos_token_id=None,
        eos_token_ids=(END,),
        dtype="bfloat16",
        partial_rotary=PARTIAL_ROTARY if hybrid else 1.0,
        mla=mla,
        moe=_moe_config(r.moe) if r.moe else None,
        delta=_delta_config(r.delta, r.layers) if r.delta else None,
    )


def _delta_config(recipe: DeltaRecipe, layers: int) -> DeltaNetConfig:
    return DeltaNetConfig(
        key_heads=recipe.key_heads,
        value_heads=recipe.value_heads,
        key_dim=recipe.key_dim,
        value_dim=recipe.value_dim,
        kernel=recipe.kernel,
        layers=frozenset(i for i in range(layers) if (i + 1) % recipe.every),
        grouped=False,
    )


def _mla_config(recipe: MlaRecipe) -> MlaConfig:
    return MlaConfig(recipe.q_rank or None, recipe.rank, recipe.nope_dim, recipe.rope_dim, recipe.value_dim)


def _moe_config(recipe: MoeRecipe) -> MoeConfig:
    """All experts in one group: a target this small has no nodes to keep tokens on."""
    return MoeConfig(
        experts=recipe.experts,
        top_k=recipe.top_k,
        inner_size=recipe.inner_size,
        gate="sigmoid",
        normalise=True,
        scale=recipe.scale,
        shared_size=recipe.shared * recipe.inner_size,
        dense_layers=frozenset(range(recipe.dense_layers)),
    )


def new_target(config: ModelConfig, seed: int) -> Decoder:
    """Random weights; what writes to the residual stream starts smaller with depth."""
    model = Decoder(config)
    init_weights(model, torch.Generator().manual_seed(seed))
    for name, parameter in model.named_parameters():
        if name.endswith(("attention.o.weight", "mlp.down.weight", "shared.down.weight", "experts.down")):
            parameter.data /= math.sqrt(2 * config.num_layers)
    _start_states(model)
    prepare_experts(model)
    return model


@torch.no_grad()
def _start_states(model: Decoder) -> None:
    """Memories of many lengths, as in Mamba (arXiv 2312.00752, section 3.6), and convolutions that let pass."""
    for layer in (m for m in model.modules() if isinstance(m, GatedDeltaNet)):
        steps = torch.linspace(math.log(STEPS[0]), math.log(STEPS[1]), layer.sizes.value_heads).exp()
        layer.dt_bias.copy_(torch.expm1(steps).log())
        layer.a_log.copy_(torch.linspace(1, 16, layer.sizes.value_heads).log())
        layer.conv.zero_()[..., -1] = 1.0


def trainable_target(folder: Path) -> Decoder:
    """A saved target in float32 that goes on learning."""
    model = load_target(folder, torch.float32).requires_grad_(True).train()
    prepare_experts(model)
    return model


def new_head(model: Decoder, recipe: Head, taps: tuple[int, ...], seed: int) -> DraftHead:
    """A head that starts from what the target ends with: its final norm, its deepest state, its lm_head."""
    record = mtp_record(model.config) if recipe.kind == "mtp" else _eagle3_record(model.config, recipe, taps)
    head = build_head(record, model)
    init_weights(head, torch.Generator().manual_seed(seed))
    _start_from_target(head, model)
    if record.kind == "eagle3":
        # an EAGLE head does not teach the tables it borrows; MTP modules do (arXiv 2412.19437, section 2.2)
        head.shared = TargetWeights(model.embed.weight.detach(), model.head_weight.detach(), model.config)
    prepare_experts(head)
    return head.to(model.embed.weight.device)


def _eagle3_record(config: ModelConfig, recipe: Head, taps: tuple[int, ...]) -> HeadRecord:
    return HeadRecord(
        kind="eagle3",
        hidden_size=config.hidden_size,
        target_hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        draft_vocab_size=config.vocab_size,
        intermediate_size=recipe.intermediate_size,
        num_layers=1,
        num_heads=recipe.heads,
        num_kv_heads=recipe.kv_heads,
        head_dim=config.head_dim,
        norm_eps=config.norm_eps,
        rope=config.rope,
        boundaries=taps,
        fc_norm=recipe.fc_norm,
        norm_output=recipe.norm_output,
        own_lm_head=recipe.own_lm_head,
    )


@torch.no_grad()
def _start_from_target(head: DraftHead, model: Decoder) -> None:
    assert isinstance(head, Eagle3Head | MtpHead)
    if head.lm_head is not None:
        head.lm_head.weight.copy_(model.head_weight)
    assert head.norm is not None
    head.norm.weight.copy_(model.norm.weight)
    projection = head.eh_proj if isinstance(head, MtpHead) else head.fc
    assert projection is not None
    width = model.config.hidden_size
    projection.weight[:, -width:] += torch.eye(width)  # the deepest tap, or the hidden half


@torch.no_grad()
def round_weights(module: nn.Module, dtype: torch.dtype = torch.bfloat16) -> None:
    """Make float32 parameters hold what the saved half-precision ones will: what is served is what is measured."""
    for parameter in module.parameters():
        parameter.copy_(parameter.to(dtype))
