"""Which family of draft heads a folder holds, decided by tensors first and config keys second.

Owns: the order of detection and the refusal of families that are not run. Must never know sizes or values.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from speculator.errors import CheckpointError

Shapes = Mapping[str, Sequence[int]]  # common tensor name -> shape

_SPECULATORS = {
    "peagle": "P-EAGLE",
    "dflash": "DFlash",
    "dflash2": "DFlash2",
    "dspark": "DSpark",
    "xpress": "XPress",
    "mtp": "MTP",
}
_ARCHITECTURES = {
    "DFlashDraftModel": "DFlash",
    "DFlash2DraftModel": "DFlash2",
    "DSparkDraftModel": "DSpark",
    "Qwen3DSparkModel": "DSpark",
    "Gemma4DSparkModel": "DSpark",
    "DominoDraftModel": "Domino",
    "PEagleDraftModel": "P-EAGLE",
    "Gemma4Eagle3Model": "EAGLE-3 on Gemma layers",
}
_MTP = re.compile(r"(^|\.)(mtp[._]|mtp_layers\.|mtp_block\.|enorm\.|eh_proj\.)")
_LAYER0_Q = "layers.0.self_attn.q_proj.weight"


def detect(config: Mapping[str, Any], published: Collection[str], shapes: Shapes) -> str:
    """ "eagle" or "eagle3"; CheckpointError names the family of a head that is not run, or says what the folder is."""
    refused = _foreign_family(config, shapes)
    if refused is None and mtp_like(published):
        raise CheckpointError(
            "this is a head of the MTP family, which is run from inside its target's folder only; give that folder"
        )
    if refused is not None:
        raise CheckpointError(f"this is a head of the {refused} family, which is not run yet; EAGLE-1, 2 and 3 are")
    if _is_mla(shapes):
        raise CheckpointError("this is an EAGLE head with MLA attention (q_a_proj, kv_a_proj), which is not run yet")
    _refuse_switches(config)
    return _eagle_kind(config, published, shapes)


def mtp_like(published: Collection[str]) -> list[str]:
    """Names that MTP modules of any family have, in order."""
    return sorted(name for name in published if _MTP.search(name))


def _foreign_family(config: Mapping[str, Any], shapes: Shapes) -> str | None:
    speculators = config.get("speculators_model_type")
    if speculators is not None:
        return _speculators_family(str(speculators))
    named = next((_ARCHITECTURES[a] for a in _architectures(config) if a in _ARCHITECTURES), None)
    return named or _family_by_tensors(config, shapes)


def _architectures(config: Mapping[str, Any]) -> Sequence[str]:
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"config.json: architectures must be a list of names, got {names!r}")
    return names


def _speculators_family(kind: str) -> str | None:
    if kind in ("eagle", "eagle3"):
        return None
    if kind in _SPECULATORS:
        return _SPECULATORS[kind]
    known = ", ".join(("eagle", "eagle3", *_SPECULATORS))
    raise CheckpointError(f"speculators_model_type {kind!r} is unknown; known are {known}")


def _family_by_tensors(config: Mapping[str, Any], shapes: Shapes) -> str | None:
    for prefix, family in (("markov_head.", "DSpark"), ("prefix_gru.", "Domino"), ("mask_hidden", "P-EAGLE")):
        if any(name.startswith(prefix) for name in shapes):
            return family
    # the norm of the fused feature stands outside the layers in the block drafters only
    return "DFlash" if config.get("dflash_config") or "hidden_norm.weight" in shapes else None


def _is_mla(shapes: Shapes) -> bool:
    return any(".self_attn.q_a_proj." in name or ".self_attn.kv_a_proj" in name for name in shapes)


def _refuse_switches(config: Mapping[str, Any]) -> None:
    """Switches of ModelOpt and quantisers that change the forward in ways that are not run."""
    nested = config.get("eagle_config") or {}
    if nested.get("parallel_draft_step") not in (None, 1):
        raise CheckpointError("this EAGLE-3 head drafts in parallel (parallel_draft_step > 1), which is not run yet")
    if nested.get("use_mtp_layernorm"):
        raise CheckpointError("this head uses use_mtp_layernorm (ModelOpt's MTP variant), which is not run yet")
    if config.get("quantization_config"):
        raise CheckpointError("this head is quantised (quantization_config), which is not run yet; use bf16 weights")
    if str(config.get("hidden_act") or "silu") != "silu":
        raise CheckpointError(f"hidden_act {config['hidden_act']!r} is not supported, only silu")


def _eagle_kind(config: Mapping[str, Any], published: Collection[str], shapes: Shapes) -> str:
    if _LAYER0_Q in shapes and "layers.0.self_attn.o_proj.weight" in shapes:
        width, hidden = shapes[_LAYER0_Q][1], shapes["layers.0.self_attn.o_proj.weight"][0]
        if "layers.0.hidden_norm.weight" in shapes or width == 2 * hidden:
            return "eagle3"
        if "fc.weight" in shapes and width == hidden:
            return "eagle"
    if config.get("speculators_model_type"):
        return str(config["speculators_model_type"])  # incomplete; the strict reader names what is missing
    if is_whole_model(published):
        raise CheckpointError("this folder holds a whole model, not a draft head; give it as the target")
    some = ", ".join(sorted(published)[:6])
    raise CheckpointError(f"this is no draft head we know; EAGLE-1, 2 and 3 are. Its tensors start with {some}")


def is_whole_model(published: Collection[str]) -> bool:
    """A target: embedding, a normed first layer, and nothing that fuses features."""
    names = {name.removeprefix("model.").removeprefix("language_model.") for name in published}
    fuses = any(name.startswith(("fc.", "fusion_fc.", "midlayer.")) or "hidden_norm" in name for name in names)
    return not fuses and {"embed_tokens.weight", "layers.0.input_layernorm.weight"} <= names
