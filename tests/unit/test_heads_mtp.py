"""MTP modules by name inside their target's folder: layouts read back, and what can be wrong with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mtp_models import family_target, mtp_head, save_pair
from safetensors.torch import load_file, save_file
from torch import Tensor

from speculator.config import load
from speculator.errors import CheckpointError, ConfigError
from speculator.heads.formats import read_head
from speculator.heads.load import load_head
from speculator.heads.mtp import MtpHead
from speculator.heads.mtp_save import SHARD, save_mtp
from speculator.heads.overrides import show
from speculator.heads.reading import TargetFacts
from speculator.load import load_engine
from target.attention.dense import dense_attend
from target.decoder import Decoder
from target.load import load_target
from target.save import save_target


def outputs(head: MtpHead, target: Decoder) -> list[Tensor]:
    """Logits of every module, each on what the one before it recycles."""
    generator = torch.Generator().manual_seed(2)
    size = target.config.hidden_size
    tokens = torch.randint(0, target.config.vocab_size, (2, 7), generator=generator)
    positions, hidden = torch.arange(7).expand(2, 7), torch.randn(2, 7, size, generator=generator)
    made = []
    for k in range(head.lookback + 1):
        stage = head.stage(k)
        output = stage(hidden, tokens, positions, dense_attend(target.config))
        made.append(stage.logits(output))
        hidden = stage.recycle(output)
    return made


def assert_reads_back(folder: Path, target: Decoder, head: MtpHead) -> MtpHead:
    loaded = load_head(folder, target, torch.float32)
    assert isinstance(loaded, MtpHead)
    assert loaded.record == head.record
    assert loaded.cache_layers == head.cache_layers == target.cache_layers[:1] * head.record.modules
    for ours, theirs in zip(outputs(loaded, target), outputs(head, target), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    return loaded


CASES: list[tuple[str, dict[str, object]]] = [
    ("mimo", {}),
    ("mimo", {"modules": 3}),
    ("deepseek", {}),
    ("deepseek", {"modules": 2}),
    ("deepseek", {"own_embed": True, "own_lm_head": True}),
    ("deepseek", {"own_lm_head": True, "modules": 2}),
    ("glm", {}),
    ("glm-qk-norm", {"modules": 2}),
    ("glm-lite", {}),
]


@pytest.mark.parametrize(("family", "changes"), CASES)
def test_every_layout_reads_back_as_the_same_head(tmp_path: Path, family: str, changes: dict[str, object]) -> None:
    target = family_target(family)
    head = mtp_head(target, **changes)
    assert_reads_back(save_pair(target, head, tmp_path), target, head)
    again = load_target(tmp_path, torch.float32)
    for name, parameter in target.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter)


def test_names_are_those_of_the_families(tmp_path: Path) -> None:
    def added(family: str, **changes: object) -> set[str]:
        target = family_target(family)
        folder = tmp_path / family
        save_target(target, folder)
        before = set(load_file(str(folder / "model.safetensors")))
        save_mtp(mtp_head(target, **changes), folder)
        return set(load_file(str(folder / "model.safetensors"))) - before

    mimo = {name.removeprefix("model.mtp_layers.0.") for name in added("mimo")}
    assert {"token_layernorm.weight", "hidden_layernorm.weight", "input_proj.weight", "final_layernorm.weight"} <= mimo
    assert {"self_attn.q_proj.bias", "mlp.up_proj.weight", "post_attention_layernorm.weight"} <= mimo
    deepseek = {name.removeprefix("model.layers.3.") for name in added("deepseek", own_lm_head=True)}
    assert {"enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"} <= deepseek
    assert {"shared_head.head.weight", "self_attn.kv_b_proj.weight", "mlp.experts.7.down_proj.weight"} <= deepseek
    assert {"mlp.gate.e_score_correction_bias", "mlp.shared_experts.up_proj.weight"} <= deepseek
    assert not any(name.startswith("model.") for name in mimo | deepseek)


def test_sharded_folders(tmp_path: Path) -> None:
    target = family_target("mimo")
    save_target(target, tmp_path, torch.float32)
    tensors = load_file(str(tmp_path / "model.safetensors"))
    (tmp_path / "model.safetensors").rename(tmp_path / "model-1.safetensors")
    index = {"metadata": {"total_size": 10}, "weight_map": dict.fromkeys(tensors, "model-1.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    head = mtp_head(target)
    save_mtp(head, tmp_path, torch.float32)
    assert (tmp_path / SHARD).exists()
    assert_reads_back(tmp_path, target, head)
    load_target(tmp_path, torch.float32)


def edit(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    path = str(folder / "model.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return folder


def configured(folder: Path, **keys: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
    return folder


@pytest.fixture
def deepseek() -> Decoder:
    return family_target("deepseek")


def choice(folder: Path, field: str, **overrides: str) -> str:
    found = next(c for c in read_head(folder, overrides=overrides).choices if c.field == field)
    return f"{'ambiguous ' if found.ambiguous else ''}{show(found.value)} from {found.source}"


def test_copies_of_the_targets_tables_are_not_kept(tmp_path: Path, deepseek: Decoder) -> None:
    head = mtp_head(deepseek, modules=2)
    save_pair(deepseek, head, tmp_path)

    def copies(tensors: dict[str, Tensor]) -> None:
        for module in (3, 4):
            tensors[f"model.layers.{module}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
            tensors[f"model.layers.{module}.shared_head.head.weight"] = tensors["lm_head.weight"].clone()

    loaded = assert_reads_back(edit(tmp_path, copies), deepseek, head)
    assert loaded.embed is None and loaded.lm_head is None
    assert loaded.embedding_table.data_ptr() == deepseek.embed.weight.data_ptr()
    assert len(read_head(tmp_path).unused) == 4
    assert choice(tmp_path, "own_embed") == "false from embed_tokens.weight is a copy of the target's"
    asked = load_head(tmp_path, deepseek, torch.float32, overrides={"own_embed": "true"})
    assert asked.embed is not None and torch.equal(asked.embed.weight, deepseek.embed.weight)


def test_one_differing_copy_is_enough_to_keep_them(tmp_path: Path, deepseek: Decoder) -> None:
    save_pair(deepseek, mtp_head(deepseek, modules=2), tmp_path)

    def differs(tensors: dict[str, Tensor]) -> None:
        for module in (3, 4):
            tensors[f"model.layers.{module}.shared_head.head.weight"] = tensors["lm_head.weight"] + (module - 3)

    loaded = load_head(edit(tmp_path, differs), deepseek, torch.float32)
    assert isinstance(loaded, MtpHead)
    first, second = loaded.lm_head, loaded.stage(1).lm_head
    assert first is not None and torch.equal(first.weight, deepseek.head_weight)
    assert second is not None and torch.equal(second.weight, deepseek.head_weight + 1)


def test_names_decide_and_not_what_the_config_claims(tmp_path: Path, deepseek: Decoder) -> None:
    save_pair(deepseek, mtp_head(deepseek, modules=2), tmp_path)
    assert read_head(tmp_path).warnings == ()
    file = read_head(configured(tmp_path, num_nextn_predict_layers=1))
    assert file.record.modules == 2
    assert file.warnings == (
        "modules: config num_nextn_predict_layers says 1, the tensors say 2; using the tensors",
    )  # fmt: skip


def test_modules_can_be_left_out(tmp_path: Path, deepseek: Decoder) -> None:
    head = mtp_head(deepseek, modules=3)
    save_pair(deepseek, head, tmp_path)
    loaded = load_head(tmp_path, deepseek, torch.float32, overrides={"modules": "1"})
    assert isinstance(loaded, MtpHead)
    assert loaded.lookback == 0 and len(loaded.cache_layers) == 1
    assert torch.equal(outputs(loaded, deepseek)[0], outputs(head, deepseek)[0])
    with pytest.raises(CheckpointError, match=r"missing tensors: model\.layers\.6\."):
        load_head(tmp_path, deepseek, torch.float32, overrides={"modules": "4"})


def test_what_is_chosen_is_said(tmp_path: Path) -> None:
    target = family_target("glm")
    save_pair(target, mtp_head(target), tmp_path)
    assert choice(tmp_path, "modules") == "1 from tensor names"
    assert choice(tmp_path, "boundaries") == "none from MTP reads the final state F"
    assert choice(tmp_path, "norm_output").startswith("ambiguous true from what the head reads")
    assert choice(tmp_path, "hidden_first") == "false from as in DeepSeek-V3 and GLM-4.5"
    assert choice(tmp_path, "boundaries", boundaries="3") == "3 from override, the file says none"
    alternatives = {c.field: c.alternatives for c in read_head(tmp_path).choices if c.alternatives}
    assert alternatives == {"boundaries": ("3",), "norm_output": ("false",), "zero_first": ("true",)}


def test_switches_change_the_forward(tmp_path: Path, deepseek: Decoder) -> None:
    head = mtp_head(deepseek)
    save_pair(deepseek, head, tmp_path)
    for field, value in {"hidden_first": "true", "zero_first": "true"}.items():
        other = load_head(tmp_path, deepseek, torch.float32, overrides={field: value})
        assert isinstance(other, MtpHead)
        assert not torch.allclose(outputs(other, deepseek)[0], outputs(head, deepseek)[0])
    raw = load_head(tmp_path, deepseek, torch.float32, overrides={"boundaries": "3", "norm_output": "false"})
    output = torch.randn(1, 2, 32)
    assert raw.taps == (3,) and torch.equal(raw.recycle(output), output)
    assert not torch.allclose(head.recycle(output), output)


def test_fp8_modules_are_dequantised(tmp_path: Path, deepseek: Decoder) -> None:
    """Blocks of 16 by 16, the last ones partial; gate, norms and eh_proj stay as they are."""
    head = mtp_head(deepseek)
    save_pair(deepseek, head, tmp_path)
    seen: dict[str, Tensor] = {}

    def quantise(tensors: dict[str, Tensor]) -> None:
        names = [n for n in tensors if n.startswith("model.layers.3.") and ("_proj.weight" in n) and "eh_proj" not in n]
        for name in names:
            rows, columns = (-(-size // 16) for size in tensors[name].shape)
            scale = torch.rand(rows, columns) + 0.5
            spread = scale.repeat_interleave(16, 0).repeat_interleave(16, 1)
            spread = spread[: tensors[name].shape[0], : tensors[name].shape[1]]
            stored = (tensors[name] / spread).to(torch.float8_e4m3fn)
            seen[name] = stored.float() * spread
            tensors[name], tensors[f"{name}_scale_inv"] = stored, scale

    block = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
    configured(edit(tmp_path, quantise), quantization_config=block)
    file = read_head(tmp_path)
    assert len(seen) > 20
    for name, value in seen.items():
        torch.testing.assert_close(file.tensors[name], value)
    load_head(tmp_path, deepseek, torch.float32)


@pytest.mark.parametrize("head", ["mtp", "the folder"])
def test_serving_a_target_with_its_own_modules(tmp_path: Path, head: str) -> None:
    target = family_target("mimo")
    folder = save_pair(target, mtp_head(target, modules=2), tmp_path / "MiMo-tiny")
    sets = {"model.target": folder, "model.head": folder if head == "the folder" else head, "model.device": "cpu"}
    sets |= {"engine.max_sessions": 2, "model.head_overrides.norm_output": "false"}
    engine = load_engine(load(None, [f"{key}={value}" for key, value in sets.items()]))
    assert isinstance(engine.head, MtpHead)
    assert (engine.info.draft_method, engine.info.draft_model) == ("mtp", "MiMo-tiny")
    assert (engine.head.record.modules, engine.head.record.norm_output) == (2, False)
    assert len(engine.cache.layers) == target.config.num_layers + 2


def test_serving_a_target_that_has_none(tmp_path: Path) -> None:
    save_target(family_target("mimo"), tmp_path)
    with pytest.raises(CheckpointError, match="it has no MTP modules"):
        load_engine(load(None, [f"model.target={tmp_path}", "model.head=mtp", "model.device=cpu"]))


# wrong input


def drop(*names: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in names:
            del tensors[name]

    return change


def put(name: str, *shape: int) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = torch.ones(shape)

    return change


def keep_only(*kept: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if n.startswith("model.layers.3.") and not n.endswith(kept)]:
            del tensors[name]

    return change


def second_half(tensors: dict[str, Tensor]) -> None:
    for name in [n for n in tensors if n.startswith("model.layers.3.self_attn")]:
        tensors[name.replace("layers.3.", "layers.4.")] = tensors[name].clone()


WRONG: dict[str, tuple[Callable[[dict[str, Tensor]], None], str]] = {
    "a tensor is missing": (drop("model.layers.3.hnorm.weight"), "1 missing tensors: model.layers.3.hnorm.weight"),
    "an expert is missing": (drop("model.layers.3.mlp.experts.2.up_proj.weight"), "1 missing tensors: .*experts.2.up"),
    "an unknown tensor": (put("model.layers.3.self_attn.indexer.wk.weight", 2, 2), "1 unknown tensors: .*indexer"),
    "a layer without its projection": (keep_only(".o_proj.weight"), "missing tensors: model.layers.3.eh_proj.weight"),
    "half a second module": (second_half, "missing tensors: model.layers.4.eh_proj.weight"),
    "a hole in the numbers": (put("model.layers.5.enorm.weight", 32), "missing tensors: model.layers.4.eh_proj"),
    "a wrong shape": (put("model.layers.3.eh_proj.weight", 32, 32), r"eh_proj.weight has shape \[32, 32\], expected"),
}


@pytest.mark.parametrize("name", WRONG)
def test_modules_that_cannot_be_used(tmp_path: Path, deepseek: Decoder, name: str) -> None:
    change, text = WRONG[name]
    save_pair(deepseek, mtp_head(deepseek), tmp_path)
    with pytest.raises(CheckpointError, match=text):
        load_head(edit(tmp_path, change), deepseek, torch.float32)


def test_values_must_be_finite(tmp_path: Path, deepseek: Decoder) -> None:
    head = mtp_head(deepseek)
    head.eh_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(CheckpointError, match="eh_proj.weight holds NaN"):
        load_head(save_pair(deepseek, head, tmp_path), deepseek, torch.float32)


def test_a_folder_without_modules(tmp_path: Path, deepseek: Decoder) -> None:
    save_target(deepseek, tmp_path)
    configured(tmp_path, num_nextn_predict_layers=1)
    with pytest.raises(CheckpointError, match="a whole model, not a draft head; .* no MTP modules"):
        read_head(tmp_path)


def test_modules_of_another_target(tmp_path: Path, deepseek: Decoder) -> None:
    save_pair(deepseek, mtp_head(deepseek), tmp_path)
    for changes in ({"num_hidden_layers": 4}, {"hidden_size": 48}, {"vocab_size": 61}):
        other = family_target("deepseek", **changes)
        with pytest.raises(CheckpointError, match="belong to a target of 3 layers, 32 wide, with 60 tokens"):
            load_head(tmp_path, other, torch.float32)
    with pytest.raises(CheckpointError, match="has shape"):
        load_head(tmp_path, family_target("deepseek", q_lora_rank=16), torch.float32)
    with pytest.raises(CheckpointError, match="belong to a target of 3 layers"):
        read_head(tmp_path, TargetFacts.of(deepseek.config)._replace(num_layers=5))


def test_layouts_that_are_not_run(tmp_path: Path) -> None:
    target = family_target("mimo")
    save_target(target, tmp_path)
    with pytest.raises(CheckpointError, match=r"MTP modules named mtp\.fc\.weight are not run; .*mtp_layers\.N"):
        read_head(edit(tmp_path, put("mtp.fc.weight", 32, 64)))


def test_saving_refuses_what_no_family_publishes(tmp_path: Path, deepseek: Decoder) -> None:
    save_target(deepseek, tmp_path)
    with pytest.raises(CheckpointError, match="no layout for such MTP modules is published for DeepseekV3ForCausalLM"):
        save_mtp(mtp_head(deepseek, hidden_first=True), tmp_path)
    save_mtp(mtp_head(deepseek), tmp_path)
    with pytest.raises(CheckpointError, match="holds MTP modules already"):
        save_mtp(mtp_head(deepseek), tmp_path)
    mimo = family_target("mimo")
    save_target(mimo, tmp_path / "mimo")
    with pytest.raises(CheckpointError, match="have no tables of their own"):
        save_mtp(mtp_head(mimo, own_lm_head=True), tmp_path / "mimo")


def test_overrides_that_do_not_parse(tmp_path: Path, deepseek: Decoder) -> None:
    save_pair(deepseek, mtp_head(deepseek), tmp_path)
    with pytest.raises(ConfigError, match="modules=two: expected an integer"):
        read_head(tmp_path, overrides={"modules": "two"})
