"""What the service asks of a target, whatever its architecture.

Owns: the seam between a target and what drives it. Must never know a particular architecture or backend.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from target.cache import LayerShape
from target.config import ModelConfig
from target.readout import Asked, Readout


class Hidden(NamedTuple):
    """What a pass leaves behind: F, the final-normed state the lm_head reads, and the tapped residual streams B(k)."""

    final: Tensor  # [R, T, H]
    taps: tuple[Tensor, ...]  # each [R, T, H], in the order asked for


class Target(Protocol):
    """A decoder over a paged cache. `attend` is what `target.attention.base.bind` returns for a pass."""

    config: ModelConfig
    embed: nn.Embedding

    @property
    def head_weight(self) -> Tensor:
        """[V, H] weight of the lm_head; the embedding when tied."""

    @property
    def cache_layers(self) -> list[LayerShape]:
        """What each layer stores per token, in order."""

    def __call__(self, tokens: Tensor, positions: Tensor, attend: Any, taps: tuple[int, ...] = ()) -> Hidden:
        """tokens, positions [R, T] int64 -> Hidden; `taps` are boundaries k of B(k), 0 (embedding) .. num_layers."""

    def logits(self, final: Tensor) -> Tensor:
        """F [..., H] -> [..., V] in the model's dtype."""

    def read(self, final: Tensor, asked: Asked) -> Readout | None:
        """What is asked about `logits(final)`, F [..., H] as N rows; None where they have to be written first."""
