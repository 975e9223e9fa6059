"""Every published layout: written from a random head, read back, the same record and the same numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from speculator.errors import CheckpointError, ConfigError
from speculator.heads.base import DraftHead
from speculator.heads.load import build_head, load_head
from speculator.heads.record import HeadRecord
from speculator.heads.save import LAYOUTS, save_head
from target.attention.dense import attend_causal
from target.config import RopeConfig, parse_config
from target.decoder import Decoder, init_weights

V, H, HT, LAYERS = 60, 32, 32, 8
IDS = torch.tensor([0, 1, 2, 5, 7, 11, 12, 13, 20, 21, 22, 30, 33, 40, 58, 59])


def tiny_target(**changes: object) -> Decoder:
    raw: dict[str, object] = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": V,
        "hidden_size": HT,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    target = Decoder(parse_config({**raw, **changes}))
    init_weights(target, torch.Generator().manual_seed(0), std=0.2)
    return target.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def target() -> Decoder:
    return tiny_target()


def record(kind: str, **changes: object) -> HeadRecord:
    eagle3 = kind == "eagle3"
    base = HeadRecord(
        kind=kind,
        hidden_size=H,
        target_hidden_size=HT,
        vocab_size=V,
        draft_vocab_size=len(IDS) if eagle3 else V,
        intermediate_size=40,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=10,  # 4 heads of 10 are wider than the hidden size
        norm_eps=1e-5,
        rope=RopeConfig(10000.0, max_position=256),
        boundaries=(2, 4, 5) if eagle3 else (),
        own_lm_head=eagle3,
        d2t=eagle3,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def random_head(target: Decoder, made: HeadRecord, seed: int = 1) -> DraftHead:
    head = build_head(made, target, IDS if made.d2t else None)
    generator = torch.Generator().manual_seed(seed)
    for parameter in head.parameters():
        parameter.data.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2, generator=generator)
    return head.requires_grad_(False).eval()


def outputs(head: DraftHead) -> list[Tensor]:
    """Logits of a pass over true features and of a pass over what it recycles."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, V, (2, 7), generator=generator)
    positions = torch.arange(7).expand(2, 7)
    features = torch.randn(2, 7, head.record.feature_size, generator=generator)
    with torch.no_grad():
        first = head(head.fuse(features), tokens, positions, attend_causal)
        second = head(head.recycle(first), tokens, positions + 1, attend_causal)
    return [head.logits(first), head.logits(second)]


def assert_same(target: Decoder, head: DraftHead, folder: Path) -> DraftHead:
    loaded = load_head(folder, target, torch.float32)
    assert loaded.record == head.record
    assert loaded.first_layer == target.config.num_layers
    for ours, theirs in zip(outputs(loaded), outputs(head), strict=True):
        assert torch.equal(ours, theirs)
    if head.target_ids is None:
        assert loaded.target_ids is None
    else:
        assert loaded.target_ids is not None and torch.equal(loaded.target_ids, head.target_ids)
    return loaded


WHOLE: dict[str, object] = {"d2t": False, "draft_vocab_size": V}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
EAGLE: dict[str, dict[str, object]] = {
    "plain": {},
    "fc_bias": {"fc_bias": True},
    "biases": {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
    "lm_head": {"own_lm_head": True},
    "layernorms": {"embedding_norm": True, "fused_norm": True, "head_norm": True, "norm_output": True},
    "layernorms_pre": {"embedding_norm": True, "fused_norm": True, "head_norm": True},
    "own_embed": {"own_embed": True},
    "two_layers": {"num_layers": 2},
    "theta": {"rope": RopeConfig(5e5, max_position=256)},
}
EAGLE3: dict[str, dict[str, object]] = {
    "plain": {},
    "whole_vocab": WHOLE,
    "norm_before_residual": {"norm_before_residual": True},
    "norm_before_fc": {"norm_before_fc": True},
    "fc_norm": {"fc_norm": True, "norm_output": True},
    "final_state": {"boundaries": (), "fc": False},
    "final_state_fc": {"boundaries": ()},
    "one_tap": {"boundaries": (6,)},
    "five_taps": {"boundaries": (0, 2, 3, 6, 8)},
    "first_tap_3": {"boundaries": (3, 4, 5)},
    "no_last_norm": {"final_norm": False},
    "no_input_norm": {"input_layernorm": False},
    "plain_layers": {"num_layers": 3},
    "wide_layers": {"num_layers": 2, "wide_layers": True, "qk_norm": True},
    "biases": {"qkv_bias": True, "o_bias": True, "mlp_bias": True, "fc_bias": True},
    "own_embed": {"own_embed": True},
    "narrow": {"hidden_size": 24, "own_embed": True},
    "target_lm_head": {**WHOLE, "own_lm_head": False},
    "tied": {**WHOLE, "own_lm_head": False, "lm_head_is_embed": True, "own_embed": True},
    "tied_target": {**WHOLE, "own_lm_head": False, "lm_head_is_embed": True},
    "llama3_rope": {"rope": RopeConfig(5e5, "llama3", LLAMA3, 256)},
}
ROUND_TRIPS = [
    (layout, name)
    for layout, made in LAYOUTS.items()
    for name in (EAGLE if made.kind == "eagle" else EAGLE3)
    if (layout, name) != ("eagle-speculators", "two_layers")
]


@pytest.mark.parametrize(("layout", "name"), ROUND_TRIPS)
def test_every_layout_reads_back_as_the_same_head(target: Decoder, tmp_path: Path, layout: str, name: str) -> None:
    kind = LAYOUTS[layout].kind
    head = random_head(target, record(kind, **(EAGLE if kind == "eagle" else EAGLE3)[name]))
    save_head(head, tmp_path, layout, torch.float32)
    assert_same(target, head, tmp_path)


def test_names_are_those_of_the_exporters(target: Decoder, tmp_path: Path) -> None:
    def names(layout: str, made: HeadRecord) -> set[str]:
        save_head(random_head(target, made), tmp_path / layout, layout)
        return set(load_file(str(tmp_path / layout / "model.safetensors")))

    norms = {"embedding_norm": True, "fused_norm": True, "head_norm": True, "norm_output": True}
    assert {"midlayer.hidden_norm.weight", "fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d"} <= names(
        "eagle3", record("eagle3")
    )
    assert {"d2t", "t2d", "midlayer.self_attn.q_proj.weight"} <= names("specforge", record("eagle3", **WHOLE))
    modelopt = names("modelopt", record("eagle3"))
    assert "layers.0.hidden_norm.weight" in modelopt and "d2t" in modelopt and "t2d" not in modelopt
    assert {"fusion_fc.weight", "transformer.mlp.up_proj.weight", "pre_lm_head_layernorm.weight"} <= names(
        "eagle-speculators", record("eagle", **norms)
    )
    assert {"fc.weight", "hidden_layernorm.weight", "layers.0.mlp.up_proj.weight"} <= names(
        "eagle", record("eagle", **norms)
    )
    assert "model.fc.weight" in names("eagle-vllm", record("eagle"))


def test_weights_are_stored_in_bfloat16_unless_told(target: Decoder, tmp_path: Path) -> None:
    save_head(random_head(target, record("eagle3")), tmp_path)
    tensors = load_file(str(tmp_path / "model.safetensors"))
    assert {t.dtype for name, t in tensors.items() if name not in ("d2t", "t2d")} == {torch.bfloat16}
    assert tensors["d2t"].dtype == torch.int64 and tensors["t2d"].dtype == torch.bool
    assert torch.equal(torch.arange(len(IDS)) + tensors["d2t"], IDS)


def test_sharded_folders(target: Decoder, tmp_path: Path) -> None:
    head = random_head(target, record("eagle3"))
    save_head(head, tmp_path, dtype=torch.float32)
    tensors = load_file(str(tmp_path / "model.safetensors"))
    (tmp_path / "model.safetensors").unlink()
    files = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, str(tmp_path / file))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert_same(target, head, tmp_path)


def renamed(folder: Path, names: dict[str, str]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(str(path))
    for old, new in names.items():
        for name in [n for n in tensors if n.startswith(old)]:
            tensors[new + name.removeprefix(old)] = tensors.pop(name)
    save_file(tensors, str(path))


AUX_NORMS = {"fc_norm.0.": "aux_norm_low.", "fc_norm.1.": "aux_norm_mid.", "fc_norm.2.": "aux_norm_high."}


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, {"fc.": "model.fc.", "midlayer.": "model.layers.0."}),
        ({}, {"midlayer.": "draft_model.layers.0."}),
        ({"fc_norm": True}, AUX_NORMS),
        ({"num_layers": 2}, {"layers.1.input_layernorm.": "layers.1.hidden_norm."}),  # as SGLang names it
    ],
)
def test_other_spellings(target: Decoder, tmp_path: Path, changes: dict[str, object], names: dict[str, str]) -> None:
    head = random_head(target, record("eagle3", **changes))
    save_head(head, tmp_path, dtype=torch.float32)
    renamed(tmp_path, names)
    assert_same(target, head, tmp_path)


def test_tables_that_follow_from_others_are_ignored(target: Decoder, tmp_path: Path) -> None:
    head = random_head(target, record("eagle3"))
    save_head(head, tmp_path, dtype=torch.float32)
    path = str(tmp_path / "model.safetensors")
    extra = {"midlayer.self_attn.rotary_emb.inv_freq": torch.ones(5), "verifier_lm_head.weight": torch.ones(V, HT)}
    save_file({**load_file(path), **extra, "embed_tokens.weight": torch.full((V, H), 9.0)}, path)
    assert_same(target, head, tmp_path)


def test_a_target_with_a_padded_vocabulary(tmp_path: Path) -> None:
    """The head was made for V - 1 tokens: its tables are padded, its drafts stay within them."""
    larger = tiny_target(vocab_size=200)
    made = record("eagle3", vocab_size=199, draft_vocab_size=199, d2t=False, own_embed=True)
    smaller = tiny_target(vocab_size=199)
    head = random_head(smaller, made)
    save_head(head, tmp_path, "speculators", torch.float32)
    loaded = load_head(tmp_path, larger, torch.float32)
    assert loaded.embed is not None and loaded.embed.weight.shape == (200, H)
    assert not loaded.embed.weight[199].any()
    assert loaded.target_ids is not None and loaded.target_ids.tolist() == list(range(199))
    for ours, theirs in zip(outputs(loaded), outputs(head), strict=True):
        assert torch.equal(ours, theirs)


def test_a_head_with_more_rows_than_the_target_is_cut(tmp_path: Path) -> None:
    made = record("eagle3", vocab_size=200, draft_vocab_size=200, d2t=False)
    save_head(random_head(tiny_target(vocab_size=200), made), tmp_path, "modelopt", torch.float32)
    loaded = load_head(tmp_path, tiny_target(vocab_size=199), torch.float32)
    assert loaded.record.draft_vocab_size == 199 and loaded.target_ids is None
    assert loaded.lm_head is not None and loaded.lm_head.weight.shape == (199, H)


def test_rope_stays_in_float32_in_a_half_precision_head(tmp_path: Path) -> None:
    target = tiny_target().to(torch.bfloat16)
    head = random_head(target, record("eagle3"))
    save_head(head, tmp_path)
    loaded = load_head(tmp_path, target, torch.bfloat16)
    assert loaded.rope.inverse.dtype == torch.float32
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


def test_saving_refuses_what_a_layout_cannot_say(target: Decoder, tmp_path: Path) -> None:
    head = random_head(target, record("eagle", num_layers=2))
    with pytest.raises(CheckpointError, match="single layer"):
        save_head(head, tmp_path, "eagle-speculators")
    with pytest.raises(CheckpointError, match="holds eagle3 heads"):
        save_head(head, tmp_path, "specforge")
    with pytest.raises(ConfigError, match="known are eagle, "):
        save_head(head, tmp_path, "gguf")
