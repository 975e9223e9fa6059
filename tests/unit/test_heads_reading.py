"""What a head's folder means: family, sizes, switches, taps, vocabularies; and every wrong folder refused clearly."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from speculator.errors import CheckpointError, ConfigError
from speculator.heads.d2t import mask, offsets, read_target_ids
from speculator.heads.formats import read_head
from speculator.heads.load import build_head, load_head
from speculator.heads.overrides import parse_overrides, show
from speculator.heads.reading import HeadFile, TargetFacts
from speculator.heads.record import HeadRecord
from speculator.heads.save import save_head
from speculator.heads.taps import IDS, read_taps
from target.config import RopeConfig, parse_config
from target.decoder import Decoder, init_weights
from target.save import save_target

V, H, N = 48, 32, 12
FACTS = TargetFacts(hidden_size=H, vocab_size=V, num_layers=N, rope_theta=500000.0)
DRAFTS = torch.tensor([0, 3, 4, 9, 10, 17, 40, 47])


def tiny_target(**changes: object) -> Decoder:
    raw: dict[str, object] = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": V,
        "hidden_size": H,
        "intermediate_size": 40,
        "num_hidden_layers": N,
        "num_attention_heads": 4,
    }
    model = Decoder(parse_config({**raw, **changes}))
    init_weights(model, torch.Generator().manual_seed(0))
    return model.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def target() -> Decoder:
    return tiny_target()


RECORD = HeadRecord(
    kind="eagle3",
    hidden_size=H,
    target_hidden_size=H,
    vocab_size=V,
    draft_vocab_size=len(DRAFTS),
    intermediate_size=24,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    boundaries=(2, 6, 9),
    d2t=True,
)
EAGLE = replace(
    RECORD, kind="eagle", draft_vocab_size=V, boundaries=(), own_lm_head=False, d2t=False, rope=RopeConfig(10000.0)
)


class Folder:
    """A head's folder that a test bends."""

    def __init__(self, path: Path, target: Decoder, record: HeadRecord = RECORD, layout: str = "eagle3") -> None:
        self.path = path
        head = build_head(record, target, DRAFTS if record.d2t else None)
        init_weights(head, torch.Generator().manual_seed(1))
        save_head(head, path, layout, torch.float32)

    def config(self, **changes: Any) -> Folder:
        """Set keys of config.json; `...` removes one."""
        file = self.path / "config.json"
        config = {**json.loads(file.read_text()), **changes}
        file.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
        return self

    def tensors(self, change: Callable[[dict[str, Tensor]], object]) -> Folder:
        file = str(self.path / "model.safetensors")
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
        return self

    def set(self, **tensors: Tensor) -> Folder:
        return self.tensors(lambda held: held.update(tensors))

    def drop(self, *names: str) -> Folder:
        return self.tensors(lambda held: [held.pop(name) for name in names])

    def read(self, facts: TargetFacts | None = FACTS, **overrides: str) -> HeadFile:
        return read_head(self.path, facts, {name.replace("__", "."): text for name, text in overrides.items()})

    def refused(self, match: str, **overrides: str) -> None:
        with pytest.raises(CheckpointError, match=match) as caught:
            self.read(FACTS, **overrides)
        assert str(self.path) in caught.value.message


@pytest.fixture
def folder(tmp_path: Path, target: Decoder) -> Folder:
    return Folder(tmp_path / "head", target)


@pytest.fixture
def eagle(tmp_path: Path, target: Decoder) -> Folder:
    return Folder(tmp_path / "eagle", target, EAGLE, "eagle")


def choice(file: HeadFile, field: str) -> str:
    found = next(c for c in file.choices if c.field == field)
    return f"{'ambiguous ' if found.ambiguous else ''}{show(found.value)} from {found.source}"


# which family


@pytest.mark.parametrize(
    ("changes", "family"),
    [
        ({"speculators_model_type": "peagle", "transformer_layer_config": {}}, "P-EAGLE"),
        ({"speculators_model_type": "dflash"}, "DFlash"),
        ({"speculators_model_type": "dspark"}, "DSpark"),
        ({"speculators_model_type": "xpress"}, "XPress"),
        ({"speculators_model_type": "mtp"}, "MTP"),
        ({"architectures": ["DFlashDraftModel"]}, "DFlash"),
        ({"architectures": ["Qwen3DSparkModel"]}, "DSpark"),
        ({"architectures": ["DominoDraftModel"]}, "Domino"),
        ({"architectures": ["PEagleDraftModel"]}, "P-EAGLE"),
        ({"architectures": ["Gemma4Eagle3Model"]}, "EAGLE-3 on Gemma layers"),
        ({"dflash_config": {"mask_token_id": 1, "target_layer_ids": [1, 2]}}, "DFlash"),
    ],
)
def test_families_that_are_not_run_are_named(folder: Folder, changes: dict[str, Any], family: str) -> None:
    folder.config(**changes).refused(f"head of the {family} family, which is not run yet; EAGLE-1, 2 and 3 are")


@pytest.mark.parametrize(
    ("tensor", "family"),
    [
        ("mask_hidden", "P-EAGLE family"),
        ("markov_head.markov_w1.weight", "DSpark family"),
        ("prefix_gru.weight_ih_l0", "Domino family"),
        ("hidden_norm.weight", "DFlash family"),
        ("mtp.fc.weight", "MTP family"),
        ("model.layers.61.eh_proj.weight", "MTP family"),
        ("model.mtp_layers.0.input_proj.weight", "MTP family"),
        ("midlayer.self_attn.q_a_proj.weight", "MLA attention"),
        ("midlayer.self_attn.kv_a_proj_with_mqa.weight", "MLA attention"),
    ],
)
def test_families_are_known_by_their_tensors(folder: Folder, tensor: str, family: str) -> None:
    folder.set(**{tensor: torch.ones(2, 2)}).refused(family)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"speculators_model_type": "medusa"}, "'medusa' is unknown; known are eagle, eagle3, peagle"),
        ({"eagle_config": {"parallel_draft_step": 2}}, "parallel_draft_step"),
        ({"eagle_config": {"use_mtp_layernorm": True}}, "use_mtp_layernorm"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"eagle_config": 3}, "eagle_config must be an object"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope type 'linear': factor must be a positive number"),
        ({"rope_scaling": {"rope_type": "su"}}, "rope type 'su' is not supported"),
        ({"head_dim": "eight"}, "head_dim must be a positive integer, got 'eight'"),
        ({"head_dim": ..., "num_attention_heads": ...}, "neither head_dim nor num_attention_heads"),
        ({"head_dim": 7}, "q_proj has 32 rows, no multiple of head_dim 7"),
        ({"head_dim": True}, "head_dim must be a positive integer, got True"),
        ({"architectures": True}, "architectures must be a list of names, got True"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps must be a number"),
        ({"num_aux_hidden_states": 5}, "num_aux_hidden_states is 5, but fc reads 3"),
        ({IDS: [2, 6]}, "fc reads 3 hidden states but 2 boundaries"),
        ({IDS: [2, 6, 13]}, "boundary 13 does not exist in a target of 12 layers"),
        ({IDS: "2,6,9"}, "must be a list of integers"),
        ({"target_hidden_size": 64}, "hidden states of 64 values .* the target's have 32; it was made for another"),
    ],
)
def test_configs_that_cannot_be_run(folder: Folder, changes: dict[str, Any], text: str) -> None:
    folder.config(**changes).refused(text)


def test_eagle_1_and_3_differ_in_tensors_not_in_architecture(folder: Folder, eagle: Folder) -> None:
    for one in (folder, eagle):
        one.config(architectures=["LlamaForCausalLM"])
    assert (folder.read().record.kind, eagle.read().record.kind) == ("eagle3", "eagle")


def test_eagle_3_without_fc_is_known_by_its_wide_attention(folder: Folder) -> None:
    folder.drop("fc.weight", "midlayer.hidden_norm.weight").config(eagle_config={"use_aux_hidden_state": False})
    folder.refused("1 missing tensors: layers.0.hidden_norm.weight")


def test_a_target_is_not_a_head(tmp_path: Path, target: Decoder) -> None:
    save_target(target, tmp_path)
    with pytest.raises(CheckpointError, match="a whole model, not a draft head; give it as the target"):
        read_head(tmp_path)


def test_folders_that_hold_nothing_usable(tmp_path: Path, folder: Folder) -> None:
    with pytest.raises(CheckpointError, match="config.json does not exist"):
        read_head(tmp_path / "nowhere")
    (folder.path / "model.safetensors").write_bytes(b"not a tensor file")
    folder.refused("not a readable safetensors file")
    (folder.path / "model.safetensors").unlink()
    folder.refused("neither model.safetensors nor pytorch_model.bin")
    (folder.path / "config.json").write_text("{")
    folder.refused("not valid JSON")


def test_a_foreign_pickle_is_not_executed(folder: Folder) -> None:
    (folder.path / "model.safetensors").unlink()
    torch.save({"fc.weight": print}, folder.path / "pytorch_model.bin")
    folder.refused("cannot be read with weights_only")


def test_tensors_nobody_knows(folder: Folder) -> None:
    folder.set(**{"midlayer.self_attn.sinks": torch.ones(4), "medusa.weight": torch.ones(4)})
    folder.refused("2 unknown tensors: medusa.weight, midlayer.self_attn.sinks")


def test_missing_tensors_are_listed(folder: Folder) -> None:
    folder.drop("midlayer.self_attn.v_proj.weight", "norm.weight")
    folder.refused("2 missing tensors: layers.0.self_attn.v_proj.weight, norm.weight")


def test_a_file_of_unknown_tensors(folder: Folder) -> None:
    folder.tensors(lambda held: [held.pop(name) for name in list(held)]).set(weight=torch.ones(2))
    folder.refused("no draft head we know.* start with weight")


def test_two_names_for_one_tensor(folder: Folder) -> None:
    folder.set(**{"layers.0.hidden_norm.weight": torch.ones(H)}).refused("both mean layers.0.hidden_norm.weight")


# sizes


def test_tensors_win_over_a_wrong_config(folder: Folder) -> None:
    file = folder.config(num_hidden_layers=40, num_key_value_heads=8, intermediate_size=9, hidden_size=1).read()
    assert (file.record.num_layers, file.record.num_kv_heads) == (1, 2)
    assert (file.record.intermediate_size, file.record.hidden_size) == (24, H)
    assert any("num_layers: config says 40, the tensors say 1" in text for text in file.warnings)


def test_head_dim_comes_from_q_norm_config_or_the_quotient(tmp_path: Path, target: Decoder, folder: Folder) -> None:
    assert choice(folder.config(head_dim=...).read(), "head_dim") == "8 from hidden_size / config num_attention_heads"
    assert folder.read(head_dim="16").record.num_heads == 2
    normed = Folder(tmp_path / "normed", target, replace(RECORD, qk_norm=True)).config(head_dim=16)
    assert choice(normed.read(), "head_dim") == "8 from tensor q_norm"


def test_missing_rope_is_10000_whatever_the_target_has(folder: Folder) -> None:
    file = folder.config(rope_theta=..., rope_scaling=...).read()
    assert file.record.rope.theta == 10000.0
    assert choice(file, "rope.theta") == "ambiguous 10000 from default 10000, no rope_theta in config"
    assert next(c for c in file.choices if c.field == "rope.theta").alternatives == ("500000",)


def test_rope_of_transformers_5(folder: Folder) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 7e4, "factor": 4.0, "original_max_position_embeddings": 64}
    record = folder.config(rope_theta=..., rope_scaling=..., rope_parameters=rope).read().record
    assert (record.rope.kind, record.rope.theta, record.rope.scaling["factor"]) == ("yarn", 7e4, 4.0)


def test_speculators_keys_left_out_mean_the_class_defaults(tmp_path: Path, target: Decoder) -> None:
    made = Folder(tmp_path, target, layout="speculators")
    inner = json.loads((tmp_path / "config.json").read_text())["transformer_layer_config"]
    for key in ("rms_norm_eps", "rope_theta", "num_attention_heads", "hidden_size"):
        inner.pop(key)
    file = made.config(transformer_layer_config=inner).read()
    assert (file.record.norm_eps, file.record.rope.theta) == (1e-6, 10000.0)


def test_a_config_for_vllm_nests_the_sizes(tmp_path: Path, target: Decoder) -> None:
    record = replace(EAGLE, rope=RopeConfig(5e5))
    assert Folder(tmp_path, target, record, "eagle-vllm").read().record.rope.theta == 5e5


# switches


def test_defaults_of_a_plain_head_and_what_stays_open(folder: Folder) -> None:
    file = folder.read()
    assert choice(file, "norm_before_residual").startswith("ambiguous false")
    assert choice(file, "norm_output") == "false from default, no norm_output in config"
    open_fields = {c.field for c in file.choices if c.ambiguous}
    assert open_fields == {"norm_before_residual"}


def test_norm_output_of_specforge_is_ambiguous_without_fc_norm(folder: Folder) -> None:
    file = folder.config(norm_output=True).read()
    assert file.record.norm_output and choice(file, "norm_output").startswith("ambiguous true")


def test_flags_may_stand_in_eagle_config(folder: Folder) -> None:
    record = folder.config(eagle_config={"norm_before_residual": True, "norm_output": True}).read().record
    assert record.norm_before_residual and record.norm_output


def test_a_flag_without_its_tensor_makes_the_tensor_missing(folder: Folder) -> None:
    folder.config(norm_before_fc=True).refused("1 missing tensors: input_norm.weight")
    folder.config(norm_before_fc=..., use_aux_norm=True).refused("3 missing tensors: fc_norm.0.weight")


def test_a_tensor_against_its_flag_is_used_and_reported(folder: Folder) -> None:
    file = folder.config(use_last_layernorm=False).read()
    assert file.record.final_norm
    assert choice(file, "final_norm") == "ambiguous true from tensor norm.weight, although the config says false"
    dropped = folder.read(final_norm="false")
    assert not dropped.record.final_norm and "norm.weight" in dropped.unused


def test_both_norms_before_fc_exclude_each_other(folder: Folder) -> None:
    norms = {f"fc_norm.{i}.weight": torch.ones(H) for i in range(3)}
    folder.set(**norms, **{"input_norm.weight": torch.ones(3 * H)}).refused("exclude each other")


def test_layernorms_of_eagle_1_recycle_the_normed_output(tmp_path: Path, target: Decoder) -> None:
    norms = {"embedding_norm": True, "fused_norm": True, "head_norm": True, "norm_output": True}
    made = Folder(tmp_path, target, replace(EAGLE, **norms), "eagle-speculators").config(norm_output=...)  # type: ignore[arg-type]
    file = made.read()
    assert file.record.norm_output and choice(file, "norm_output").startswith("ambiguous true from vLLM")


def test_layers_of_two_widths(tmp_path: Path, target: Decoder) -> None:
    plain = Folder(tmp_path / "plain", target, replace(RECORD, num_layers=2)).read().record
    wide = Folder(tmp_path / "wide", target, replace(RECORD, num_layers=2, wide_layers=True)).read().record
    assert (plain.wide_layers, wide.wide_layers) == (False, True)


# taps


@pytest.mark.parametrize(
    ("config", "layers", "boundaries", "ambiguous"),
    [
        ({}, 32, (2, 16, 29), True),
        ({}, 36, (2, 18, 33), True),
        ({"eagle_config": {IDS: []}}, 36, (2, 18, 33), True),  # ModelOpt: an empty list is the default
        ({IDS: [2, 16, 29]}, 32, (2, 16, 29), False),
        ({IDS: [1, 23, 44]}, 48, (1, 23, 44), False),
        ({IDS: [2, 16, 29], "eagle_config": {IDS: [1, 15, 28]}}, 32, (2, 16, 29), False),
        ({"eagle_config": {IDS: [1, 29, 57]}}, 61, (2, 30, 58), True),  # SpecForge, DeepSeek-V3
        ({"eagle_config": {IDS: [1, 17, 32]}}, 36, (2, 18, 33), True),  # ModelOpt, gpt-oss
        ({"eagle_config": {IDS: [24, 30, 36]}}, 36, (24, 30, 36), True),  # reaches n
        ({"eagle_config": {IDS: [2, 30, 57]}}, 60, (2, 30, 57), True),  # starts with 2
        ({"target_layer_ids": [1, 9, 17, 25, 33]}, 36, (2, 10, 18, 26, 34), False),  # DeepSpec
        ({"target_layer_ids": [-1, 9, 33]}, 36, (0, 10, 34), False),  # -1 is the embedding output
    ],
)
def test_which_convention_layer_ids_follow(
    config: dict[str, Any], layers: int, boundaries: tuple[int, ...], ambiguous: bool
) -> None:
    taps = read_taps(config, layers)
    assert taps is not None
    assert (taps.boundaries, taps.ambiguous) == (boundaries, ambiguous)


def test_default_taps_wait_for_the_target(folder: Folder) -> None:
    folder.config(**{IDS: ...})
    assert folder.read().record.boundaries == (2, 6, 9)
    assert choice(folder.read(None), "boundaries").startswith("ambiguous none from default (2, n//2, n-3), open")
    assert folder.config(num_target_layers=20).read(None).record.boundaries == (2, 10, 17)


def test_taps_offer_their_neighbours_and_the_default(folder: Folder) -> None:
    file = folder.config(**{IDS: [3, 6, 12]}).read()
    assert next(c for c in file.choices if c.field == "boundaries").alternatives == ("2,5,11", "2,6,9")


def test_a_small_target_needs_ids(folder: Folder) -> None:
    folder.config(**{IDS: ...})
    with pytest.raises(CheckpointError, match="boundary -1 does not exist in a target of 2 layers"):
        folder.read(FACTS._replace(num_layers=2))
    assert folder.read(FACTS._replace(num_layers=2), boundaries="0,1,2").record.boundaries == (0, 1, 2)


# vocabularies


def test_d2t_holds_offsets() -> None:
    assert torch.equal(read_target_ids(offsets(DRAFTS), mask(DRAFTS, V), len(DRAFTS), V), DRAFTS)


def test_d2t_in_any_order_with_negative_offsets() -> None:
    shuffled = DRAFTS.flip(0)
    assert (offsets(shuffled) < 0).any()
    assert torch.equal(read_target_ids(offsets(shuffled), mask(DRAFTS, V), len(DRAFTS), V), shuffled)


@pytest.mark.parametrize(
    ("d2t", "t2d", "text"),
    [
        (DRAFTS + 45, None, "holds absolute target ids; it must hold offsets .* Subtract arange"),
        (DRAFTS, mask(DRAFTS, V), "holds absolute target ids"),
        (offsets(DRAFTS) + 1, mask(DRAFTS, V), "d2t is not a list of offsets|d2t and t2d disagree"),
        (offsets(DRAFTS.clamp(max=46)), mask(DRAFTS, V), "d2t and t2d disagree: .* 7 are the same"),
        (offsets(DRAFTS.clamp(max=40)), None, "not a list of offsets: .* unique ids below 48"),
        (offsets(DRAFTS)[:-1], None, "d2t has 7 entries but lm_head has 8 rows"),
        (offsets(DRAFTS).float(), None, "must be a list of integers"),
        (offsets(DRAFTS), mask(DRAFTS, V)[:, None], "t2d must be a list"),
    ],
)
def test_wrong_draft_vocabularies(d2t: Tensor, t2d: Tensor | None, text: str) -> None:
    vocab = V if int(d2t.max()) < V else 96
    with pytest.raises(CheckpointError, match=text):
        read_target_ids(d2t, t2d, len(DRAFTS), vocab)


def test_absolute_ids_in_a_file(folder: Folder) -> None:
    folder.set(d2t=DRAFTS).drop("t2d").refused("absolute target ids")


def test_a_small_lm_head_needs_d2t(folder: Folder) -> None:
    folder.drop("d2t", "t2d").refused("tensor d2t is missing: lm_head has 8 rows for a vocabulary of 48 tokens")


def test_a_draft_vocabulary_needs_an_lm_head(folder: Folder) -> None:
    folder.drop("lm_head.weight").refused("lm_head.weight is missing, and draft_vocab_size 8 needs")
    folder.config(draft_vocab_size=...).refused("lm_head.weight is missing, and d2t needs")


def test_lm_head_in_the_file_wins_over_tie_word_embeddings(folder: Folder) -> None:
    record = folder.config(tie_word_embeddings=True).read().record
    assert record.own_lm_head and not record.lm_head_is_embed


def test_an_embedding_in_the_file_is_used_only_when_declared_or_needed(folder: Folder) -> None:
    file = folder.set(**{"embed_tokens.weight": torch.ones(V, H)}).read()
    assert not file.record.own_embed and "embed_tokens.weight" in file.unused
    assert choice(file, "own_embed").startswith("ambiguous false")
    assert folder.read(own_embed="true").record.own_embed
    assert folder.config(embed_requires_grad=True).read().record.own_embed


def test_heads_for_another_target(folder: Folder, eagle: Folder) -> None:
    def refused(made: Folder, facts: TargetFacts, text: str) -> None:
        with pytest.raises(CheckpointError, match=text):
            made.read(facts)

    refused(folder, FACTS._replace(vocab_size=64), "vocabulary of 48 tokens .* the target has 64; .* another target")
    refused(folder, FACTS._replace(hidden_size=40), "fc reads hidden states of 96 values, the target's have 40")
    refused(folder, FACTS._replace(hidden_size=16), "made for another target")
    refused(folder, FACTS._replace(hidden_size=96), "made for another target")
    refused(eagle, FACTS._replace(hidden_size=16), "fc reads hidden states of 32 values, the target's have 16")
    refused(eagle, FACTS._replace(vocab_size=64), "made for another target")
    refused(folder, FACTS._replace(num_layers=6), "boundary 9 does not exist in a target of 6 layers")


# overrides


def test_overrides_of_a_configuration_file_are_values() -> None:
    given = {
        "norm_output": True,
        "boundaries": [2, 4, 6],
        "modules": 2,
        "rope.theta": 1234567.5,
        "rope.scaling": {"factor": 2},
    }
    parsed = parse_overrides(given)
    assert parsed.fields == {"norm_output": True, "boundaries": (2, 4, 6), "modules": 2}
    assert parsed.rope == {"theta": 1234567.5, "scaling": {"factor": 2}}
    with pytest.raises(ConfigError, match="modules=true: expected an integer"):
        parse_overrides({"modules": True})


def test_overrides_are_typed() -> None:
    parsed = parse_overrides(
        {
            "norm_before_residual": "true",
            "boundaries": "2, 4,6",
            "rope.theta": "10000",
            "rope.scaling": '{"factor": 2}',
            "norm_eps": "1e-5",
            "head_dim": "16",
        }
    )
    assert parsed.fields == {"norm_before_residual": True, "boundaries": (2, 4, 6), "norm_eps": 1e-5, "head_dim": 16}
    assert parsed.rope == {"theta": 10000.0, "scaling": {"factor": 2}}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("norm_befor_residual", "true", "no field 'norm_befor_residual'; known fields are .*norm_before_residual"),
        ("kind", "eagle", "no field 'kind'"),
        ("rope.base", "1", "no field 'rope.base'; .*rope.theta"),
        ("fc_norm", "maybe", "fc_norm=maybe: expected true or false"),
        ("boundaries", "a,b", "expected integers like"),
        ("rope.theta", "big", "expected a number"),
        ("rope.kind", "su", "expected one of default, linear"),
        ("rope.scaling", "[1]", "expected a JSON object"),
    ],
)
def test_wrong_overrides(folder: Folder, name: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_head(folder.path, FACTS, {name: text})


def test_overrides_replace_fields_and_say_so(folder: Folder) -> None:
    file = folder.read(norm_before_residual="true", boundaries="1,2,3", rope__theta="123")
    assert (file.record.norm_before_residual, file.record.boundaries) == (True, (1, 2, 3))
    assert file.record.rope.theta == 123.0
    assert choice(file, "norm_before_residual") == "true from override, the file says false"
    assert not any(c.ambiguous for c in file.choices)


def test_overrides_cannot_invent_tensors(folder: Folder) -> None:
    folder.refused("missing tensors: .*k_norm.weight", qk_norm="true")
    folder.refused("fc reads 3 hidden states but 4 boundaries", boundaries="1,2,3,4")
    folder.refused("drafts over the target's whole vocabulary", own_lm_head="false")


# loading


def test_the_record_is_logged_with_its_sources(
    folder: Folder, target: Decoder, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="speculator.heads"):
        load_head(folder.path, target, torch.float32, overrides={"norm_output": "true"})
    assert "boundaries = 2,6,9  [config eagle_aux_hidden_state_layer_ids, read as boundaries]" in caplog.text
    assert "norm_before_residual = false  [exporters' default" in caplog.text
    assert "AMBIGUOUS, could be true" in caplog.text
    assert "norm_output = true  [override, the file says false]" in caplog.text


def test_another_verifier_is_a_warning(tmp_path: Path, target: Decoder, caplog: pytest.LogCaptureFixture) -> None:
    made = Folder(tmp_path, target, layout="speculators")
    verifier = {"verifier": {"name_or_path": "org/Some-Model-8B"}}
    made.config(speculators_config=verifier)
    load_head(tmp_path, target, torch.float32, target_name="models/some-model-8b")
    assert not caplog.records
    load_head(tmp_path, target, torch.float32, target_name="other")
    assert "names org/Some-Model-8B as its verifier, the target is other" in caplog.text


def test_broken_weights(folder: Folder, target: Decoder) -> None:
    def load() -> None:
        load_head(folder.path, target, torch.float32)

    folder.set(**{"norm.weight": torch.full((H,), float("nan"))})
    with pytest.raises(CheckpointError, match="norm.weight holds NaN or infinite"):
        load()
    folder.set(**{"norm.weight": torch.ones(H + 1)})
    with pytest.raises(CheckpointError, match=r"norm.weight has shape \[33\], expected \[32\]"):
        load()


def test_weights_that_overflow_in_half_precision(folder: Folder) -> None:
    folder.set(**{"norm.weight": torch.full((H,), 1e6)})
    with pytest.raises(CheckpointError, match="infinite values in torch.float16"):
        load_head(folder.path, tiny_target().to(torch.float16), torch.float16)


def test_the_head_shares_the_targets_dtype(folder: Folder, target: Decoder) -> None:
    with pytest.raises(ConfigError, match="must run in the target's dtype torch.float32"):
        load_head(folder.path, target, torch.bfloat16)


def test_progress_counts_tensors(folder: Folder, target: Decoder) -> None:
    seen: list[tuple[int, int]] = []
    load_head(folder.path, target, torch.float32, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i + 1, 13) for i in range(13)]
