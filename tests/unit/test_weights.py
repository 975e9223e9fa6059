"""Weight files: every published layout loads alike, and whatever is wrong with one is said in one sentence."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from target.config import load_config, parse_config
from target.decoder import Decoder, init_weights
from target.errors import CheckpointError
from target.load import load_target
from target.names import decoder_slots
from target.save import save_target
from target.weights import WeightFiles
from tests.unit.targets import FAMILIES, Rig, save_reference, some_tokens

Tensors = dict[str, Tensor]
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    save_reference(folder, "llama")
    return folder


@pytest.fixture
def folder(published: Path, tmp_path: Path) -> Path:
    """config.json alone; the test writes the weights."""
    (tmp_path / "config.json").write_bytes((published / "config.json").read_bytes())
    return tmp_path


@pytest.fixture
def tensors(published: Path) -> Tensors:
    return load_file(published / "model.safetensors")


def shard(folder: Path, tensors: Tensors, suffix: str = "safetensors", parts: int = 3) -> Path:
    """Write `tensors` in several files and their index; returns the index."""
    stem = {"safetensors": "model", "bin": "pytorch_model"}[suffix]
    places = {}
    for part in range(parts):
        names = sorted(tensors)[part::parts]
        file = f"{stem}-{part + 1:05}-of-{parts:05}.{suffix}"
        held = {name: tensors[name] for name in names}
        save_file(held, folder / file) if suffix == "safetensors" else torch.save(held, folder / file)
        places |= dict.fromkeys(names, file)
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


def refused(folder: Path, *parts: str, dtype: torch.dtype = torch.float32) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_target(folder, dtype)
    text = str(caught.value)
    assert all(part in text for part in parts), text
    assert "\n" not in text and len(text) < 1200


# layouts that load

WRITERS: dict[str, Callable[[Path, Tensors], object]] = {
    "safetensors": lambda f, t: save_file(t, f / "model.safetensors"),
    "safetensors in shards": lambda f, t: shard(f, t),
    "bin": lambda f, t: torch.save(t, f / "pytorch_model.bin"),
    "bin of old torch": lambda f, t: torch.save(t, f / "pytorch_model.bin", _use_new_zipfile_serialization=False),
    "bin in shards": lambda f, t: shard(f, t, "bin"),
    "with rotary buffers": lambda f, t: save_file(
        {**t, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}, f / "model.safetensors"
    ),
}


@pytest.mark.parametrize("layout", WRITERS)
def test_layouts_load_alike(folder: Path, tensors: Tensors, published: Path, layout: str) -> None:
    WRITERS[layout](folder, tensors)
    got, expected = load_target(folder, torch.float32), load_target(published, torch.float32)
    pairs = zip(got.named_parameters(), expected.named_parameters(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)
    assert got.config == expected.config


def test_safetensors_go_before_bin(folder: Path, tensors: Tensors) -> None:
    save_file(tensors, folder / "model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"not looked at")
    load_target(folder, torch.float32)


@pytest.mark.parametrize("fused", [False, True], ids=["experts one by one", "experts fused"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_value_has_its_published_tensor(tmp_path: Path, family: str, fused: bool) -> None:
    """Slots cover each value of the model once; the parity tests show that they are the right ones."""
    save_reference(tmp_path, family)
    config = load_config(tmp_path)
    with torch.device("meta"):
        model = Decoder(config)
    covered = {name: torch.zeros(tensor.shape, dtype=torch.int64) for name, tensor in model.state_dict().items()}
    for slot in decoder_slots(config, ["model.layers.1.mlp.experts.gate_up_proj"] if fused else []).values():
        whole = covered[slot.parameter] if slot.expert is None else covered[slot.parameter][slot.expert]
        rows = slot.rows or range(len(whole))
        whole[rows.start : rows.stop] += 1
    assert all((count == 1).all() for count in covered.values())


def test_progress_counts_the_tensors(published: Path, tensors: Tensors) -> None:
    seen: list[tuple[int, int]] = []
    load_target(published, torch.float32, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, len(tensors)) for i in range(1, len(tensors) + 1)]


def test_loaded_models_are_ready_for_inference(published: Path) -> None:
    model = load_target(published, torch.bfloat16)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.rope.inverse.dtype == torch.float32
    exact = load_target(published, torch.float32).rope.inverse
    assert torch.equal(model.rope.inverse, exact)  # not rounded on the way


def test_float32_weights_lie_column_by_column(published: Path) -> None:
    model = load_target(published, torch.float32)
    assert model.layers[0].attention.qkv.weight.stride() == (1, model.layers[0].attention.qkv.out_features)
    assert load_target(published, torch.bfloat16).layers[0].attention.qkv.weight.is_contiguous()


# tied embeddings


def tied(folder: Path, value: bool) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "tie_word_embeddings": value}))


def test_tied_without_lm_head(folder: Path, tensors: Tensors) -> None:
    tied(folder, True)
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    model = load_target(folder, torch.float32)
    assert model.lm_head is None and model.head_weight is model.embed.weight


def test_tied_with_the_same_lm_head(folder: Path, tensors: Tensors) -> None:
    tied(folder, True)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    assert load_target(folder, torch.float32).lm_head is None


def test_tied_with_another_lm_head(folder: Path, tensors: Tensors) -> None:
    tied(folder, True)
    save_file(tensors, folder / "model.safetensors")
    refused(folder, "tie_word_embeddings is true but lm_head.weight differs from the embedding")


def test_untied_without_lm_head(folder: Path, tensors: Tensors) -> None:
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    refused(folder, "1 missing tensors: lm_head.weight")


# tensors that do not fit


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda t: {k: v for k, v in t.items() if k != name}


def with_value(value: float) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        tensors[UP][3, 2] = value
        return tensors

    return change


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (without(UP), (f"1 missing tensors: {UP}",)),
        (
            lambda t: {**t, "model.layers.1.mlp.up_proj.bias": t[UP][:, 0].clone()},
            ("1 unknown tensors: model.layers.1",),
        ),
        (lambda t: {**without(UP)(t), "up": t[UP]}, (f"1 missing tensors: {UP}", "1 unknown tensors: up")),
        (lambda t: {f"module.{k}": v for k, v in t.items()}, ("39 missing", "39 unknown", "and 31 more")),
        (lambda t: {**t, UP: t[UP].T.contiguous()}, (UP, "has shape [48, 56], expected [56, 48]")),
        (lambda t: {**t, UP: t[UP][:-1].clone()}, (UP, "has shape [55, 48], expected [56, 48]")),
        (lambda t: {**t, UP: t[UP][:, 0].clone()}, (UP, "has shape [56], expected [56, 48]")),
        (lambda t: {**t, UP: t[UP].char()}, (UP, "holds torch.int8 values; quantised weights are not supported")),
        (with_value(float("nan")), (UP, "holds NaN or infinite values")),
        (with_value(float("inf")), (UP, "holds NaN or infinite values")),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    folder: Path, tensors: Tensors, change: Callable[[Tensors], Tensors], parts: tuple[str, ...]
) -> None:
    save_file(change(tensors), folder / "model.safetensors")
    refused(folder, str(folder), *parts)


def test_values_that_overflow_the_dtype_are_named(folder: Path, tensors: Tensors) -> None:
    tensors[UP][3, 2] = 1e6
    save_file(tensors, folder / "model.safetensors")
    load_target(folder, torch.float32)
    refused(folder, UP, "holds NaN or infinite values in torch.float16", dtype=torch.float16)


# foreign and broken files


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def test_a_pickle_is_never_run(folder: Path, tensors: Tensors) -> None:
    marker = folder / "was run"
    for payload in (
        lambda f: torch.save({**tensors, "x": Evil(marker)}, f),
        lambda f: f.write_bytes(pickle.dumps(Evil(marker))),
    ):
        payload(folder / "pytorch_model.bin")
        refused(folder, "pytorch_model.bin cannot be read with weights_only")
        assert not marker.exists()
    pickle.loads((folder / "pytorch_model.bin").read_bytes())
    assert marker.exists()  # it would have


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00" * 64, b"<!DOCTYPE html>", b"version https://git-lfs.github.com/spec/v1\n"],
    ids=["empty", "zeros", "a web page", "a git lfs pointer"],
)
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("model.safetensors", "model.safetensors is not a readable safetensors file"),
        ("pytorch_model.bin", "pytorch_model.bin cannot be read with weights_only"),
    ],
)
def test_foreign_files_are_named(folder: Path, name: str, text: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    refused(folder, text)


def test_a_truncated_file_is_named(folder: Path, tensors: Tensors) -> None:
    save_file(tensors, folder / "model.safetensors")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    refused(folder, "model.safetensors is not a readable safetensors file")


@pytest.mark.parametrize("value", [[1, 2], {"a": 1}, {"model": {"a": torch.ones(1)}}])
def test_a_bin_must_hold_tensors_by_name(folder: Path, value: object) -> None:
    torch.save(value, folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin does not hold a dictionary of tensors")


def test_no_weights_and_no_folder(folder: Path) -> None:
    refused(folder, f"{folder} holds neither model.safetensors nor pytorch_model.bin")
    refused(folder / "absent", "config.json does not exist")


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_an_index_that_names_an_absent_shard(folder: Path, tensors: Tensors, suffix: str) -> None:
    shard(folder, tensors, suffix)
    (gone,) = folder.glob(f"*-00002-of-00003.{suffix}")
    gone.unlink()
    refused(folder, f"index.json names files that do not exist: {gone.name}")


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_an_index_that_lies_about_a_shard(folder: Path, tensors: Tensors, suffix: str) -> None:
    index = shard(folder, tensors, suffix)
    places = json.loads(index.read_text())["weight_map"]
    here = places[UP]
    other = next(file for file in places.values() if file != here)
    index.write_text(json.dumps({"weight_map": {**places, UP: other}}))
    with pytest.raises(CheckpointError, match=f"{here}: 1 unknown tensors: {UP}|{other}: 1 missing tensors: {UP}"):
        load_target(folder, torch.float32)
    places.pop(UP)  # a tensor that the index forgets is not skipped
    index.write_text(json.dumps({"weight_map": places}))
    refused(folder, f"{here}: 1 unknown tensors: {UP}")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"{", "model.safetensors.index.json is not valid JSON"),
        (b"\xff\xfe", "model.safetensors.index.json is not valid JSON"),
        (b"[]", "model.safetensors.index.json must hold a JSON object"),
        (b"{}", "model.safetensors.index.json has no weight_map"),
        (b'{"weight_map": []}', "model.safetensors.index.json has no weight_map"),
        (b'{"weight_map": {"a": 3}}', "names files that do not exist: 3"),
    ],
)
def test_a_broken_index_is_named(folder: Path, content: bytes, text: str) -> None:
    (folder / "model.safetensors.index.json").write_bytes(content)
    refused(folder, text)


def test_files_are_read_by_name(published: Path, tensors: Tensors) -> None:
    files = WeightFiles(published)
    assert files.names() == set(tensors)
    assert torch.equal(files.read(UP), tensors[UP])
    assert dict(files.items([UP])).keys() == {UP}


# writing


def fresh(**changes: object) -> Decoder:
    raw = dict(
        architectures=["LlamaForCausalLM"], vocab_size=53, hidden_size=48, intermediate_size=56, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, rope_theta=5000.0, eos_token_id=[2, 3],
        bos_token_id=1, torch_dtype="float32",
    )  # fmt: skip
    model = Decoder(parse_config({**raw, **changes}))
    init_weights(model, torch.Generator().manual_seed(2), std=0.2)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.arange(len(parameter)) / len(parameter)
    return model.requires_grad_(False).eval()


def same_model(got: Decoder, expected: Decoder) -> None:
    pairs = zip(got.state_dict().items(), expected.state_dict().items(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def same_logits(model: Decoder, theirs: PreTrainedModel) -> None:
    tokens = some_tokens(20)
    rig = Rig(model)
    ours = model.logits(rig.feed(tokens, rig.table(20), [20], ()).final)
    torch.testing.assert_close(ours, theirs(torch.tensor([tokens])).logits, rtol=1e-4, atol=1e-4)


def read_by_transformers(folder: Path) -> PreTrainedModel:
    theirs, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return theirs


@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": True, "eos_token_id": 2}, {"attention_bias": True, "mlp_bias": True}]
)
def test_what_we_save_transformers_loads(tmp_path: Path, changes: dict[str, object]) -> None:
    model = fresh(**changes)
    save_target(model, tmp_path, torch.float32)
    theirs = read_by_transformers(tmp_path)
    assert theirs.dtype == torch.float32 and theirs.config.eos_token_id == changes.get("eos_token_id", [2, 3])
    same_logits(model, theirs)
    again = load_target(tmp_path, torch.float32)
    assert again.config == model.config
    same_model(again, model)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_saved_under_its_published_names(tmp_path: Path, family: str) -> None:
    """What transformers wrote is read, written by us, and read by transformers: all the same model."""
    reference = save_reference(tmp_path / "theirs", family)
    model = load_target(tmp_path / "theirs", torch.float32)
    save_target(model, tmp_path / "ours", torch.float32)
    names = WeightFiles(tmp_path / "ours").names()
    assert names == WeightFiles(tmp_path / "theirs").names()
    theirs = read_by_transformers(tmp_path / "ours")
    same_logits(model, theirs)
    tokens = torch.tensor([some_tokens(20)])
    torch.testing.assert_close(theirs(tokens).logits, reference(tokens).logits, rtol=1e-5, atol=1e-5)
    again = load_target(tmp_path / "ours", torch.float32)
    assert again.config == model.config
    same_model(again, model)


def test_saving_rounds_once_and_leaves_the_model_alone(tmp_path: Path) -> None:
    model = fresh(tie_word_embeddings=True)
    before = model.embed.weight.clone()
    save_target(model, tmp_path / "new" / "folder")
    assert torch.equal(model.embed.weight, before)
    assert load_config(tmp_path / "new" / "folder") == replace(model.config, dtype="bfloat16")
    again = load_target(tmp_path / "new" / "folder", torch.float32)
    assert torch.equal(again.embed.weight, before.bfloat16().float())
    save_target(again, tmp_path, torch.bfloat16)  # from weights laid out by columns
    assert (tmp_path / "model.safetensors").read_bytes() == (
        tmp_path / "new" / "folder" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"qk_norm": True},
            "a LlamaForCausalLM with this config cannot be written: qk_norm True would be read as False",
        ),
        ({"windows": (None, 8)}, "windows (None, 8) would be read as (None, None)"),
        ({"qkv_bias": True, "partial_rotary": 0.5}, "o_bias False would be read as True; partial_rotary 0.5 would be"),
    ],
)
def test_what_the_published_keys_cannot_say_is_refused(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    model = fresh()
    model.config = replace(model.config, **changes)
    with pytest.raises(CheckpointError) as caught:
        save_target(model, tmp_path / "out")
    assert text in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_correction_of_a_gate_is_saved_exactly(tmp_path: Path) -> None:
    """In bfloat16 it would choose other experts."""
    save_reference(tmp_path, "deepseek_v3")
    model = load_target(tmp_path, torch.bfloat16)
    save_target(model, tmp_path / "out", torch.bfloat16)
    name = "model.layers.2.mlp.gate.e_score_correction_bias"
    saved, given = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", tmp_path))
    assert saved[name].dtype == torch.float32 and torch.equal(saved[name], given[name])
    assert saved["model.layers.2.mlp.gate.weight"].dtype == torch.bfloat16


# mixtures of experts and MTP modules


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deepseek")
    save_reference(folder, "deepseek_v3")
    return folder


@pytest.fixture
def routed(deepseek: Path, tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_bytes((deepseek / "config.json").read_bytes())
    return tmp_path


def fused_experts(tensors: Tensors) -> Tensors:
    """As transformers 5 holds them in memory."""
    made = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in {name.split(".mlp.experts.")[0] for name in tensors if ".mlp.experts." in name}:
        parts = {
            part: torch.stack([tensors[f"{layer}.mlp.experts.{e}.{part}_proj.weight"] for e in range(8)])
            for part in ("gate", "up", "down")
        }
        made[f"{layer}.mlp.experts.gate_up_proj"] = torch.cat((parts["gate"], parts["up"]), dim=1)
        made[f"{layer}.mlp.experts.down_proj"] = parts["down"]
    return made


def test_fused_experts_load_alike(deepseek: Path, routed: Path) -> None:
    tensors = fused_experts(load_file(deepseek / "model.safetensors"))
    assert not any(".experts.0." in name for name in tensors)
    save_file(tensors, routed / "model.safetensors")
    same_model(load_target(routed, torch.float32), load_target(deepseek, torch.float32))


def test_half_fused_experts_are_named(deepseek: Path, routed: Path) -> None:
    tensors = fused_experts(load_file(deepseek / "model.safetensors"))
    del tensors["model.layers.2.mlp.experts.down_proj"]
    save_file(tensors, routed / "model.safetensors")
    refused(routed, "1 missing tensors: model.layers.2.mlp.experts.down_proj")


def mtp_tensors(tensors: Tensors, own: tuple[str, ...], last: str, module: str) -> Tensors:
    """An MTP module made of the target's last layer and what is its own."""
    layer = {f"{module}{n.removeprefix(last)}": t.clone() for n, t in tensors.items() if n.startswith(last)}
    return layer | {f"{module}{name}.weight": torch.ones(3) for name in own}


V3_OWN = ("enorm", "hnorm", "eh_proj", "embed_tokens", "shared_head.norm", "shared_head.head")
MIMO_OWN = ("token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm")


@pytest.mark.parametrize(
    ("family", "own", "module"),
    [
        ("deepseek_v3", V3_OWN, "model.layers.4."),
        ("glm4_moe", V3_OWN, "model.layers.4."),
        ("qwen2", MIMO_OWN, "model.mtp_layers.0."),
    ],
)
def test_mtp_modules_are_left_to_their_head(tmp_path: Path, family: str, own: tuple[str, ...], module: str) -> None:
    save_reference(tmp_path, family)
    if family == "qwen2":  # of which MiMo is one, with MTP modules
        raw = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**raw, "architectures": ["MiMoForCausalLM"]}))
    expected, tensors = load_target(tmp_path, torch.float32), load_file(tmp_path / "model.safetensors")
    extra = mtp_tensors(tensors, own, "model.layers.3.", module)
    save_file({**tensors, **extra}, tmp_path / "model.safetensors")
    same_model(load_target(tmp_path, torch.float32), expected)
    stray = f"{module}another.weight"
    save_file({**tensors, **extra, stray: torch.ones(1)}, tmp_path / "model.safetensors")
    refused(tmp_path, f"1 unknown tensors: {stray}")
    save_file({**without("model.norm.weight")(tensors), **extra}, tmp_path / "model.safetensors")
    refused(tmp_path, "1 missing tensors: model.norm.weight")


def test_layers_beyond_the_last_are_unknown_where_a_family_has_no_mtp(tmp_path: Path) -> None:
    save_reference(tmp_path, "qwen3_moe")
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "model.layers.4.enorm.weight": torch.ones(1)}, tmp_path / "model.safetensors")
    refused(tmp_path, "1 unknown tensors: model.layers.4.enorm.weight")


# float8


def quantise(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """float8 and scales, block by block."""
    rows, columns = weight.shape
    scale = torch.zeros(-(-rows // block[0]), -(-columns // block[1]))
    stored = torch.zeros(rows, columns, dtype=torch.float8_e4m3fn)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            at = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            scale[i, j] = weight[at].abs().max() / 448
            stored[at] = (weight[at] / scale[i, j]).to(torch.float8_e4m3fn)
    return stored, scale


def restored(stored: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """The value of each weight, one by one."""
    rows, columns = stored.shape
    at = [[float(scale[i // block[0], j // block[1]]) for j in range(columns)] for i in range(rows)]
    return stored.float() * torch.tensor(at)


def in_float8(tensors: Tensors, block: tuple[int, int]) -> tuple[Tensors, Tensors]:
    """What a file holds whose projections are float8, and the values that it stands for."""
    held, values = {}, {}
    for name, tensor in tensors.items():
        held[name] = values[name] = tensor
        if "_proj" in name and tensor.dim() == 2:
            held[name], held[f"{name}_scale_inv"] = quantise(tensor, block)
            values[name] = restored(held[name], held[f"{name}_scale_inv"], block)
    return held, values


def with_block(folder: Path, block: tuple[int, int]) -> None:
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(block)}
    (folder / "config.json").write_text(json.dumps(raw))


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "scales in other files"])
@pytest.mark.parametrize("block", [(128, 128), (16, 16), (10, 7)])
def test_float8_weights_are_dequantised(deepseek: Path, routed: Path, block: tuple[int, int], sharded: bool) -> None:
    """Blocks larger than a weight, that divide it, and that leave partial ones at both ends."""
    tensors = load_file(deepseek / "model.safetensors")
    held, values = in_float8(tensors, block)
    if block != (128, 128):
        with_block(routed, block)
    if sharded:
        shard(routed, held, parts=5)
        places = json.loads((routed / "model.safetensors.index.json").read_text())["weight_map"]
        assert any(places[n] != places[f"{n}_scale_inv"] for n in tensors if f"{n}_scale_inv" in held)
    else:
        save_file(held, routed / "model.safetensors")
    got = load_target(routed, torch.float32)
    assert (routed / "plain").mkdir() is None
    (routed / "plain" / "config.json").write_bytes((deepseek / "config.json").read_bytes())
    save_file(values, routed / "plain" / "model.safetensors")
    same_model(got, load_target(routed / "plain", torch.float32))
    name = "model.layers.1.self_attn.o_proj.weight"
    assert 0 < (values[name] - tensors[name]).abs().max() < 0.07 * tensors[name].abs().max()


def test_stacks_of_float8_experts_have_stacks_of_scales(deepseek: Path, routed: Path) -> None:
    tensors = load_file(deepseek / "model.safetensors")
    held, values = in_float8(tensors, (16, 16))
    with_block(routed, (16, 16))
    whole = fused_experts(values)
    for name in [n for n in whole if ".experts." in n]:
        parts = [quantise(matrix, (16, 16)) for matrix in whole[name]]
        whole[name], whole[f"{name}_scale_inv"] = (torch.stack(part) for part in zip(*parts, strict=True))
    save_file(whole, routed / "model.safetensors")
    got = load_target(routed, torch.float32).layers[2].mlp.experts.down[3]
    expected = values["model.layers.2.mlp.experts.3.down_proj.weight"]
    torch.testing.assert_close(got, expected, rtol=0.07, atol=1e-3)


O_PROJ = "model.layers.1.self_attn.o_proj.weight"


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (
            lambda t: without(f"{O_PROJ}_scale_inv")(t),
            (f"{O_PROJ} holds torch.float8_e4m3fn values without their scales (_scale_inv)",),
        ),
        (lambda t: {**t, O_PROJ: t[O_PROJ].bfloat16()}, (O_PROJ, "holds torch.bfloat16 values beside scales")),
        (
            lambda t: {**t, f"{O_PROJ}_scale_inv": torch.ones(2, 1)},
            (O_PROJ, "has scales of shape [2, 1], expected [1, 1] for a weight [48, 40] in blocks of 128 x 128"),
        ),
        (lambda t: without(O_PROJ)(t), (f"1 missing tensors: {O_PROJ}", f"1 unknown tensors: {O_PROJ}_scale_inv")),
        (
            lambda t: {**t, f"{O_PROJ}_scale_inv": torch.full((1, 1), float("nan"))},
            (O_PROJ, "holds NaN or infinite values"),
        ),
        (lambda t: {**t, "lm_head.bias_scale_inv": torch.ones(1)}, ("1 unknown tensors: lm_head.bias_scale_inv",)),
    ],
    ids=["no scale", "not float8", "another shape", "no weight", "nan", "a scale of nothing"],
)
def test_float8_that_does_not_fit_is_named(
    deepseek: Path, routed: Path, change: Callable[[Tensors], Tensors], parts: tuple[str, ...]
) -> None:
    held, _ = in_float8(load_file(deepseek / "model.safetensors"), (128, 128))
    save_file(change(held), routed / "model.safetensors")
    refused(routed, *parts)
