"""Reads and writes Hugging Face weight files, strictly both ways.

Owns: file formats, the map of published names to our merged parameters, and the errors. Must never know drafting.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from target.config import ModelConfig, load_config, read_json
from target.errors import CheckpointError
from target.layers import lay_out_for_cpu
from target.llama import Llama

Progress = Callable[[int, int], None]  # tensors done, tensors in all


class Slot(NamedTuple):
    """Where a published tensor goes: rows start..stop of one of our parameters (all of it when `rows` is None)."""

    parameter: str
    rows: range | None = None


def llama_slots(config: ModelConfig) -> dict[str, Slot]:
    """Published name -> place, for every tensor a checkpoint of this config must hold."""
    slots = {"model.embed_tokens.weight": Slot("embed.weight"), "model.norm.weight": Slot("norm.weight")}
    if not config.tied:
        slots["lm_head.weight"] = Slot("lm_head.weight")
    for i in range(config.num_layers):
        theirs, ours = f"model.layers.{i}.", f"layers.{i}."
        slots[f"{theirs}input_layernorm.weight"] = Slot(f"{ours}input_norm.weight")
        slots[f"{theirs}post_attention_layernorm.weight"] = Slot(f"{ours}post_norm.weight")
        heads = (config.num_heads, config.num_kv_heads, config.head_dim)
        slots |= attention_slots(
            f"{theirs}self_attn.", f"{ours}attention.", *heads, config.qkv_bias, config.o_bias, config.qk_norm
        )
        slots |= mlp_slots(f"{theirs}mlp.", f"{ours}mlp.", config.intermediate_size, config.mlp_bias)
    return slots


def attention_slots(
    theirs: str, ours: str, heads: int, kv_heads: int, dim: int, qkv_bias: bool, o_bias: bool, qk_norm: bool
) -> dict[str, Slot]:
    """q, k, v stacked into `qkv`; o and norms as they are. Prefixes end with a dot."""
    q, kv = heads * dim, kv_heads * dim
    parts = {"q_proj": range(q), "k_proj": range(q, q + kv), "v_proj": range(q + kv, q + 2 * kv)}
    kinds = ("weight", "bias") if qkv_bias else ("weight",)
    slots = {f"{theirs}{p}.{kind}": Slot(f"{ours}qkv.{kind}", rows) for p, rows in parts.items() for kind in kinds}
    for kind in ("weight", "bias") if o_bias else ("weight",):
        slots[f"{theirs}o_proj.{kind}"] = Slot(f"{ours}o.{kind}")
    for norm in ("q_norm", "k_norm") if qk_norm else ():
        slots[f"{theirs}{norm}.weight"] = Slot(f"{ours}{norm}.weight")
    return slots


def mlp_slots(theirs: str, ours: str, inner: int, bias: bool) -> dict[str, Slot]:
    """gate and up stacked into `gate_up`. Prefixes end with a dot."""
    slots: dict[str, Slot] = {}
    for kind in ("weight", "bias") if bias else ("weight",):
        slots[f"{theirs}gate_proj.{kind}"] = Slot(f"{ours}gate_up.{kind}", range(inner))
        slots[f"{theirs}up_proj.{kind}"] = Slot(f"{ours}gate_up.{kind}", range(inner, 2 * inner))
        slots[f"{theirs}down_proj.{kind}"] = Slot(f"{ours}down.{kind}")
    return slots


class WeightFiles:
    """The tensors of a folder by published name: safetensors (sharded by index or not), else pytorch_model.bin."""

    def __init__(self, folder: Path) -> None:
        self._place = _locate(folder)

    def names(self) -> set[str]:
        return set(self._place)

    def items(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Tensors on the CPU, file by file."""
        wanted = self.names() if names is None else set(names)
        for path in sorted(set(self._place.values())):
            yield from _read_tensors(path, sorted(name for name in wanted if self._place[name] == path))

    def read(self, name: str) -> Tensor:
        return next(_read_tensors(self._place[name], [name]))[1]


def _locate(folder: Path) -> dict[str, Path]:
    """Tensor name -> file."""
    for stem in ("model.safetensors", "pytorch_model.bin"):
        if (folder / stem).exists():
            return {name: folder / stem for name in _tensor_names(folder / stem)}
        index = folder / f"{stem}.index.json"
        if index.exists():
            return _indexed(folder, index)
    raise CheckpointError(f"{folder} holds neither model.safetensors nor pytorch_model.bin (nor an index of one)")


def _indexed(folder: Path, index: Path) -> dict[str, Path]:
    """The places that an index file names, after a look that each file holds just these tensors."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map")
    files = {str(file): {name for name in weight_map if weight_map[name] == file} for file in weight_map.values()}
    missing = sorted(file for file in files if not (folder / file).exists())
    if missing:
        raise CheckpointError(f"{index} names files that do not exist: {', '.join(missing)}")
    for file, names in files.items():
        check_names(set(_tensor_names(folder / file)), names, folder / file)
    return {name: folder / file for file, names in files.items() for name in names}


def _tensor_names(path: Path) -> list[str]:
    if path.suffix == ".bin":
        return list(_load_bin(path))
    with _open(path) as file:
        return list(file.keys())


def _open(path: Path) -> safe_open:
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from None


def _load_bin(path: Path) -> dict[str, Tensor]:
    """All tensors of a .bin file, still on the disk where the file's format allows; foreign pickles are not run."""
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception:  # torch raises many kinds for a foreign pickle, and advises to run it
        text = "it is no PyTorch file, or holds more than plain tensors"
        raise CheckpointError(f"{path} cannot be read with weights_only: {text}") from None
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise CheckpointError(f"{path} does not hold a dictionary of tensors")
    return loaded


def _read_tensors(path: Path, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    if path.suffix == ".bin":
        loaded = _load_bin(path)
        yield from ((name, loaded[name]) for name in names)
        return
    with _open(path) as file:
        for name in names:
            try:
                yield name, file.get_tensor(name)
            except SafetensorError as error:
                raise CheckpointError(f"{path} has no readable tensor {name}: {error}") from None


def check_names(found: set[str], expected: set[str], where: Path) -> None:
    """Strict both ways: CheckpointError lists what is missing and what is unknown."""
    problems = []
    for label, names in (("missing", sorted(expected - found)), ("unknown", sorted(found - expected))):
        if names:
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            problems.append(f"{len(names)} {label} tensors: {', '.join(names[:8])}{more}")
    if problems:
        raise CheckpointError(f"{where}: {'; '.join(problems)}")


def _cut(parameter: Tensor, slot: Slot) -> Tensor:
    return parameter if slot.rows is None else parameter[slot.rows.start : slot.rows.stop]


def fill(
    module: nn.Module,
    slots: Mapping[str, Slot],
    tensors: Iterable[tuple[str, Tensor]],
    where: Path,
    progress: Progress | None = None,
) -> None:
    """Copy published tensors into parameters; CheckpointError when a shape differs or a value is not finite."""
    parameters = dict(module.named_parameters())
    for done, (name, tensor) in enumerate(tensors, 1):
        target = _cut(parameters[slots[name].parameter].data, slots[name])
        if target.shape != tensor.shape:
            raise CheckpointError(f"{where}: {name} has shape {list(tensor.shape)}, expected {list(target.shape)}")
        if not tensor.is_floating_point():
            raise CheckpointError(f"{where}: {name} holds {tensor.dtype} values; quantised weights are not supported")
        target.copy_(tensor)
        if not bool(torch.isfinite(target).all()):
            raise CheckpointError(f"{where}: {name} holds NaN or infinite values in {target.dtype}")
        if progress:
            progress(done, len(slots))


def load_llama(
    folder: Path, dtype: torch.dtype, device: torch.device | str = "cpu", progress: Progress | None = None
) -> Llama:
    """Load a dense target; CheckpointError names every missing, unknown or misshapen tensor."""
    config = load_config(folder)
    files = WeightFiles(folder)
    slots = llama_slots(config)
    found = {name for name in files.names() if not name.endswith("rotary_emb.inv_freq")}
    if config.tied and "lm_head.weight" in found:
        _check_tied(files, folder)
        found.discard("lm_head.weight")
    check_names(found, set(slots), folder)
    with torch.device("meta"):
        model = Llama(config)
    model = model.to(dtype).to_empty(device=device)
    fill(model, slots, files.items(slots), folder, progress)
    lay_out_for_cpu(model)
    return model.requires_grad_(False).eval()


def _check_tied(files: WeightFiles, folder: Path) -> None:
    if not torch.equal(files.read("lm_head.weight"), files.read("model.embed_tokens.weight")):
        raise CheckpointError(f"{folder}: tie_word_embeddings is true but lm_head.weight differs from the embedding")


def export_tensors(module: nn.Module, slots: Mapping[str, Slot], dtype: torch.dtype) -> dict[str, Tensor]:
    """Published name -> contiguous CPU tensor, the inverse of `fill`."""
    parameters = dict(module.named_parameters())
    cuts = {name: _cut(parameters[slot.parameter].detach(), slot) for name, slot in slots.items()}
    return {name: cut.to("cpu", dtype, copy=True).contiguous() for name, cut in cuts.items()}


def save_llama(model: Llama, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write config.json and model.safetensors that transformers loads too."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = export_tensors(model, llama_slots(model.config), dtype)
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    text = json.dumps(published_config(model.config, dtype), indent=2)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def published_config(config: ModelConfig, dtype: torch.dtype) -> dict[str, object]:
    """The config.json of a Llama-style model with default rope."""
    c = config
    if c.architecture != "LlamaForCausalLM" or c.rope.kind != "default":
        raise CheckpointError(f"only plain Llama configs can be written, not {c.architecture} with rope {c.rope.kind}")
    eos = list(c.eos_token_ids) if len(c.eos_token_ids) > 1 else (c.eos_token_ids or (None,))[0]
    return {
        "architectures": [c.architecture],
        "model_type": "llama",
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope.theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope.theta},
        "max_position_embeddings": c.max_position,
        "attention_bias": c.qkv_bias,
        "mlp_bias": c.mlp_bias,
        "tie_word_embeddings": c.tied,
        "bos_token_id": c.bos_token_id,
        "eos_token_id": eos,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
    }
