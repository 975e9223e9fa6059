"""MTP modules of Qwen3-Next and Qwen3.5: found by name inside the target's folder, and computing what is published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hybrid_models import FAMILIES, SIZES, hybrid_engine, hybrid_head, hybrid_target
from mtp_models import mtp_head, save_pair
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from speculator.errors import CheckpointError
from speculator.heads.formats import read_head
from speculator.heads.load import load_head
from speculator.heads.mtp import MtpHead
from speculator.heads.mtp_save import save_mtp
from speculator.types import DraftShape, SamplingParams
from target.attention.dense import dense_attend
from target.decoder import Decoder
from target.load import load_target
from target.names import mtp_names
from target.save import save_target
from tests.unit.engines import Driver


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def logits_of(head: MtpHead, target: Decoder, tokens: list[int]) -> Tensor:
    """Logits [T - 1, V] of the module over a whole sequence, its states taken from the target."""
    positions, attend = torch.arange(len(tokens) - 1)[None], dense_attend(target.config)
    given = torch.tensor([tokens])
    final = target(given[:, :-1], positions, attend).final
    return head.logits(head(final, given[:, 1:], positions, attend))[0]


def song(length: int, seed: int = 3) -> list[int]:
    return torch.randint(0, SIZES["vocab_size"], (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def saved(folder: Path, family: str, **changes: object) -> tuple[Decoder, MtpHead]:
    target = hybrid_target(family, **changes)
    head = mtp_head(target)
    save_pair(target, head, folder)
    return target, head


def test_modules_read_back(family: str, tmp_path: Path) -> None:
    target, head = saved(tmp_path, family)
    loaded = load_head(tmp_path, load_target(tmp_path, torch.float32), torch.float32)
    assert isinstance(loaded, MtpHead) and loaded.record == head.record
    assert torch.equal(logits_of(loaded, target, song(17)), logits_of(head, target, song(17)))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["mtp_num_hidden_layers"] == config["num_nextn_predict_layers"] == 1
    assert loaded.layer.attention.layer == loaded.first_layer == len(target.cache_layers)
    with pytest.raises(CheckpointError, match="holds MTP modules already"):
        save_mtp(head, tmp_path)


def test_names_are_those_published(family: str, tmp_path: Path) -> None:
    target, _ = saved(tmp_path, family)
    names = set(load_file(tmp_path / "model.safetensors"))
    ours = mtp_names(target.config, names)
    assert ours == {name for name in names if name.startswith("mtp.")}
    assert {f"mtp.{n}.weight" for n in ("fc", "norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")} <= ours
    fused, single = "mtp.layers.0.mlp.experts.gate_up_proj", "mtp.layers.0.mlp.experts.7.down_proj.weight"
    assert (fused in ours, single in ours) == (family == "moe", family == "next")
    assert "mtp.layers.0.self_attn.q_norm.weight" in ours and not any("linear_attn" in name for name in ours)


def reference_logits(folder: Path, target: Decoder, tokens: list[int]) -> Tensor:
    """The forward as it is published, put together from transformers' own layer, norms and rotation."""
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    full = next(i for i, kind in enumerate(theirs.config.layer_types) if kind == "full_attention")
    layer, norm = theirs.model.layers[full], theirs.model.norm
    tensors = load_file(folder / "model.safetensors")
    own = {name.removeprefix("mtp.layers.0."): t for name, t in tensors.items() if name.startswith("mtp.layers.0.")}
    layer.load_state_dict(_in_memory(own, layer.state_dict()))
    given, positions = torch.tensor([tokens]), torch.arange(len(tokens) - 1)[None]
    final = target(given[:, :-1], positions, dense_attend(target.config)).final

    def normed(x: Tensor, name: str) -> Tensor:
        norm.weight.data.copy_(tensors[f"mtp.{name}.weight"])
        return norm(x)

    e, h = theirs.model.embed_tokens(given[:, 1:]), final
    pair = (normed(e, "pre_fc_norm_embedding"), normed(h, "pre_fc_norm_hidden"))
    u = torch.cat(pair, dim=-1) @ tensors["mtp.fc.weight"].T
    mask = torch.full((len(tokens) - 1,) * 2, float("-inf")).triu(1)[None, None]
    rotation = theirs.model.rotary_emb(u, positions)
    out = layer(u, position_embeddings=rotation, attention_mask=mask, position_ids=positions)
    out = out[0] if isinstance(out, tuple) else out
    return theirs.lm_head(normed(out, "norm"))[0]


def _in_memory(stored: dict[str, Tensor], wanted: dict[str, Any]) -> dict[str, Tensor]:
    """Experts stored one by one as transformers holds them."""
    if "mlp.experts.gate_up_proj" not in wanted or "mlp.experts.gate_up_proj" in stored:
        return stored
    count = wanted["mlp.experts.gate_up_proj"].shape[0]
    each = [[stored.pop(f"mlp.experts.{i}.{p}_proj.weight") for p in ("gate", "up", "down")] for i in range(count)]
    stored["mlp.experts.gate_up_proj"] = torch.stack([torch.cat((gate, up)) for gate, up, _ in each])
    stored["mlp.experts.down_proj"] = torch.stack([down for *_, down in each])
    return stored


@torch.no_grad()
def test_the_forward_is_the_published_one(family: str, tmp_path: Path) -> None:
    target, head = saved(tmp_path, family)
    tokens = song(23)
    expected = reference_logits(tmp_path, target, tokens)
    torch.testing.assert_close(logits_of(head, target, tokens), expected, rtol=1e-4, atol=1e-4)


def test_drafts_of_the_engine_are_those_of_whole_passes(family: str) -> None:
    """Prompts in chunks, caches and states that went through rejected drafts: still the chain of a fresh pass."""
    target = hybrid_target(family)
    head = mtp_head(target)
    shape, driver = DraftShape(1), Driver(hybrid_engine(target, head), scatter=1)
    sessions = driver.start([song(23), song(5, 4), song(2, 5)], [SamplingParams()] * 3, shape)
    for _ in range(6):
        for s in sessions:
            assert s.draft is not None
            assert s.draft.tokens[0] == int(logits_of(head, target, s.tokens)[-1].argmax())
        driver.rounds(sessions, min(len(s.produced) for s in sessions) + 1, [shape] * 3)


def memoryless(family: str) -> tuple[Decoder, MtpHead]:
    """A target whose next token follows from the last one alone, and a module that reads it off the embedding."""
    target = hybrid_target(family)
    head = mtp_head(target)
    for layer in (*target.layers, head.layer):
        for name, parameter in layer.named_parameters():
            if name.startswith(("attention.o.", "mlp.down", "mlp.experts.down", "mlp.shared.down")):
                parameter.data.zero_()
    size = target.config.hidden_size
    head.embedding_norm.weight.data.zero_()  # zero-centred: a scale of one
    head.norm.weight.data.copy_(target.norm.weight)
    head.eh_proj.weight.data.zero_()
    head.eh_proj.weight.data[:, :size] = torch.eye(size)
    return target, head


def test_a_memoryless_target_is_always_guessed(family: str) -> None:
    """A module whose norms were not zero-centred, or whose halves were swapped, would guess wrong."""
    target, head = memoryless(family)
    driver, shape = Driver(hybrid_engine(target, head), scatter=1), DraftShape(5)
    sessions = driver.start([song(23), song(5, 4)], [SamplingParams()] * 2, shape)
    driver.rounds(sessions, 24, [shape] * 2)
    assert {a for s in sessions for a in s.accepted} == {5}


# files


def wrapped(folder: Path, **changes: object) -> None:
    """The same folder as the text part of a multimodal model."""
    raw = json.loads((folder / "config.json").read_text())
    text = {**{key: value for key, value in raw.items() if key != "architectures"}, **changes}
    inner = {"Qwen3_5ForCausalLM": "Qwen3_5", "Qwen3_5MoeForCausalLM": "Qwen3_5Moe"}[raw["architectures"][0]]
    outer = {"architectures": [f"{inner}ForConditionalGeneration"], "text_config": text}
    (folder / "config.json").write_text(json.dumps(outer))
    tensors = load_file(folder / "model.safetensors")
    moved = {n.replace("model.", "model.language_model.", 1) if n.startswith("model.") else n: t
             for n, t in tensors.items()}  # fmt: skip
    save_file(moved | {"model.visual.patch_embed.proj.weight": torch.ones(2)}, folder / "model.safetensors")


@pytest.mark.parametrize("inner", ["dense", "moe"])
def test_modules_beside_the_text_part_of_a_multimodal_model(inner: str, tmp_path: Path) -> None:
    target, head = saved(tmp_path, inner)
    wrapped(tmp_path)
    loaded = load_head(tmp_path, load_target(tmp_path, torch.float32), torch.float32)
    assert isinstance(loaded, MtpHead)
    assert torch.equal(logits_of(loaded, target, song(9)), logits_of(head, target, song(9)))
    assert read_head(tmp_path).warnings == ()


def test_tied_targets_lend_their_embedding(tmp_path: Path) -> None:
    target, head = saved(tmp_path, "dense", tie_word_embeddings=True)
    loaded = load_head(tmp_path, target, torch.float32)
    assert isinstance(loaded, MtpHead) and loaded.lm_head is None
    assert torch.equal(logits_of(loaded, target, song(9)), logits_of(head, target, song(9)))


def test_names_decide_not_the_claim(tmp_path: Path) -> None:
    """Repacked folders often keep mtp_num_hidden_layers without the tensors."""
    saved(tmp_path, "dense")
    claim = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**claim, "mtp_num_hidden_layers": 2}))
    warning = read_head(tmp_path).warnings
    assert warning == ("modules: config mtp_num_hidden_layers says 2, the tensors say 1; using the tensors",)
    save_target(hybrid_target("dense"), tmp_path)
    with pytest.raises(CheckpointError, match="has no MTP modules"):
        read_head(tmp_path)


def edited(folder: Path, add: dict[str, Tensor], drop: str = "") -> Path:
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: t for name, t in tensors.items() if not drop or name != drop}
    save_file(tensors | add, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("missing", ["mtp.fc.weight", "mtp.layers.0.self_attn.q_norm.weight"])
def test_a_missing_tensor_is_named(missing: str, tmp_path: Path) -> None:
    saved(tmp_path, "dense")
    with pytest.raises(CheckpointError, match=f"1 missing tensors: {missing}"):
        read_head(edited(tmp_path, {}, missing))


def test_what_nobody_has_published_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, "dense")
    second = {"mtp.layers.1.input_layernorm.weight": torch.ones(32)}
    with pytest.raises(CheckpointError, match="2 MTP layers behind one projection are not run, only one"):
        read_head(edited(tmp_path, second))
    config = json.loads((tmp_path / "config.json").read_text())
    edited(tmp_path, {}, "mtp.layers.1.input_layernorm.weight")
    (tmp_path / "config.json").write_text(json.dumps({**config, "mtp_use_dedicated_embeddings": True}))
    with pytest.raises(CheckpointError, match="mtp_use_dedicated_embeddings true is not supported"):
        read_head(tmp_path)


def test_two_modules_cannot_be_written(tmp_path: Path) -> None:
    target = hybrid_target("next")
    save_target(target, tmp_path)
    with pytest.raises(CheckpointError, match="the layout of Qwen3-Next and Qwen3.5 has one module, not 2"):
        save_mtp(mtp_head(target, modules=2), tmp_path)


def test_an_eagle_head_on_a_hybrid_has_a_layer_after_those_that_attend() -> None:
    target = hybrid_target()
    assert hybrid_head(target, "eagle3").first_layer == len(target.cache_layers) == 1
