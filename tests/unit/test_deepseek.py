"""Latent attention, its place in a decoder layer, and MTP modules beside the layers of a target."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from target.attention.base import bind
from target.attention.dense import LatentCausal, attend_causal, dense_attend
from target.attention.mla import MlaAttention
from target.batch import Batch, causal_positions
from target.cache import LayerShape, PagedCache
from target.config import ModelConfig, RopeConfig, parse_config
from target.config_mla import MlaConfig
from target.decoder import Decoder, DecoderLayer, decoder_rope, init_weights
from target.deepseek import LatentAttention, attention_scale
from target.layers import lay_out_for_cpu
from target.moe import MoE
from target.names import decoder_slots, mtp_names
from target.rope import Rope

SIZE, HEADS = 24, 3
MLA = MlaConfig(q_rank=20, rank=16, nope_dim=12, rope_dim=8, value_dim=10)
ROPE = RopeConfig(theta=100.0)
V3: dict[str, Any] = dict(
    architectures=["DeepseekV3ForCausalLM"], vocab_size=40, hidden_size=SIZE, intermediate_size=32, num_hidden_layers=3,
    num_attention_heads=HEADS, q_lora_rank=20, kv_lora_rank=16, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=10,
    n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=16, n_shared_experts=1, n_group=4, topk_group=2,
    first_k_dense_replace=1, routed_scaling_factor=2.5, tie_word_embeddings=True,
)  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_attention(mla: MlaConfig, rope: RopeConfig = ROPE) -> LatentAttention:
    generator = torch.Generator().manual_seed(0)
    made = LatentAttention(5, SIZE, HEADS, mla, rope)
    for name, parameter in made.named_parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator) + float("norm" in name)
    return made.requires_grad_(False)


def model(**changes: object) -> Decoder:
    made = Decoder(parse_config({**V3, **changes}))
    init_weights(made, torch.Generator().manual_seed(1), std=0.1)
    return made


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, 1e-6)


def turn(x: Tensor, mla: MlaConfig, positions: Tensor) -> Tensor:
    """Rotate the pairs of x [R, T, heads, rope_dim] as complex numbers."""
    half = mla.rope_dim // 2
    angle = positions[..., None, None] * 100.0 ** (-torch.arange(half) / half)
    turns = torch.polar(torch.ones_like(angle), angle)
    if mla.interleaved:
        turned = torch.view_as_complex(x.unflatten(-1, (half, 2))) * turns
        return torch.view_as_real(turned).flatten(-2)
    turned = torch.complex(x[..., :half], x[..., half:]) * turns
    return torch.cat((turned.real, turned.imag), dim=-1)


def materialised(a: LatentAttention, x: Tensor, positions: Tensor) -> Tensor:
    """The form of the paper's equations: keys and values of every head are made from the latent."""
    m = a.mla
    q, latent, key = a.qkv_a(x).split((a.first, m.rank, m.rope_dim), -1)
    if m.q_rank:
        assert a.q_norm is not None and a.q_b is not None
        q = F.linear(norm(q, a.q_norm.weight), a.q_b.weight)
    q = q.unflatten(-1, (HEADS, m.query_dim))
    q = torch.cat((q[..., : m.nope_dim], turn(q[..., m.nope_dim :].contiguous(), m, positions)), -1)
    kv = F.linear(norm(latent, a.kv_norm.weight), a.kv_b).unflatten(-1, (HEADS, m.nope_dim + m.value_dim))
    shared = turn(key[:, :, None].contiguous(), m, positions).expand(-1, -1, HEADS, -1)
    k = torch.cat((kv[..., : m.nope_dim], shared), -1)
    scores = torch.einsum("rthd,rshd->rhts", q, k) / math.sqrt(m.query_dim)
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(later, float("-inf")).softmax(-1)
    return a.o(torch.einsum("rhts,rshd->rthd", weights, kv[..., m.nope_dim :]).flatten(-2))


@pytest.mark.parametrize("interleaved", [True, False], ids=["pairs", "halves"])
@pytest.mark.parametrize("q_rank", [20, None])
def test_the_absorbed_form_is_the_materialised_one(q_rank: int | None, interleaved: bool) -> None:
    mla = replace(MLA, q_rank=q_rank, interleaved=interleaved)
    attention, x = random_attention(mla), torch.randn(2, 9, SIZE)
    positions = torch.stack((torch.arange(9), 40 + torch.arange(9)))
    tables = Rope(ROPE, mla.rope_dim, interleaved)(positions, torch.float32)
    got = attention(x, *tables, LatentCausal(mla.rank))
    torch.testing.assert_close(got, materialised(attention, x, positions), rtol=1e-4, atol=1e-4)


def test_what_a_layer_hands_to_its_attention() -> None:
    """Its cache layer, absorbed queries, the latent normed and the key rotated, and a scale: what a backend stores."""
    attention, x, positions = random_attention(MLA), torch.randn(1, 4, SIZE), torch.arange(4)[None]
    calls: list[tuple[int, Tensor, Tensor, float]] = []

    def attend(layer: int, q: Tensor, latent: Tensor, scale: float) -> Tensor:
        calls.append((layer, q, latent, scale))
        return q[..., : MLA.rank]

    attention(x, *Rope(ROPE, 8, True)(positions, torch.float32), attend)
    ((layer, q, latent, scale),) = calls
    assert (layer, q.shape, latent.shape) == (5, (1, 4, HEADS, 24), (1, 4, 24))
    assert scale == pytest.approx(20**-0.5)
    _, raw, key = attention.qkv_a(x).split((20, 16, 8), -1)
    torch.testing.assert_close(latent[..., :16], norm(raw, attention.kv_norm.weight))
    torch.testing.assert_close(latent[..., 16:], turn(key[:, :, None].contiguous(), MLA, positions)[:, :, 0])


def test_the_scale_under_yarn() -> None:
    """DeepSeek-V3's published numbers: factor 40 and mscale_all_dim 1 sharpen by 1.3689, once for each side."""
    v3 = replace(MLA, nope_dim=128, rope_dim=64)
    yarn = RopeConfig(kind="yarn", scaling={"factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0}, max_position=163840)
    assert attention_scale(v3, yarn) == pytest.approx(192**-0.5 * 1.3688879454113936**2)
    assert attention_scale(v3, replace(yarn, scaling={"factor": 40})) == pytest.approx(192**-0.5)
    assert attention_scale(v3, replace(yarn, kind="default")) == pytest.approx(192**-0.5)


def test_weights_laid_out_for_the_cpu_compute_the_same() -> None:
    attention, x = random_attention(MLA), torch.randn(2, 5, SIZE)
    tables = Rope(ROPE, 8, True)(torch.arange(5).expand(2, -1), torch.float32)
    other = copy.deepcopy(attention)
    lay_out_for_cpu(other)
    assert other.o.weight.stride() == (1, SIZE)
    torch.testing.assert_close(other(x, *tables, LatentCausal(16)), attention(x, *tables, LatentCausal(16)))


# decoder layers and their cache


def test_what_is_cached_per_token() -> None:
    assert model().cache_layers == [LayerShape(1, 24, parts=1)] * 3
    llama = parse_config({**V3, "architectures": ["LlamaForCausalLM"]})
    assert Decoder(llama).cache_layers == [LayerShape(HEADS, 8)] * 3


def test_the_size_of_deepseek_v3() -> None:
    """671 billion parameters, as published."""
    raw = {**V3, "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61,
           "num_attention_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
           "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 256, "num_experts_per_tok": 8, "n_group": 8,
           "topk_group": 4, "moe_intermediate_size": 2048, "first_k_dense_replace": 3,
           "tie_word_embeddings": False}  # fmt: skip
    with torch.device("meta"):
        made = Decoder(parse_config(raw))
    values = sum(tensor.numel() for tensor in made.state_dict().values())
    assert round(values / 1e9) == 671
    assert made.cache_layers == [LayerShape(1, 576, parts=1)] * 61


@pytest.mark.parametrize(("layer", "sparse"), [(0, False), (1, True), (2, True), (3, True)])
def test_layers_by_number_also_beyond_the_target(layer: int, sparse: bool) -> None:
    """An MTP module is layer num_layers of the config, with a place of its own in the cache."""
    made = DecoderLayer(parse_config(V3), layer, cache_layer=7)
    assert isinstance(made.mlp, MoE) == sparse
    assert isinstance(made.attention, LatentAttention) and made.attention.layer == 7
    assert DecoderLayer(parse_config(V3), layer).attention.layer == layer


def test_layers_beyond_the_target_have_no_window() -> None:
    raw = {**V3, "architectures": ["MiMoForCausalLM"], "use_sliding_window": True, "sliding_window": 4}
    config = parse_config({**raw, "max_window_layers": 0})
    windows = [getattr(DecoderLayer(config, i).attention, "window", 0) for i in range(4)]
    assert windows == [4, 4, 4, None]


def test_the_attend_of_a_config() -> None:
    dense = dense_attend(parse_config(V3))
    assert isinstance(dense, LatentCausal) and dense.rank == 16
    assert dense_attend(parse_config({**V3, "architectures": ["LlamaForCausalLM"]})) is attend_causal


def test_paged_decoding_is_the_whole_sequence() -> None:
    """Also for weights of another width of values than of keys, token by token over pages in disorder."""
    made = model().requires_grad_(False).eval()
    tokens = torch.randint(0, 40, (1, 14), generator=torch.Generator().manual_seed(4))
    whole = made(tokens, torch.arange(14)[None], dense_attend(made.config)).final
    cache = PagedCache([made.cache_layers], 12, 4, torch.float32)
    attention, pages = MlaAttention(cache, 16), torch.tensor([[7, 2, 9, 4]])
    for t in range(14):
        at = torch.tensor([t])
        batch = Batch(tokens[:, t : t + 1], causal_positions(at, 1), at, torch.ones(1).long(), pages, longest=t + 1)
        step = made(batch.tokens, batch.positions, bind(attention, batch)).final
        torch.testing.assert_close(step, whole[:, t : t + 1], rtol=1e-4, atol=1e-4)


def test_training_reaches_every_weight() -> None:
    """A few steps on one sequence: the loss falls, and each parameter has had a gradient."""
    made, tokens = model(), torch.randint(0, 40, (4, 17), generator=torch.Generator().manual_seed(3))
    optimizer, attend = torch.optim.Adam(made.parameters(), lr=0.01), dense_attend(made.config)
    losses, reached = [], dict.fromkeys(dict(made.named_parameters()), 0.0)
    for _ in range(8):
        logits = made.logits(made(tokens[:, :-1], torch.arange(16).expand(4, -1), attend).final)
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in made.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            reached[name] = max(reached[name], float(parameter.grad.abs().max()))
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.5
    assert min(reached.values()) > 0, reached


# MTP modules in the target's folder


def v3_mtp(layer: int) -> set[str]:
    ours = ("enorm", "hnorm", "eh_proj", "embed_tokens", "shared_head.norm", "shared_head.head")
    attention = ("q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj")
    mlp = ["gate", *(f"shared_experts.{p}_proj" for p in ("gate", "up", "down"))]
    mlp += [f"experts.{e}.{p}_proj" for e in range(8) for p in ("gate", "up", "down")]
    names = [*ours, "input_layernorm", "post_attention_layernorm", *(f"self_attn.{n}" for n in attention)]
    prefix = f"model.layers.{layer}."
    return {f"{prefix}{n}.weight" for n in [*names, *(f"mlp.{n}" for n in mlp)]} | {
        f"{prefix}mlp.gate.e_score_correction_bias"
    }


def test_mtp_names_are_those_of_the_modules_alone() -> None:
    config = parse_config(V3)
    own = set(decoder_slots(config))
    assert mtp_names(config, own) == set()
    foreign = {
        "model.layers.3.mlp.experts.8.up_proj.weight",
        "model.layers.3.self_attn.q_proj.weight",
        "model.layers.x.a",
    }
    found = own | v3_mtp(3) | v3_mtp(4) | foreign | {"model.layers.3.enorm.bias", "model.layers.2.enorm.weight"}
    assert mtp_names(config, found) == v3_mtp(3) | v3_mtp(4)
    fused = {f"model.layers.3.mlp.experts.{n}" for n in ("gate_up_proj", "down_proj")}
    assert mtp_names(config, fused) == fused


def test_mtp_names_of_mimo() -> None:
    config = parse_config({**V3, "architectures": ["MiMoForCausalLM"]})
    ours = ("token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm", "input_layernorm", "mlp.gate_proj")
    modules = {f"model.mtp_layers.{i}.{n}.weight" for i in (0, 1) for n in (*ours, "self_attn.q_proj")}
    modules.add("model.mtp_layers.0.self_attn.q_proj.bias")
    others = {
        "model.mtp_layers.0.self_attn.o_proj.bias",
        "model.mtp_layers.0.enorm.weight",
        "model.layers.3.enorm.weight",
    }
    assert mtp_names(config, modules | others | set(decoder_slots(config))) == modules


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_families_without_mtp_modules(architecture: str) -> None:
    config: ModelConfig = parse_config({**V3, "architectures": [architecture]})
    assert mtp_names(config, v3_mtp(3)) == set()


def test_the_rope_of_a_config() -> None:
    assert decoder_rope(parse_config(V3)).interleaved
    assert not decoder_rope(parse_config({**V3, "rope_interleave": False})).interleaved
    glm = parse_config({**V3, "architectures": ["Glm4MoeForCausalLM"], "head_dim": 16})
    rope = decoder_rope(glm)
    assert (rope.dim, rope.interleaved) == (8, False)
