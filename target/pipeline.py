"""A target in stages: which layers each rank of a pipeline holds, and what one stage hands to the next.

Owns: the division of layers, cutting a decoder to its stage, and the planes of a hand-over. Must never know transports,
drafting, or when a stage runs. As in GPipe (arXiv 1811.06965) a stage is a run of layers; taps of earlier stages travel
along with the residual stream, since the draft head lives on the last stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from target.config import ModelConfig
from target.decoder import Decoder
from target.errors import PlanError
from target.model import Hidden
from target.weights import Slot

PIPELINE = "pipeline"


@dataclass(frozen=True)
class Stage:
    """Stage number `index` of `size`."""

    index: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        return self.index == 0

    @property
    def last(self) -> bool:
        return self.index + 1 == self.size

    def span(self, layers: int) -> range:
        """The layers of this stage; what does not divide goes to earlier ones, since the last has lm_head and head."""
        each, rest = divmod(layers, self.size)
        start = self.index * each + min(self.index, rest)
        return range(start, start + each + (self.index < rest))


WHOLE = Stage()


def check_stages(config: ModelConfig, size: int) -> None:
    """PlanError for a target that `size` stages cannot share."""
    if size == 1:
        return
    if config.delta is not None:
        raise PlanError(f"{config.architecture} has recurrent layers, whose states no pipeline of stages moves")
    if size > config.num_layers:
        raise PlanError(f"{size} stages need a layer each, and {config.architecture} has {config.num_layers}")


def cut_to_stage(model: Decoder, stage: Stage, embeds: bool) -> None:
    """Leave a decoder without weights yet only what its stage holds; the embedding on the first, or where `embeds`.

    Layers keep their kind and window, and are numbered anew in the cache.
    """
    span = stage.span(model.config.num_layers)
    model.span = span
    model.layers = nn.ModuleList(model.layers[i] for i in span)
    for layer in model.layers:
        layer.attention.layer -= span.start  # type: ignore[union-attr, operator]
    if not (stage.first or embeds):
        model.embed = nn.Embedding(0, model.config.hidden_size)
    if not stage.last:
        model.lm_head = None


def stage_slots(slots: Mapping[str, Slot], model: Decoder) -> dict[str, Slot]:
    """The places of the published tensors that a stage holds, by its own numbers of layers."""
    found = {name: _renumbered(slot, model.span) for name, slot in slots.items()}
    sizes = {name: tensor.numel() for name, tensor in model.state_dict(keep_vars=True).items()}
    return {name: slot for name, slot in found.items() if slot is not None and sizes.get(slot.parameter)}


def _renumbered(slot: Slot, span: range) -> Slot | None:
    kind, _, rest = slot.parameter.partition(".")
    if kind != "layers":
        return slot
    number, _, inner = rest.partition(".")
    return slot._replace(parameter=f"layers.{int(number) - span.start}.{inner}") if int(number) in span else None


def taps_before(taps: tuple[int, ...], span: range) -> int:
    """How many of the `taps` earlier stages have passed by, the boundary where this one begins included."""
    return sum(k <= span.start for k in taps) if span.start else 0


def pack(hidden: Hidden) -> Tensor:
    """What a stage hands on, as one tensor of planes [1 + taps, R, T, H]: the residual stream, then taps in order."""
    return torch.stack((hidden.final, *hidden.taps))


def unpack(planes: Tensor) -> Hidden:
    """The inverse of `pack`, as views."""
    stream, *taps = planes.unbind(0)
    return Hidden(stream, tuple(taps))
