"""The state of reading one head's folder: what is known, what was chosen and why.

Owns: the facts about the target that a head is checked against, and the list of choices. Must never know which key or
tensor settles which field.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

from torch import Tensor

from speculator.heads.folder import HeadFolder
from speculator.heads.overrides import Choice, Overrides
from target.config import ModelConfig

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
