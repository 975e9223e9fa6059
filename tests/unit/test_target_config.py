"""What the keys of a config.json mean, and what is said about keys that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from target.config import load_config, parse_config, parse_rope
from target.errors import CheckpointError

LLAMA: dict[str, Any] = dict(
    architectures=["LlamaForCausalLM"], vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
    num_attention_heads=4,
)  # fmt: skip
MISTRAL, QWEN2, QWEN3 = ({**LLAMA, "architectures": [f"{n}ForCausalLM"]} for n in ("Mistral", "Qwen2", "Qwen3"))


def test_what_a_bare_config_means() -> None:
    config = parse_config(LLAMA)
    assert (config.num_kv_heads, config.head_dim, config.norm_eps, config.max_position) == (4, 8, 1e-6, 2048)
    assert (config.rope.kind, config.rope.theta, config.dtype) == ("default", 10000.0, "float32")
    assert (config.bos_token_id, config.eos_token_ids, config.tied) == (None, (), False)
    assert not (config.qkv_bias or config.o_bias or config.mlp_bias or config.qk_norm)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (LLAMA, (False, False, False, False)),
        ({**LLAMA, "attention_bias": True}, (True, True, False, False)),
        ({**LLAMA, "mlp_bias": True}, (False, False, True, False)),
        ({**MISTRAL, "attention_bias": True, "mlp_bias": True}, (False, False, False, False)),
        ({**QWEN2, "attention_bias": True}, (True, False, False, False)),
        (QWEN3, (False, False, False, True)),
        ({**QWEN3, "attention_bias": True}, (True, True, False, True)),
    ],
)
def test_biases_and_norms_of_the_families(raw: dict[str, Any], expected: tuple[bool, ...]) -> None:
    config = parse_config(raw)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm) == expected


def test_head_dim() -> None:
    assert parse_config({**LLAMA, "head_dim": None}).head_dim == 8
    assert parse_config({**LLAMA, "head_dim": 16}).head_dim == 16
    assert parse_config(QWEN3).head_dim == 128  # the default of its class, whatever the width


@pytest.mark.parametrize(
    ("raw", "windows"),
    [
        ({**LLAMA, "sliding_window": 9}, (None, None, None)),
        ({**MISTRAL, "sliding_window": 9}, (9, 9, 9)),
        ({**MISTRAL, "sliding_window": None}, (None, None, None)),
        (MISTRAL, (4096, 4096, 4096)),
        ({**QWEN2, "sliding_window": 9, "use_sliding_window": False, "max_window_layers": 0}, (None, None, None)),
        ({**QWEN2, "sliding_window": 9, "use_sliding_window": True, "max_window_layers": 1}, (None, 9, 9)),
        ({**QWEN2, "sliding_window": 9, "use_sliding_window": True}, (None, None, None)),
        (
            {
                **QWEN3,
                "sliding_window": 9,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            (9, None, 9),
        ),
    ],
)
def test_windows(raw: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    assert parse_config(raw).windows == windows


@pytest.mark.parametrize("kind", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config])
def test_what_transformers_writes_is_read_back(tmp_path: Path, kind: Any) -> None:
    sizes = {k: v for k, v in LLAMA.items() if k != "architectures"}
    published = kind(**sizes, num_key_value_heads=2, rms_norm_eps=1e-4, eos_token_id=[5, 6], bos_token_id=4)
    published.architectures = [kind.__name__.replace("Config", "ForCausalLM")]
    published.save_pretrained(tmp_path)
    config = load_config(tmp_path)
    assert (config.num_layers, config.num_kv_heads, config.norm_eps, config.rope.theta) == (3, 2, 1e-4, 10000.0)
    assert (config.bos_token_id, config.eos_token_ids) == (4, (5, 6))
    assert config.max_position == published.max_position_embeddings


def test_rope_old_and_new() -> None:
    new = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                               "high_freq_factor": 4.0, "original_max_position_embeddings": 16}}  # fmt: skip
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **new["rope_parameters"]}}
    del old["rope_scaling"]["rope_type"], old["rope_scaling"]["rope_theta"]  # type: ignore[attr-defined]
    assert parse_rope(new, "") == parse_rope(old, "")
    assert parse_rope(new, "").original_max_position == 16
    assert parse_rope({"rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}}, "").kind == "default"
    yarn = {"rope_scaling": {"type": "yarn", "factor": 4}, "max_position_embeddings": 64}
    assert parse_rope(yarn, "").original_max_position == 64


def test_generation_config_may_name_more_ends(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "eos_token_id": 2}))
    assert load_config(tmp_path).eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    assert load_config(tmp_path).eos_token_ids == (2, 0)
    (tmp_path / "generation_config.json").write_text("{}")
    assert load_config(tmp_path).eos_token_ids == (2,)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architectures ['GPT2LMHeadModel'] is not supported; supported are L"),
        ({"architectures": None}, "architectures [] is not supported"),
        ({"architectures": "LlamaForCausalLM"}, "architectures LlamaForCausalLM is not supported"),
        ({"hidden_size": None}, "hidden_size must be a positive integer, got None"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers must be a positive integer, got '3'"),
        ({"vocab_size": True}, "vocab_size must be a positive integer, got True"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
        ({"num_key_value_heads": -1}, "num_key_value_heads must be a positive integer, got -1"),
        ({"head_dim": 7}, "head_dim must be even for rotary embeddings, got 7"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps must be a positive number, got 'small'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a positive number, got nan"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported, only silu"),
        ({"eos_token_id": ["</s>"]}, "eos_token_id must be a token id or a list of them, got ['</s>']"),
        ({"rope_theta": "1e4"}, "rope_theta must be a positive number, got '1e4'"),
        ({"rope_scaling": {"type": "su"}}, "rope type 'su' is not supported; supported are default"),
        ({"rope_scaling": {"type": "linear"}}, "rope type 'linear': factor must be a positive number, got None"),
        ({"rope_scaling": {"type": "dynamic", "factor": 0}}, "rope type 'dynamic': factor must be a positive number"),
        ({"rope_scaling": {"type": "yarn", "factor": "4"}}, "rope type 'yarn': factor must be a positive number"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "rope type 'llama3': low_freq_factor must be a positive"),
        ({"rope_scaling": "linear"}, "rope parameters must be one set for all layers"),
        ({"rope_parameters": {"full_attention": {}}}, "rope parameters must be one set for all layers"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not supported"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 0}, "sliding_window must be a positive integer"),
        (
            {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "layer_types": ["full_attention"]},
            "layer_types names 1 layers, num_hidden_layers is 3",
        ),
    ],
)
def test_unusable_keys_are_named(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse_config({**LLAMA, **changes}, "folder/config.json")
    assert str(caught.value).startswith(f"folder/config.json: {text}")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"{", "is not valid JSON"),
        (b'{"a": "\xff\xfe"}', "is not valid JSON: 'utf-8' codec can't decode"),
        ("\ufeff{}".encode(), "is not valid JSON"),
        (b"[1]", "must hold a JSON object"),
        (b"", "is not valid JSON"),
        (None, "does not exist; expected a Hugging Face style model folder"),
    ],
)
def test_unreadable_files_are_named(tmp_path: Path, content: bytes | None, text: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        load_config(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'} {text}")


def test_a_directory_in_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"config.json cannot be read"):
        load_config(tmp_path)
