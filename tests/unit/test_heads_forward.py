"""What each switch does to the forward, against small references that share no code with the heads.

The references follow the published forwards of EAGLE-1 and EAGLE-3: plain loops over rows, one weight table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from speculator.heads.load import build_head
from speculator.heads.names import head_slots
from speculator.heads.probe import GrowingAttention, UnrolledAttention
from speculator.heads.record import HeadRecord
from target.attention.dense import attend_causal
from target.config import RopeConfig, parse_config
from target.decoder import Decoder, init_weights
from target.model import Hidden
from target.weights import export_tensors

V, H, HD, NH, NKV, T = 40, 24, 6, 4, 2, 6
EPS, THETA = 1e-5, 5000.0
Weights = Mapping[str, Tensor]


def tiny_target() -> Decoder:
    raw = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": V,
        "hidden_size": H,
        "intermediate_size": 40,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
    }
    target = Decoder(parse_config(raw))
    init_weights(target, torch.Generator().manual_seed(0), std=0.3)
    return target.requires_grad_(False).eval()


TARGET = tiny_target()
RECORD = HeadRecord(
    kind="eagle3",
    hidden_size=H,
    target_hidden_size=H,
    vocab_size=V,
    draft_vocab_size=V,
    intermediate_size=20,
    num_layers=1,
    num_heads=NH,
    num_kv_heads=NKV,
    head_dim=HD,
    norm_eps=EPS,
    rope=RopeConfig(THETA),
    boundaries=(2, 4, 5),
)
EAGLE = replace(RECORD, kind="eagle", boundaries=(), own_lm_head=False)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS) * weight


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def rope(x: Tensor, position: int) -> Tensor:
    """x [HD]: rotate pairs (i, i + HD / 2)."""
    out = x.clone()
    for i in range(HD // 2):
        angle = position * THETA ** (-2 * i / HD)
        a, b = x[i], x[i + HD // 2]
        out[i] = a * math.cos(angle) - b * math.sin(angle)
        out[i + HD // 2] = b * math.cos(angle) + a * math.sin(angle)
    return out


def attention(w: Weights, layer: int, x: Tensor) -> Tensor:
    """x [T, in], causal, positions 0..T-1."""
    name = f"layers.{layer}.self_attn."
    q, k, v = (linear(w, f"{name}{p}_proj", x).unflatten(-1, (-1, HD)) for p in "qkv")
    if f"{name}q_norm.weight" in w:
        q, k = norm(q, w[f"{name}q_norm.weight"]), norm(k, w[f"{name}k_norm.weight"])
    rows = []
    for t in range(len(x)):
        heads = []
        for h in range(NH):
            g = h // (NH // NKV)
            scores = torch.stack([rope(q[t, h], t) @ rope(k[s, g], s) / math.sqrt(HD) for s in range(t + 1)])
            heads.append(scores.softmax(0) @ v[: t + 1, g])
        rows.append(torch.cat(heads))
    return linear(w, f"{name}o_proj", torch.stack(rows))


def mlp(w: Weights, layer: int, x: Tensor) -> Tensor:
    gate, up = (linear(w, f"layers.{layer}.mlp.{p}_proj", x) for p in ("gate", "up"))
    return linear(w, f"layers.{layer}.mlp.down_proj", gate * torch.sigmoid(gate) * up)


def plain_layer(w: Weights, layer: int, x: Tensor) -> Tensor:
    name = f"layers.{layer}."
    normed = norm(x, w[f"{name}input_layernorm.weight"]) if f"{name}input_layernorm.weight" in w else x
    x = x + attention(w, layer, normed)
    return x + mlp(w, layer, norm(x, w[f"{name}post_attention_layernorm.weight"]))


def wide_layer(w: Weights, layer: int, h: Tensor, e: Tensor, norm_before_residual: bool) -> Tensor:
    name = f"layers.{layer}."
    hn = norm(h, w[f"{name}hidden_norm.weight"])
    if f"{name}input_layernorm.weight" in w:
        e = norm(e, w[f"{name}input_layernorm.weight"])
    y = (hn if norm_before_residual else h) + attention(w, layer, torch.cat((e, hn), -1))
    return y + mlp(w, layer, norm(y, w[f"{name}post_attention_layernorm.weight"]))


def reference_eagle3(record: HeadRecord, w: Weights, taps: list[Tensor], final: Tensor, e: Tensor) -> list[Tensor]:
    """One row sequence: fused features, output g, recycled hidden, logits."""
    h = torch.cat(taps, -1) if taps else final
    if record.norm_before_fc:
        h = norm(h, w["input_norm.weight"])
    if record.fc_norm:
        h = torch.cat([norm(tap, w[f"fc_norm.{i}.weight"]) for i, tap in enumerate(taps)], -1)
    fused = h = linear(w, "fc", h) if "fc.weight" in w else h
    for i in range(record.num_layers):
        wide = i == 0 or record.wide_layers
        h = wide_layer(w, i, h, e, record.norm_before_residual) if wide else plain_layer(w, i, h)
    out = norm(h, w["norm.weight"]) if record.final_norm else h
    return [fused, h, out if record.norm_output else h, linear(w, "lm_head", out)]


def reference_eagle(record: HeadRecord, w: Weights, final: Tensor, e: Tensor) -> list[Tensor]:
    if record.embedding_norm:
        e = norm(e, w["embedding_layernorm.weight"])
    x = linear(w, "fc", torch.cat((e, final), -1))
    for i in range(record.num_layers):
        x = plain_layer(w, i, x)
    out = norm(x, w["pre_lm_head_layernorm.weight"]) if record.head_norm else x
    return [final, x, out if record.norm_output else x, out @ TARGET.head_weight.T]


def check(record: HeadRecord) -> None:
    head = build_head(record, TARGET).requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    for parameter in head.parameters():
        parameter.data.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.3, generator=generator)
    weights = export_tensors(head, head_slots(record), torch.float32)
    tokens = torch.randint(0, V, (T,), generator=generator)
    final = torch.randn(T, H, generator=generator)
    taps = [torch.randn(T, H, generator=generator) for _ in record.boundaries]

    hidden = Hidden(final[None], tuple(tap[None] for tap in taps))
    fused = head.fuse(head.features(hidden))
    output = head(fused, tokens[None], torch.arange(T)[None], attend_causal)
    ours = [fused[0], output[0], head.recycle(output)[0], head.logits(output)[0]]

    e = (weights["embed_tokens.weight"] if record.own_embed else TARGET.embed.weight)[tokens]
    if record.kind == "eagle":
        theirs = reference_eagle(record, weights, final, e)
    else:
        theirs = reference_eagle3(record, weights, taps, final, e)
    for name, a, b in zip(("fused", "output", "recycled", "logits"), ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4), name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm_before_residual": True},
        {"norm_output": True},
        {"norm_before_fc": True},
        {"fc_norm": True},
        {"fc_norm": True, "norm_output": True, "norm_before_residual": True},
        {"boundaries": (), "fc": False},
        {"boundaries": (6,)},
        {"final_norm": False},
        {"input_layernorm": False},
        {"num_layers": 3},
        {"num_layers": 2, "wide_layers": True, "norm_before_residual": True},
        {"qk_norm": True},
        {"qkv_bias": True, "o_bias": True, "mlp_bias": True, "fc_bias": True},
        {"own_embed": True},
    ],
)
def test_eagle3_switches(changes: dict[str, object]) -> None:
    check(replace(RECORD, **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"fc_bias": True},
        {"qkv_bias": True},
        {"num_layers": 2},
        {"embedding_norm": True, "fused_norm": True, "head_norm": True, "norm_output": True},
        {"head_norm": True},
        {"own_embed": True},
    ],
)
def test_eagle_switches(changes: dict[str, object]) -> None:
    check(replace(EAGLE, **changes))  # type: ignore[arg-type]


def test_lm_head_may_be_the_embedding_of_head_or_target() -> None:
    tied = replace(RECORD, own_lm_head=False, lm_head_is_embed=True)
    x = torch.randn(3, H)
    own = build_head(replace(tied, own_embed=True), TARGET)
    assert own.embed is not None
    assert torch.equal(own.project(x), x @ own.embed.weight.T)
    assert torch.equal(build_head(tied, TARGET).project(x), x @ TARGET.embed.weight.T)
    borrowed = build_head(replace(tied, lm_head_is_embed=False), TARGET)
    assert torch.equal(borrowed.project(x), x @ TARGET.head_weight.T)


def test_the_target_is_no_part_of_the_head() -> None:
    head = build_head(EAGLE, TARGET)
    assert not any(p is TARGET.embed.weight or p is TARGET.head_weight for p in head.parameters())


@pytest.mark.parametrize("record", [RECORD, replace(RECORD, num_layers=2, norm_output=True), EAGLE])
def test_drafting_from_all_rows_at_once_equals_drafting_from_one(record: HeadRecord) -> None:
    """The probe's unrolled attention, against a chain drafted row by row over a growing cache."""
    head = build_head(record, TARGET)
    init_weights(head, torch.Generator().manual_seed(5), std=0.4)
    generator = torch.Generator().manual_seed(6)
    tokens = torch.randint(0, V, (1, T + 4), generator=generator)
    features = torch.randn(1, T, record.feature_size, generator=generator)
    steps, positions = 3, torch.arange(T + 4)[None]
    with torch.no_grad():
        state, unrolled = head.fuse(features), UnrolledAttention()
        at_once = []
        for step in range(steps):
            unrolled.next_step()
            output = head(state, tokens[:, step : step + T], positions[:, step : step + T], unrolled)
            at_once.append(output)
            state = head.recycle(output)
        for start in range(T):
            growing = GrowingAttention()
            rows = slice(0, start + 1)
            output = head(head.fuse(features[:, rows]), tokens[:, rows], positions[:, rows], growing)[:, -1:]
            for step in range(steps):
                torch.testing.assert_close(output, at_once[step][:, start : start + 1], rtol=1e-4, atol=1e-4)
                row = slice(start + step + 1, start + step + 2)
                output = head(head.recycle(output), tokens[:, row], positions[:, row], growing)


def test_growing_attention_equals_one_causal_pass_and_keeps_windows() -> None:
    generator = torch.Generator().manual_seed(7)
    q, k, v = (torch.randn(1, 8, heads, HD, generator=generator) for heads in (NH, NKV, NKV))
    growing = GrowingAttention()
    parts = [growing(0, q[:, s], k[:, s], v[:, s], None) for s in (slice(0, 5), slice(5, 6), slice(6, 8))]
    torch.testing.assert_close(torch.cat(parts, 1), attend_causal(0, q, k, v, None), rtol=1e-5, atol=1e-5)
    windowed = GrowingAttention()(0, q, k, v, 3)
    alone = attend_causal(0, q[:, 5:8], k[:, 5:8], v[:, 5:8], None)
    torch.testing.assert_close(windowed[:, 7], alone[:, 2], rtol=1e-5, atol=1e-5)
