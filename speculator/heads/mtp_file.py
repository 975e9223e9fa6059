"""Reads the MTP modules inside a target's folder into a head's record.

Owns: what is chosen where engines disagree, and the strictness about the modules' tensors. Must never know devices or
modules.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from speculator.errors import CheckpointError
from speculator.heads.detect import mtp_like
from speculator.heads.mtp import mtp_record
from speculator.heads.mtp_names import LAYOUTS, Modules, MtpLayout, find_modules, mtp_slots
from speculator.heads.overrides import Choice, Overrides
from speculator.heads.reading import HeadFile, TargetFacts, note_overrides
from speculator.heads.record import HeadRecord
from target.config import ModelConfig, load_config, read_json
from target.config_hybrid import text_config
from target.weights import WeightFiles, check_names

_CLAIMS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")
_EMBED, _LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"


def read_mtp(folder: Path, target: TargetFacts | None, overrides: Overrides) -> HeadFile:
    """The head that a target's folder carries; errors as those of `read_head`."""
    config = load_config(folder)
    files = WeightFiles(folder, config.fp8_block)
    found = find_modules(files.names(), config)
    if found is None:
        raise CheckpointError(_why_none(files.names()))
    _check_target(config, target)
    raw = text_config(read_json(folder / "config.json"), "config.json")
    _check_layers(found, raw)
    return _Reading(folder, config, raw, files, found).file(overrides)


def _why_none(names: Collection[str]) -> str:
    if foreign := mtp_like(names):
        known = " and ".join(f"{_own_name(layout)} ({layout.family})" for layout in LAYOUTS)
        return f"MTP modules named {', '.join(foreign[:3])} are not run; those named {known} are"
    return "this folder holds a whole model, not a draft head; give it as the target (it has no MTP modules)"


def _own_name(layout: MtpLayout) -> str:
    return f"{layout.outer or f'{layout.prefix}N.'}{next(iter(layout.own))}"


def _check_layers(found: Modules, raw: Mapping[str, Any]) -> None:
    """What nobody has published in a layout of one module."""
    if found.layout.outer and found.number > 1:
        text = f"{found.number} MTP layers behind one projection are not run, only one"
        raise CheckpointError(f"{text}; published models of {found.layout.family} have one")
    if raw.get("mtp_use_dedicated_embeddings"):
        raise CheckpointError("mtp_use_dedicated_embeddings true is not supported: modules read the target's embedding")


def _check_target(config: ModelConfig, target: TargetFacts | None) -> None:
    ours = (config.num_layers, config.hidden_size, config.vocab_size)
    if target is None or ours == (target.num_layers, target.hidden_size, target.vocab_size):
        return
    raise CheckpointError(
        f"these MTP modules belong to a target of {ours[0]} layers, {ours[1]} wide, with {ours[2]} tokens; "
        f"the given one has {target.num_layers} layers, is {target.hidden_size} wide, with {target.vocab_size} tokens"
    )


class _Reading:
    """One reading of one folder."""

    def __init__(
        self, folder: Path, config: ModelConfig, raw: Mapping[str, Any], files: WeightFiles, found: Modules
    ) -> None:
        self.folder, self.config, self.raw, self.files, self.found = folder, config, raw, files, found
        self.choices: dict[str, Choice] = {}
        self.warnings: list[str] = []

    def file(self, overrides: Overrides) -> HeadFile:
        read = mtp_record(self.config, **self._choose())
        record = overrides.apply(read)
        note_overrides(self.choices, overrides, read, record)
        slots = mtp_slots(self.found, self.config, record)
        spare = self._spare(record, read) - set(slots)
        check_names(set(self.found.names) - spare, set(slots), self.folder)
        return HeadFile(
            folder=self.folder,
            record=record,
            slots=slots,
            tensors=_Tensors(self.files, slots),
            target_ids=None,
            choices=tuple(self.choices.values()),
            unused=tuple(sorted(spare & self.found.names)),
            warnings=tuple(self.warnings),
        )

    def _spare(self, record: HeadRecord, read: HeadRecord) -> set[str]:
        """Known names that may lie in the folder without a use: copies of the target's tables, modules left out."""
        layout, config = self.found.layout, self.config
        prefixes = [layout.at(module, config) for module in range(self.found.number)]
        tables = {f"{prefix}{name}" for prefix in prefixes for name in layout.tables}
        dropped = tuple(prefixes[record.modules :]) if record != read else ()
        return tables | {name for name in self.found.names if dropped and name.startswith(dropped)}

    def _choose(self) -> dict[str, Any]:
        layers, family = str(self.config.num_layers), self.found.layout.family
        glm = self.config.architecture.startswith("Glm")  # vLLM recycles GLM-4.5's output without the norm
        recycled = "what the head reads is recycled" + (", though vLLM takes the output before its norm" if glm else "")
        return {
            "modules": self._modules(),
            "hidden_first": self._pick("hidden_first", self.found.layout.hidden_first, f"as in {family}"),
            "boundaries": self._pick("boundaries", (), "MTP reads the final state F", (layers,)),
            "norm_output": self._pick("norm_output", True, recycled, ("false",), glm),
            "zero_first": self._pick("zero_first", False, "as trained; vLLM zeroes row 0", ("true",)),
            "own_embed": self._own("own_embed", "embed.weight", _EMBED),
            "own_lm_head": self._own("own_lm_head", "lm_head.weight", _EMBED if self.config.tied else _LM_HEAD),
        }

    def _pick(
        self, field: str, value: Any, source: str, alternatives: tuple[str, ...] = (), ambiguous: bool = False
    ) -> Any:
        self.choices[field] = Choice(field, value, source, alternatives, ambiguous)
        return value

    def _modules(self) -> int:
        """By name: repacked folders often keep the claim without the tensors, or the tensors without the claim."""
        count, raw = self.found.number, self.raw
        for key in (key for key in _CLAIMS if raw.get(key) not in (None, count)):
            self.warnings.append(f"modules: config {key} says {raw[key]}, the tensors say {count}; using the tensors")
        return int(self._pick("modules", count, "tensor names", ("1",) if count > 1 else ()))

    def _own(self, field: str, parameter: str, ours: str) -> bool:
        """Whether the modules' table is more than a copy of the target's."""
        name = next((name for name, place in self.found.layout.tables.items() if place == parameter), None)
        prefixes = (self.found.layout.at(module, self.config) for module in range(self.found.number))
        copies = [f"{prefix}{name}" for prefix in prefixes if f"{prefix}{name}" in self.found.names]
        if not copies:
            return bool(self._pick(field, False, "no tensor: the target's"))
        if self._equal(copies, ours):
            return bool(self._pick(field, False, f"{name} is a copy of the target's"))
        return bool(self._pick(field, True, f"{name} differs from the target's", ("false",)))

    def _equal(self, copies: Collection[str], ours: str) -> bool:
        if ours not in self.files.names():
            return False
        table = self.files.read(ours)
        return all(torch.equal(self.files.read(copy), table) for copy in copies)


class _Tensors(Mapping[str, Tensor]):
    """Tensors that are read, and dequantised, each time they are asked for: a module can hold hundreds of experts."""

    def __init__(self, files: WeightFiles, names: Collection[str]) -> None:
        self._files, self._names = files, names

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._files.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
