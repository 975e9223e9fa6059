"""A head's folder: its config.json flattened to one level, its tensors under common names.

Owns: where exporters nest their keys and what a left-out key means. Must never know what a key decides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from speculator.errors import CheckpointError
from speculator.heads.detect import detect
from speculator.heads.names import common_names
from target.config import read_json
from target.errors import CheckpointError as TargetCheckpointError
from target.weights import WeightFiles


@contextmanager
def checkpoint_errors(folder: Path) -> Iterator[None]:
    """Errors of the file layer, and ours without a place, as CheckpointErrors that name the folder."""
    try:
        yield
    except TargetCheckpointError as error:
        raise CheckpointError(str(error)) from None
    except CheckpointError as error:
        text = error.message if str(folder) in error.message else f"{folder}: {error.message}"
        raise CheckpointError(text) from None


class HeadFolder:
    """config.json and the tensors of a folder by common name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.raw = read_json(folder / "config.json")
        self.config = flat_config(self.raw)
        loaded = dict(WeightFiles(folder).items())
        self.published = common_names(loaded)
        self.tensors = {common: loaded[name] for common, name in self.published.items()}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        self.kind = detect(self.config, loaded, self.shapes)

    def has(self, name: str) -> bool:
        return name in self.shapes

    def shape(self, name: str, dims: int = 2) -> tuple[int, ...]:
        """CheckpointError when the tensor is missing or has another number of dimensions."""
        if name not in self.shapes:
            raise CheckpointError(f"tensor {name} is missing")
        if len(self.shapes[name]) != dims:
            raise CheckpointError(f"tensor {name} has shape {list(self.shapes[name])}, expected {dims} dimensions")
        return self.shapes[name]

    def rename(self, name: str, common: str) -> None:
        """Another common name for a tensor, unless that one is taken."""
        if common not in self.shapes:
            self.published[common] = self.published.pop(name)
            self.tensors[common] = self.tensors.pop(name)
            self.shapes[common] = self.shapes.pop(name)

    def flag(self, *keys: str) -> bool | None:
        """The first of these keys that is set, at the top level or in eagle_config."""
        for key in keys:
            for place in (self.config, self.config.get("eagle_config") or {}):
                if place.get(key) is not None:
                    return bool(place[key])
        return None

    def integer(self, key: str) -> int | None:
        value = self.config.get(key)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise CheckpointError(f"config.json: {key} must be a positive integer, got {value!r}")
        return value


# what a key means when transformers left it out because it equals the class default
_LAYER_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 4096, "num_attention_heads": 32, "rms_norm_eps": 1e-6, "vocab_size": 32000},
    "qwen3": {"num_attention_heads": 32, "head_dim": 128, "rms_norm_eps": 1e-6, "vocab_size": 151936},
}


def flat_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """One level of keys: speculators and old vLLM configs nest the layer's config."""
    inner: Mapping[str, Any] = {}
    if raw.get("speculators_model_type"):
        inner = mapping(raw, "transformer_layer_config")
        kind = str(inner.get("model_type") or "llama")
        inner = {**_LAYER_DEFAULTS.get(kind, _LAYER_DEFAULTS["llama"]), **_given(inner)}
    elif isinstance(raw.get("model"), Mapping):
        inner = _given(raw["model"])
    outer = {**raw, "eagle_config": mapping(raw, "eagle_config")}
    return {**inner, **_given(outer)}


def _given(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if value is not None}


def mapping(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The object under a key, empty when there is none; CheckpointError when it is something else."""
    value = raw.get(key) or {}
    if not isinstance(value, Mapping):
        raise CheckpointError(f"config.json: {key} must be an object, got {value!r}")
    return value
