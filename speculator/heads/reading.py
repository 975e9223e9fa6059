"""Reading one head's folder: what is known of the target, what was chosen and why, and the outcome.

Owns: the facts that a head is checked against, the list of choices, the folder as understood. Must never know which
key or tensor settles which field.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from torch import Tensor

from speculator.heads.folder import HeadFolder
from speculator.heads.overrides import Choice, Overrides, show
from speculator.heads.record import HeadRecord
from target.config import ModelConfig
from target.weights import Slot

T = TypeVar("T")

ATTENTION = "layers.0.self_attn."


class TargetFacts(NamedTuple):
    """What a head's file is checked against; `name` is for the warning about a foreign verifier only."""

    hidden_size: int
    vocab_size: int
    num_layers: int
    rope_theta: float = 10000.0
    name: str = ""

    @classmethod
    def of(cls, config: ModelConfig, name: str = "") -> TargetFacts:
        return cls(config.hidden_size, config.vocab_size, config.num_layers, config.rope.theta, name)


@dataclass(frozen=True)
class HeadFile:
    """A head's folder, understood: everything that is needed to build and fill the module."""

    folder: Path
    record: HeadRecord
    slots: Mapping[str, Slot]  # published name -> our parameter
    tensors: Mapping[str, Tensor]  # published name -> tensor on the CPU, those of `slots`
    target_ids: Tensor | None  # [Vd] int64
    choices: tuple[Choice, ...]
    unused: tuple[str, ...]  # published names that are known and not needed
    warnings: tuple[str, ...]

    @property
    def parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors.values())

    @property
    def bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


def note_overrides(choices: dict[str, Choice], overrides: Overrides, read: HeadRecord, record: HeadRecord) -> None:
    """Say of each overridden field what the file says, as `read`, and what holds now, as `record`."""
    for name in overrides.names():
        old, new, known = field_value(read, name), field_value(record, name), choices.get(name)
        source = "override" if old == new else f"override, the file says {show(old)}"
        choices[name] = Choice(name, new, source, known.alternatives if known else ())


def field_value(record: HeadRecord, name: str) -> object:
    """A field by the name that an override takes ("rope.theta" is a part of `rope`)."""
    return getattr(record.rope, name.removeprefix("rope.")) if name.startswith("rope.") else getattr(record, name)


class Reading:
    """One reading of one folder; fields are settled one after the other, each with its choice."""

    def __init__(self, source: HeadFolder, target: TargetFacts | None, overrides: Overrides) -> None:
        self.source, self.target, self.overrides = source, target, overrides
        self.choices: dict[str, Choice] = {}
        self.warnings: list[str] = []
        self.target_ids: Tensor | None = None  # [Vd] int64, settled with the vocabulary

    @property
    def hidden_size(self) -> int:
        """H, the width of what the first layer's attention adds."""
        return self.source.shape(f"{ATTENTION}o_proj.weight")[0]

    def pick(self, field: str, value: T, source: str, alternatives: tuple[str, ...] = (), ambiguous: bool = False) -> T:
        """Settle a field."""
        self.choices[field] = Choice(field, value, source, alternatives, ambiguous)
        return value

    def present(self, field: str, tensor: str) -> bool:
        """Settle a field that says nothing but whether a tensor is there."""
        has = self.source.has(tensor)
        return self.pick(field, has, f"tensor {tensor}" if has else f"no tensor {tensor}")

    def compare(self, field: str, found: int, declared: int | None) -> None:
        """Warn where config and tensors differ: published configs are often wrong, the tensors are not."""
        if declared is not None and declared != found:
            self.warnings.append(f"{field}: config says {declared}, the tensors say {found}; using the tensors")
