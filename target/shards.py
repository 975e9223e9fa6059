"""Reads of every published tensor only the part that one rank of a tensor-parallel group holds.

Owns: which part that is, by the tensor's name, and counting what was read. Must never know modules or collectives.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from target.config import ModelConfig
from target.errors import CheckpointError
from target.fp8 import SCALE, dequantise
from target.parallel import Axis, vocabulary_rows
from target.weights import WeightFiles, load_bin, open_safetensors

ROWS, COLUMNS = 0, 1  # of a weight [out, in]; the last two dimensions of stacked experts
TABLES = ("embed_tokens.weight", "lm_head.weight")
# by the end of a published name: the dimension that heads or inner columns lie along
ALONG = {
    "q_proj.weight": ROWS, "q_proj.bias": ROWS, "q_b_proj.weight": ROWS, "kv_b_proj.weight": ROWS,
    "o_proj.weight": COLUMNS,
    "gate_proj.weight": ROWS, "gate_proj.bias": ROWS, "up_proj.weight": ROWS, "up_proj.bias": ROWS,
    "down_proj.weight": COLUMNS,
}  # fmt: skip
KEYS_AND_VALUES = ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias")
ADDED_ONCE = ("o_proj.bias", "down_proj.bias")  # before the sum over the ranks: the first rank brings them


class Cut(NamedTuple):
    """Piece number `piece` of equal `pieces` along a dimension; with `padded`, of rows rounded up to equal ones."""

    dim: int
    piece: int
    pieces: int
    padded: bool = False

    def span(self, name: str, size: int) -> tuple[int, int]:
        """The first and the last index but one of the piece; CheckpointError where the size does not divide."""
        if self.padded:
            rows = vocabulary_rows(size, self.pieces)
            return min(self.piece * rows, size), min((self.piece + 1) * rows, size)
        each, rest = divmod(size, self.pieces)
        if rest:
            raise CheckpointError(f"{name} has {size} in dimension {self.dim}, which {self.pieces} ranks do not divide")
        return self.piece * each, (self.piece + 1) * each


def cut_of(name: str, kv_heads: int, axis: Axis) -> Cut | None:
    """The piece that a rank holds of a tensor of a whole model with `kv_heads`; None for all of it."""
    end = ".".join(name.rsplit(".", 2)[-2:])
    if end in TABLES:
        return Cut(ROWS, axis.rank, axis.size, padded=True)
    if end in KEYS_AND_VALUES:
        count = min(kv_heads, axis.size)
        return Cut(ROWS, axis.rank * count // axis.size, count)
    return Cut(ALONG[end], axis.rank, axis.size) if end in ALONG else None


def piece_of(name: str, tensor: Tensor, kv_heads: int, axis: Axis) -> Tensor:
    """A rank's piece of a tensor that was read whole."""
    cut = cut_of(name, kv_heads, axis)
    if cut is not None:
        begin, end = cut.span(name, tensor.shape[cut.dim])
        tensor = tensor.narrow(cut.dim, begin, end - begin)
    return _once(name, tensor, axis)


def _once(name: str, tensor: Tensor, axis: Axis) -> Tensor:
    return torch.zeros_like(tensor) if name.endswith(ADDED_ONCE) and axis.rank else tensor


class ShardFiles(WeightFiles):
    """The tensors of a folder, each cut to a rank's piece; `bytes_read` counts what left the files."""

    def __init__(self, folder: Path, config: ModelConfig, axis: Axis) -> None:
        super().__init__(folder, config.fp8_block)
        self.config, self.axis, self.bytes_read = config, axis, 0
        self._file: tuple[Path, Any] | None = None  # the one that was read last

    def items(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        wanted = self.names() if names is None else set(names)
        for name in sorted(wanted, key=lambda name: (self._place[name], name)):
            yield name, self.read(name)

    def read(self, name: str) -> Tensor:
        cut, scale = self.cut_of(name), f"{name}{SCALE}"
        try:
            tensor = self._scaled(name, scale, cut) if scale in self._scales else self._plain(name, cut)
        except SafetensorError as error:
            raise CheckpointError(f"{self._place[name]} has no readable tensor {name}: {error}") from None
        return self.once(name, tensor)

    def cut_of(self, name: str) -> Cut | None:
        """The piece of a tensor that this rank holds."""
        return cut_of(name, self.config.num_kv_heads, self.axis)

    def once(self, name: str, tensor: Tensor) -> Tensor:
        """A piece as the rank adds it: what is added before a sum over the ranks comes from one of them."""
        return _once(name, tensor, self.axis)

    def _plain(self, name: str, cut: Cut | None) -> Tensor:
        size = self._size(name, cut)
        part = self._part(name, cut, cut.span(name, size) if cut else (0, size))
        missing = vocabulary_rows(size, cut.pieces) - len(part) if cut and cut.padded else 0
        return torch.cat((part, part.new_zeros(missing, *part.shape[1:]))) if missing else part

    def _scaled(self, name: str, scale: str, cut: Cut | None) -> Tensor:
        """Of float8 weights the piece and its scales, where it begins and ends with their blocks; else all of both."""
        size = self._size(name, cut)
        begin, end = cut.span(name, size) if cut else (0, size)
        block = self._block[cut.dim if cut else ROWS]
        if begin % block or (end % block and end != size):
            whole = self._exact(name, self._part(name, None, (0, size)), self._part(scale, None, (0, size)))
            return whole.narrow(cut.dim if cut else ROWS, begin, end - begin)
        scales = self._part(scale, cut, (begin // block, -(-end // block)))
        return self._exact(name, self._part(name, cut, (begin, end)), scales)

    def _exact(self, name: str, tensor: Tensor, scales: Tensor) -> Tensor:
        try:
            return dequantise(tensor, scales, self._block)
        except CheckpointError as error:
            raise CheckpointError(f"{self._place[name]}: {name} {error}") from None

    def _size(self, name: str, cut: Cut | None) -> int:
        """Of the dimension that is cut."""
        held = self._held(name)
        shape = held.shape if isinstance(held, Tensor) else held.get_shape()
        return int(shape[cut.dim if cut else ROWS]) if len(shape) else 1

    def _part(self, name: str, cut: Cut | None, span: tuple[int, int]) -> Tensor:
        """The indices `span` along the dimension that is cut."""
        held, (begin, end) = self._held(name), span
        dim = cut.dim if cut else None
        part: Tensor = held[:] if dim is None else held[begin:end] if dim == ROWS else held[:, begin:end]
        self.bytes_read += part.numel() * part.element_size()
        return part

    def _held(self, name: str) -> Any:
        """What the named tensor can be sliced from without reading all of it."""
        path = self._place[name]
        if self._file is None or self._file[0] != path:
            self._file = path, open_file(path)
        file = self._file[1]
        return file[name] if isinstance(file, dict) else file.get_slice(name)


def open_file(path: Path) -> Any:
    """A safetensors file, or the tensors of a .bin file still on the disk. CheckpointError where it is neither."""
    return load_bin(path) if path.suffix == ".bin" else open_safetensors(path)
