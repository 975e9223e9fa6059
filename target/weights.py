"""Hugging Face weight files: tensors by published name, checked strictly both ways.

Owns: file formats, moving tensors into and out of modules, and the errors. Must never know architectures or drafting.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from target.config import read_json
from target.errors import CheckpointError
from target.fp8 import FLOAT8, SCALE, dequantise, scale_names

Progress = Callable[[int, int], None]  # tensors done, tensors in all


class Slot(NamedTuple):
    """Where a published tensor goes: all of one of our parameters or buffers, or some of its rows.

    With `expert`, the rows are those of one expert's matrix in a stack [E, rows, columns].
    """

    parameter: str
    rows: range | None = None
    expert: int | None = None


class WeightFiles:
    """The tensors of a folder by published name: safetensors (sharded by index or not), else pytorch_model.bin.

    Weights that are stored as float8 beside scales of blocks come out as float32, and the scales are not seen.
    """

    def __init__(self, folder: Path, fp8_block: tuple[int, int] = (128, 128)) -> None:
        self._place, self._block = _locate(folder), fp8_block
        self._scales = scale_names(self._place)

    def names(self) -> set[str]:
        return set(self._place) - self._scales

    def items(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Tensors on the CPU, file by file."""
        wanted = self.names() if names is None else set(names)
        for path in sorted(set(self._place.values())):
            for name, tensor in _read_tensors(path, sorted(name for name in wanted if self._place[name] == path)):
                yield name, self._value(name, tensor)

    def read(self, name: str) -> Tensor:
        return self._value(name, self._stored(name))

    def _stored(self, name: str) -> Tensor:
        return next(_read_tensors(self._place[name], [name]))[1]

    def _value(self, name: str, tensor: Tensor) -> Tensor:
        scale = f"{name}{SCALE}"
        if scale not in self._scales:
            return tensor
        try:
            return dequantise(tensor, self._stored(scale), self._block)
        except CheckpointError as error:
            raise CheckpointError(f"{self._place[name]}: {name} {error}") from None


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
        return list(load_bin(path))
    with open_safetensors(path) as file:
        return list(file.keys())


def open_safetensors(path: Path) -> safe_open:
    """A safetensors file whose tensors are read one by one; CheckpointError where it is none."""
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from None


def load_bin(path: Path) -> dict[str, Tensor]:
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
        loaded = load_bin(path)
        yield from ((name, loaded[name]) for name in names)
        return
    with open_safetensors(path) as file:
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
    whole = parameter if slot.expert is None else parameter[slot.expert]
    return whole if slot.rows is None else whole[slot.rows.start : slot.rows.stop]


def fill(
    module: nn.Module,
    slots: Mapping[str, Slot],
    tensors: Iterable[tuple[str, Tensor]],
    where: Path,
    progress: Progress | None = None,
) -> None:
    """Copy published tensors into a module; CheckpointError when a shape differs or a value is not finite."""
    held = dict(module.named_parameters()) | dict(module.named_buffers())
    for done, (name, tensor) in enumerate(tensors, 1):
        target = _cut(held[slots[name].parameter].data, slots[name])
        _check_fit(f"{where}: {name}", tensor, target)
        target.copy_(tensor)
        if not bool(torch.isfinite(target).all()):
            raise CheckpointError(f"{where}: {name} holds NaN or infinite values in {target.dtype}")
        if progress:
            progress(done, len(slots))


def _check_fit(what: str, tensor: Tensor, target: Tensor) -> None:
    if target.shape != tensor.shape:
        raise CheckpointError(f"{what} has shape {list(tensor.shape)}, expected {list(target.shape)}")
    if tensor.dtype in FLOAT8:
        raise CheckpointError(f"{what} holds {tensor.dtype} values without their scales ({SCALE})")
    if not tensor.is_floating_point():
        raise CheckpointError(f"{what} holds {tensor.dtype} values; quantised weights are not supported")


def export_tensors(module: nn.Module, slots: Mapping[str, Slot], dtype: torch.dtype) -> dict[str, Tensor]:
    """Published name -> contiguous CPU tensor, the inverse of `fill`; parameters in `dtype`, buffers in their own."""
    parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())
    exported = {}
    for name, slot in slots.items():
        kept = buffers.get(slot.parameter)
        cut = _cut((parameters[slot.parameter] if kept is None else kept).detach(), slot)
        exported[name] = cut.to("cpu", dtype if kept is None else kept.dtype, copy=True).contiguous()
    return exported
