"""Builds a target from a Hugging Face folder.

Owns: the order of reading, checking and filling. Must never know drafting.
"""

from __future__ import annotations

from pathlib import Path

import torch

from target.config import ModelConfig, load_config
from target.decoder import Decoder
from target.errors import CheckpointError
from target.experts import EXPERTS, ExpertDecoder, ExpertFiles, check_experts, own_slots
from target.layers import lay_out_for_cpu
from target.names import TEXT_PREFIX, decoder_slots, mtp_names, vision_names
from target.parallel import ALONE, Axis, ParallelDecoder, shard_config
from target.pipeline import WHOLE, Stage, check_stages, cut_to_stage, stage_slots
from target.shards import ShardFiles
from target.weights import Progress, WeightFiles, check_names, fill


def load_target(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    axis: Axis = ALONE,
    stage: Stage = WHOLE,
    embeds: bool = False,
) -> Decoder:
    """Load a target; CheckpointError names every missing, unknown or misshapen tensor.

    The tensors of MTP modules in the folder are left to the head that reads them; those of a vision model to nobody.
    With an `axis` of several ranks only this rank's shard is read, or on the axis of experts its share of them; with a
    `stage` of several only its layers (and the embedding where it `embeds`); PlanError when the target cannot be
    divided so.
    """
    whole = load_config(folder)
    check_stages(whole, stage.size)
    config = _held(whole, axis)
    files = _files(folder, whole, axis)
    found = files.names()
    slots = decoder_slots(config, found)
    found -= mtp_names(config, found) | vision_names(config, found)
    found -= {name for name in found if name.endswith("rotary_emb.inv_freq")}
    if config.tied and "lm_head.weight" in found:
        _check_tied(files, folder)
        found.discard("lm_head.weight")
    check_names(found, set(slots), folder)
    if axis.name == EXPERTS:
        slots = own_slots(slots, whole, axis)
    with torch.device("meta"):
        model = _decoder(whole, axis)
        if stage.size > 1:
            cut_to_stage(model, stage, embeds or (whole.tied and stage.last))
            slots = stage_slots(slots, model)
    model = model.to(dtype).to_empty(device=device)
    fill(model, slots, files.items(slots), folder, progress)
    lay_out_for_cpu(model)
    return model.requires_grad_(False).eval()


def _held(whole: ModelConfig, axis: Axis) -> ModelConfig:
    """The config whose tensors a rank holds; PlanError where the ranks cannot divide the target."""
    if axis.name != EXPERTS:
        return shard_config(whole, axis.size)
    check_experts(whole, axis.size)
    return whole


def _files(folder: Path, whole: ModelConfig, axis: Axis) -> WeightFiles:
    if axis.size == 1:
        return WeightFiles(folder, whole.fp8_block)
    return (ExpertFiles if axis.name == EXPERTS else ShardFiles)(folder, whole, axis)


def _decoder(whole: ModelConfig, axis: Axis) -> Decoder:
    if axis.size == 1:
        return Decoder(whole)
    return (ExpertDecoder if axis.name == EXPERTS else ParallelDecoder)(whole, axis)


def _check_tied(files: WeightFiles, folder: Path) -> None:
    text = f"{TEXT_PREFIX}embed_tokens.weight"
    embedding = text if text in files.names() else "model.embed_tokens.weight"
    if not torch.equal(files.read("lm_head.weight"), files.read(embedding)):
        raise CheckpointError(f"{folder}: tie_word_embeddings is true but lm_head.weight differs from the embedding")
