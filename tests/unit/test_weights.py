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
from transformers import AutoModelForCausalLM

from target.config import load_config, parse_config
from target.errors import CheckpointError
from target.llama import Llama, init_weights
from target.weights import WeightFiles, llama_slots, load_llama, save_llama
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
        load_llama(folder, dtype)
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
    got, expected = load_llama(folder, torch.float32), load_llama(published, torch.float32)
    pairs = zip(got.named_parameters(), expected.named_parameters(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)
    assert got.config == expected.config


def test_safetensors_go_before_bin(folder: Path, tensors: Tensors) -> None:
    save_file(tensors, folder / "model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"not looked at")
    load_llama(folder, torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_has_its_published_tensors(tmp_path: Path, family: str) -> None:
    """Slots cover each row of each parameter once; the parity tests show that they are the right rows."""
    save_reference(tmp_path, family)
    config = load_config(tmp_path)
    with torch.device("meta"):
        model = Llama(config)
    covered = {name: torch.zeros(p.shape[0], dtype=torch.int64) for name, p in model.named_parameters()}
    for slot in llama_slots(config).values():
        rows = slot.rows or range(len(covered[slot.parameter]))
        covered[slot.parameter][rows.start : rows.stop] += 1
    assert all((count == 1).all() for count in covered.values())


def test_progress_counts_the_tensors(published: Path, tensors: Tensors) -> None:
    seen: list[tuple[int, int]] = []
    load_llama(published, torch.float32, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, len(tensors)) for i in range(1, len(tensors) + 1)]


def test_loaded_models_are_ready_for_inference(published: Path) -> None:
    model = load_llama(published, torch.bfloat16)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.rope.inverse.dtype == torch.float32
    exact = load_llama(published, torch.float32).rope.inverse
    assert torch.equal(model.rope.inverse, exact)  # not rounded on the way


def test_float32_weights_lie_column_by_column(published: Path) -> None:
    model = load_llama(published, torch.float32)
    assert model.layers[0].attention.qkv.weight.stride() == (1, model.layers[0].attention.qkv.out_features)
    assert load_llama(published, torch.bfloat16).layers[0].attention.qkv.weight.is_contiguous()


# tied embeddings


def tied(folder: Path, value: bool) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "tie_word_embeddings": value}))


def test_tied_without_lm_head(folder: Path, tensors: Tensors) -> None:
    tied(folder, True)
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    model = load_llama(folder, torch.float32)
    assert model.lm_head is None and model.head_weight is model.embed.weight


def test_tied_with_the_same_lm_head(folder: Path, tensors: Tensors) -> None:
    tied(folder, True)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    assert load_llama(folder, torch.float32).lm_head is None


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
    load_llama(folder, torch.float32)
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
        load_llama(folder, torch.float32)
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


def fresh(**changes: object) -> Llama:
    raw = dict(
        architectures=["LlamaForCausalLM"], vocab_size=53, hidden_size=48, intermediate_size=56, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, rope_theta=5000.0, eos_token_id=[2, 3],
        bos_token_id=1, torch_dtype="float32",
    )  # fmt: skip
    model = Llama(parse_config({**raw, **changes}))
    init_weights(model, torch.Generator().manual_seed(2), std=0.2)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.arange(len(parameter)) / len(parameter)
    return model.requires_grad_(False).eval()


@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": True, "eos_token_id": 2}, {"attention_bias": True, "mlp_bias": True}]
)
def test_what_we_save_transformers_loads(tmp_path: Path, changes: dict[str, object]) -> None:
    model, tokens = fresh(**changes), some_tokens(20)
    save_llama(model, tmp_path, torch.float32)
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, dtype="auto")
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.dtype == torch.float32 and theirs.config.eos_token_id == changes.get("eos_token_id", [2, 3])
    rig = Rig(model)
    ours = model.logits(rig.feed(tokens, rig.table(20), [20], ()).final)
    torch.testing.assert_close(ours, theirs(torch.tensor([tokens])).logits, rtol=1e-4, atol=1e-4)
    again = load_llama(tmp_path, torch.float32)
    assert again.config == model.config
    pairs = zip(again.named_parameters(), model.named_parameters(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def test_saving_rounds_once_and_leaves_the_model_alone(tmp_path: Path) -> None:
    model = fresh(tie_word_embeddings=True)
    before = model.embed.weight.clone()
    save_llama(model, tmp_path / "new" / "folder")
    assert torch.equal(model.embed.weight, before)
    assert load_config(tmp_path / "new" / "folder") == replace(model.config, dtype="bfloat16")
    again = load_llama(tmp_path / "new" / "folder", torch.float32)
    assert torch.equal(again.embed.weight, before.bfloat16().float())
    save_llama(again, tmp_path, torch.bfloat16)  # from weights laid out by columns
    assert (tmp_path / "model.safetensors").read_bytes() == (
        tmp_path / "new" / "folder" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("family", ["qwen3", "mistral", "llama-yarn"])
def test_what_cannot_be_saved_is_refused(tmp_path: Path, family: str) -> None:
    save_reference(tmp_path, family)
    with pytest.raises(CheckpointError, match="only plain Llama configs can be written"):
        save_llama(load_llama(tmp_path, torch.float32), tmp_path / "out")
