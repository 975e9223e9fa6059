"""What the keys of a config.json mean, and what is said about keys that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    Glm4MoeConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from target.config import load_config, parse_config, parse_rope
from target.config_mla import MlaConfig
from target.config_moe import MoeConfig
from target.errors import CheckpointError

LLAMA: dict[str, Any] = dict(
    architectures=["LlamaForCausalLM"], vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
    num_attention_heads=4,
)  # fmt: skip
MISTRAL, QWEN2, QWEN3, MIMO = (
    {**LLAMA, "architectures": [f"{n}ForCausalLM"]} for n in ("Mistral", "Qwen2", "Qwen3", "MiMo")
)
ROUTED: dict[str, Any] = dict(moe_intermediate_size=12, num_experts_per_tok=2)
QWEN3_MOE = {**LLAMA, **ROUTED, "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 8}
DEEPSEEK_ROUTED = {**ROUTED, "n_routed_experts": 8, "n_shared_experts": 2, "first_k_dense_replace": 1}
GLM4 = {**LLAMA, **DEEPSEEK_ROUTED, "architectures": ["Glm4MoeForCausalLM"]}
LATENT = dict(q_lora_rank=12, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6)
V2, V3, GLM_LITE = (
    {**LLAMA, **LATENT, **DEEPSEEK_ROUTED, "architectures": [f"{n}ForCausalLM"]}
    for n in ("DeepseekV2", "DeepseekV3", "Glm4MoeLite")
)


PUBLISHED_V3 = json.loads("""
{"architectures":["DeepseekV3ForCausalLM"],"model_type":"deepseek_v3","hidden_size":7168,"intermediate_size":18432,
 "moe_intermediate_size":2048,"num_hidden_layers":61,"num_nextn_predict_layers":1,"num_attention_heads":128,
 "num_key_value_heads":128,"q_lora_rank":1536,"kv_lora_rank":512,"qk_nope_head_dim":128,"qk_rope_head_dim":64,
 "v_head_dim":128,"n_routed_experts":256,"n_shared_experts":1,"num_experts_per_tok":8,"n_group":8,"topk_group":4,
 "topk_method":"noaux_tc","scoring_func":"sigmoid","norm_topk_prob":true,"routed_scaling_factor":2.5,
 "first_k_dense_replace":3,"moe_layer_freq":1,"rope_theta":10000,"rope_scaling":{"type":"yarn","factor":40,
 "original_max_position_embeddings":4096,"beta_fast":32,"beta_slow":1,"mscale":1.0,"mscale_all_dim":1.0},
 "rms_norm_eps":1e-06,"vocab_size":129280,"tie_word_embeddings":false,"attention_bias":false,"hidden_act":"silu",
 "quantization_config":{"quant_method":"fp8","fmt":"e4m3","weight_block_size":[128,128],"activation_scheme":"dynamic"}}
""")


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
        (MIMO, (True, False, False, False)),
        ({**QWEN3_MOE, "attention_bias": True}, (True, True, False, True)),
        ({**GLM4, "attention_bias": True}, (True, False, False, False)),
        ({**GLM4, "use_qk_norm": True}, (False, False, False, True)),
        (V3, (False, False, False, False)),
    ],
)
def test_biases_and_norms_of_the_families(raw: dict[str, Any], expected: tuple[bool, ...]) -> None:
    config = parse_config(raw)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm) == expected


def test_head_dim() -> None:
    assert parse_config({**LLAMA, "head_dim": None}).head_dim == 8
    assert parse_config({**LLAMA, "head_dim": 16}).head_dim == 16
    assert parse_config(QWEN3).head_dim == 128  # the default of its class, whatever the width
    assert parse_config(QWEN3_MOE).head_dim == 8  # its class has no such default
    assert parse_config({**V3, "head_dim": 99}).head_dim == 12  # of queries, with and without position


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
        ({**QWEN3_MOE, "sliding_window": 9}, (None, None, None)),
        ({**QWEN3_MOE, "sliding_window": 9, "use_sliding_window": True}, (9, 9, 9)),
        ({**V3, "sliding_window": 9, "use_sliding_window": True}, (None, None, None)),
    ],
)
def test_windows(raw: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    assert parse_config(raw).windows == windows


def test_sizes_of_latent_attention() -> None:
    mla = parse_config(V3).mla
    assert mla == MlaConfig(q_rank=12, rank=16, nope_dim=8, rope_dim=4, value_dim=6, interleaved=True)
    assert (mla.query_dim, mla.latent_dim) == (12, 20)
    other = parse_config({**V3, "q_lora_rank": None, "rope_interleave": False}).mla
    assert other is not None and (other.q_rank, other.interleaved) == (None, False)
    assert parse_config(GLM4).mla is None


def test_the_published_config_of_deepseek_v3() -> None:
    config = parse_config(PUBLISHED_V3)
    assert config.mla == MlaConfig(q_rank=1536, rank=512, nope_dim=128, rope_dim=64, value_dim=128)
    assert config.moe == MoeConfig(256, 8, 2048, "sigmoid", True, 2.5, 8, 4, 2048, frozenset({0, 1, 2}))
    assert (config.rope.kind, config.rope.theta, config.rope.original_max_position) == ("yarn", 10000.0, 4096)
    assert (config.num_layers, config.head_dim, config.rotary_dim, config.is_sparse(61)) == (61, 192, 64, True)
    assert config.fp8_block == (128, 128)


def test_what_part_of_a_head_is_rotated() -> None:
    assert (parse_config(LLAMA).rotary_dim, parse_config(V3).rotary_dim, parse_config(GLM4).rotary_dim) == (8, 4, 4)
    assert parse_config({**GLM4, "partial_rotary_factor": 0.25}).rotary_dim == 2
    assert parse_config({**GLM4, "rope_parameters": {"partial_rotary_factor": 1.0}}).rotary_dim == 8


V3_GATE = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid"}


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (QWEN3_MOE, MoeConfig(8, 2, 12, "softmax", normalise=False)),
        ({**QWEN3_MOE, "norm_topk_prob": True}, MoeConfig(8, 2, 12, "softmax", normalise=True)),
        (
            {**QWEN3_MOE, "decoder_sparse_step": 2, "mlp_only_layers": [1]},
            MoeConfig(8, 2, 12, "softmax", normalise=False, dense_layers=frozenset({0, 1, 2})),
        ),
        (
            {**V3, **V3_GATE, "topk_method": "noaux_tc"},
            MoeConfig(8, 2, 12, "sigmoid", True, 2.5, 4, 2, shared_size=24, dense_layers=frozenset({0})),
        ),
        (
            {**V3, "norm_topk_prob": False, "n_shared_experts": None},
            MoeConfig(8, 2, 12, "sigmoid", False, dense_layers=frozenset({0})),
        ),
        (GLM4, MoeConfig(8, 2, 12, "sigmoid", True, shared_size=24, dense_layers=frozenset({0}))),
        (
            {**GLM_LITE, "first_k_dense_replace": None, "mlp_layer_types": ["dense", "sparse", "dense"]},
            MoeConfig(8, 2, 12, "sigmoid", True, shared_size=24, dense_layers=frozenset({0, 2})),
        ),
        (
            {**V2, "n_group": 4, "topk_group": 2, "topk_method": "greedy"},
            MoeConfig(8, 2, 12, "softmax", False, shared_size=24, dense_layers=frozenset({0})),
        ),
        (
            {**V2, "n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy", "scoring_func": "softmax"},
            MoeConfig(8, 2, 12, "softmax", False, 1.0, 4, 2, shared_size=24, dense_layers=frozenset({0})),
        ),
    ],
)
def test_routing_of_the_families(raw: dict[str, Any], expected: MoeConfig) -> None:
    assert parse_config(raw).moe == expected


def test_which_layers_are_sparse() -> None:
    config = parse_config({**V3, "first_k_dense_replace": 2})
    assert [config.is_sparse(i) for i in range(5)] == [False, False, True, True, True]
    assert not any(parse_config(LLAMA).is_sparse(i) for i in range(5))


def test_the_block_of_float8_weights() -> None:
    published = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [64, 32], "activation_scheme": "dynamic"}
    assert parse_config({**V3, "quantization_config": published}).fp8_block == (64, 32)
    assert parse_config(V3).fp8_block == (128, 128)


@pytest.mark.parametrize(
    ("base", "changes", "text"),
    [
        (V3, {"kv_lora_rank": None}, "kv_lora_rank must be a positive integer, got None"),
        (V3, {"q_lora_rank": 0}, "q_lora_rank must be a positive integer, got 0"),
        (V3, {"hidden_size": 10**400}, "hidden_size must be at most 134217728, got 10000000000000000000"),
        (V3, {"partial_rotary_factor": [1]}, "partial_rotary_factor is not supported"),
        (V3, {"qk_rope_head_dim": 3}, "qk_rope_head_dim must be even for rotary embeddings, got 3"),
        (V3, {"attention_bias": True}, "attention_bias True is not supported, only False"),
        (V3, {"topk_method": "greedy"}, "topk_method 'greedy' is not supported, only 'noaux_tc'"),
        (V3, {"scoring_func": "softmax"}, "scoring_func 'softmax' is not supported, only 'sigmoid'"),
        (V3, {"moe_layer_freq": 2}, "moe_layer_freq 2 is not supported, only 1"),
        (V3, {"n_group": 3}, "8 experts do not make 3 groups"),
        (V3, {"n_group": 8}, "8 experts do not make 8 groups"),
        (V3, {"n_group": 2, "topk_group": 3}, "topk_group 3 is more than n_group 2"),
        (V3, {"n_group": 4, "num_experts_per_tok": 3}, "num_experts_per_tok 3 is more than the 2 experts that a token"),
        (V3, {"first_k_dense_replace": None}, "first_k_dense_replace must be an integer of 0 or more, got None"),
        (V3, {"n_routed_experts": "8"}, "n_routed_experts must be a positive integer, got '8'"),
        (V3, {"routed_scaling_factor": 0}, "routed_scaling_factor must be a positive number, got 0"),
        (V3, {"mlp_bias": True}, "mlp_bias True is not supported, only False"),
        (V3, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is not supported"),
        (V3, {"quantization_config": {"quant_method": "gptq"}}, "quantization_config: quant_method 'gptq' is not supp"),
        (V3, {"quantization_config": "fp8"}, "quantization_config must be an object, got 'fp8'"),
        (
            V3,
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": None}},
            "quantization_config: weight_block_size must be two positive integers, got None",
        ),
        (V2, {"norm_topk_prob": True}, "norm_topk_prob True is not supported, only False"),
        (V2, {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc' is not supported, only 'greedy' or 'group_limited"),
        (QWEN3_MOE, {"num_experts": 0}, "num_experts must be a positive integer, got 0"),
        (QWEN3_MOE, {"mlp_only_layers": 3}, "mlp_only_layers must be a list of layers, got 3"),
        (GLM_LITE, {"mlp_layer_types": ["dense"]}, "mlp_layer_types must name each of the 3 layers, got ['dense']"),
        (GLM4, {"partial_rotary_factor": 0.1}, "partial_rotary_factor 0.1 of head_dim 8 makes no rotary pairs"),
        (GLM4, {"partial_rotary_factor": 2.0}, "partial_rotary_factor 2 of head_dim 8 makes no rotary pairs"),
        (GLM4, {"partial_rotary_factor": "half"}, "partial_rotary_factor must be a positive number, got 'half'"),
        (LLAMA, {"quantization_config": {"quant_method": "awq"}}, "quantization_config: quant_method 'awq' is not sup"),
    ],
)
def test_unsupported_combinations_are_named(base: dict[str, Any], changes: dict[str, Any], text: str) -> None:
    parse_config(base)
    with pytest.raises(CheckpointError) as caught:
        parse_config({**base, **changes}, "folder/config.json")
    assert str(caught.value).startswith(f"folder/config.json: {text}")


def test_a_missing_rank_of_queries_is_not_none() -> None:
    with pytest.raises(CheckpointError, match="q_lora_rank is missing; it is null where queries have no low rank"):
        parse_config({k: v for k, v in V3.items() if k != "q_lora_rank"})


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        (Qwen3MoeConfig, {"num_experts": 8, **ROUTED}),
        (DeepseekV2Config, {**LATENT, **DEEPSEEK_ROUTED, "topk_method": "greedy"}),
        (DeepseekV3Config, {**LATENT, **DEEPSEEK_ROUTED, **V3_GATE}),
        (Glm4MoeConfig, DEEPSEEK_ROUTED),
    ],
)
def test_routing_that_transformers_writes_is_read_back(tmp_path: Path, kind: Any, own: dict[str, Any]) -> None:
    sizes = {k: v for k, v in LLAMA.items() if k != "architectures"}
    published = kind(**sizes, num_key_value_heads=4, **own)
    published.architectures = [kind.__name__.replace("Config", "ForCausalLM")]
    published.save_pretrained(tmp_path)
    moe = load_config(tmp_path).moe
    assert moe is not None and (moe.experts, moe.top_k, moe.inner_size) == (8, 2, 12)
    assert moe.dense_layers == frozenset(range(own.get("first_k_dense_replace", 0)))


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
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported, only 'silu'"),
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
