"""Matrix products with weights: which kernel each shape gets, from a measured table.

Owns: the seam between layers and products (`Linear`), the table and the choice. Must never know models or device code.
Three products stand behind the seam: torch's own (cuBLAS), the fastest that the table knows for a shape and a number of
rows, and the one of fixed order, whose rows have the same bits whatever shares the call.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from target.errors import PlanError
from target.pdl import pdl_on

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # (x [..., K], weight [N, K], bias [N]) -> [..., N]
LIBRARY = "library"  # in a table: torch's own product
TILES = (16, 32, 64)  # rows that a measured choice is for, at most
OLDEST = (8, 0)  # compute capability that the kernels are made for
TUNED_TYPES = (torch.bfloat16, torch.float16)
ABOUT_SMS = 120  # programs that keep a large device's memory busy
SHORTEST_RUN = 512  # of K, by default
MOST_RUNS = 8
MOST_BLOCKS = 1 << 12  # of columns and rows, whose runs are added by the last of them; of more, by a second launch


class Config(NamedTuple):
    """How a product is cut up and compiled. `split`, and on which side of 64 `block_n` lies, decide its bits."""

    block_n: int  # columns of the result: 16, 32, 64 or 128
    block_k: int  # 16 to 256, a power of two
    split: int = 1  # runs that K is cut into
    stages: int = 4  # blocks on their way while one is worked on; fewer where shared memory is short
    warps: int = 4  # 4 or 8: wgmma takes warps by four
    tma: bool = True  # weights through the copy engine, where the device has one
    pdl: bool = False  # programmatic dependent launch: start while the launch before still ends
    ahead: int = 64  # KiB of weights that a program asks for until then
    joined: bool = False  # the run of K that arrives last adds them all, instead of a second launch

    @property
    def order(self) -> tuple[int, bool]:
        """Configurations of equal order give equal bits."""
        return self.split, self.block_n >= 64


class Entry(NamedTuple):
    """What was measured for weights [N, K]."""

    fixed: Config  # for any number of rows
    tiles: Mapping[int, Config | None]  # by the tile of `TILES` that holds the rows; None is torch's own product


class Table:
    """Measured choices by (N, K) of the weights; they hold for the `device` they were measured on.

    Where `pdl` is off no choice has it and is otherwise the same; where it is on, what was not measured has it too.
    """

    def __init__(self, device: str, entries: Mapping[tuple[int, int], Entry], pdl: bool = False) -> None:
        self.device, self.entries, self.pdl = device, entries, pdl

    @classmethod
    def read(cls, path: Path | None = None) -> Table:
        """A table of `speculator bench skinny`, by default the one that comes along. PlanError for another file."""
        source = resources.files("target").joinpath("data", "products.json") if path is None else path
        try:
            raw = json.loads(source.read_text(encoding="utf-8"))
            return cls(str(raw["device"]), {(s["n"], s["k"]): _entry(s) for s in raw["shapes"]})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise PlanError(f"{path or source} is no table of products: {type(error).__name__}: {error}") from None

    @classmethod
    def none(cls) -> Table:
        return cls("", {})

    def on(self, device: torch.device) -> Table:
        """These choices for a device, as far as they hold there, launched as SPECULATOR_PDL says."""
        return Table(self.device, self.entries if self.holds_for(device) else {}, pdl_on(device))

    def holds_for(self, device: torch.device) -> bool:
        return bool(self.device) and device.type == "cuda" and torch.cuda.get_device_name(device) == self.device

    def fast(self, n: int, k: int, rows: int) -> Config | None:
        """The fastest for a shape; None is torch's own, which is also the answer for what was not measured."""
        entry = self.entries.get((n, k))
        if entry is None or rows > TILES[-1]:
            return None
        found = entry.tiles.get(next(tile for tile in TILES if rows <= tile))
        return None if found is None else launched(found, self.pdl)

    def fixed(self, n: int, k: int) -> Config:
        """The configuration of fixed order, a function of the shape of the weights alone."""
        entry = self.entries.get((n, k))
        return default_config(n, k)._replace(pdl=self.pdl) if entry is None else launched(entry.fixed, self.pdl)


def _entry(raw: Mapping[str, Any]) -> Entry:
    tiles = {int(rows): None if found == LIBRARY else _config(found) for rows, found in raw["tiles"].items()}
    if set(tiles) - set(TILES):
        raise ValueError(f"rows come in tiles of {TILES}, not {sorted(tiles)}")
    return Entry(_config(raw["fixed"]), tiles)


def _config(raw: Mapping[str, Any]) -> Config:
    config = Config(**raw)
    fits = config.block_n in (16, 32, 64, 128) and config.block_k in (16, 32, 64, 128, 256)
    if not (fits and config.warps in (4, 8) and min(config.split, config.stages) >= 1 and config.ahead >= 0):
        raise ValueError(f"{config} cannot be compiled")
    return config


def launched(config: Config, pdl: bool) -> Config:
    """The same kernel, with the launch before it still running only where that is allowed: `pdl`."""
    return config if pdl or not config.pdl else config._replace(pdl=False)


def default_config(n: int, k: int) -> Config:
    """A sound configuration for weights [n, k] that were not measured: about one program for each multiprocessor."""
    split = 1
    while split < MOST_RUNS and -(-n // 64) * split < ABOUT_SMS and k // (2 * split) >= SHORTEST_RUN:
        split *= 2
    return Config(64, 128, split)


# ---- products ----


class FastProduct:
    """What the table measured to be fastest; torch's own product elsewhere and for everything else.

    `arrived`, zeros [MOST_BLOCKS] int32 of the device, is for products of one stream, one after the other.
    """

    def __init__(self, table: Table, arrived: Tensor | None = None) -> None:
        self.table, self.arrived = table, arrived

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows, (n, k) = x.numel() // x.shape[-1], weight.shape
        config = self.table.fast(n, k, rows)
        if config is None or weight.dtype not in TUNED_TYPES or not weight.is_contiguous():
            return F.linear(x, weight, bias)
        return _multiply(x, weight, bias, config, self.arrived)


class FixedProduct:
    """One order of summation for a shape of weights: a row's bits depend on nothing that shares the call."""

    def __init__(self, table: Table, arrived: Tensor | None = None) -> None:
        self.table, self.arrived = table, arrived

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        n, k = weight.shape
        return _multiply(x, weight, bias, self.table.fixed(n, k), self.arrived)


def library(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Torch's own product where that was asked for, so that no kernel ends in it either."""
    return F.linear(x, weight, bias)


def row_by_row(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Each row by itself, in memory of its own: what a CPU's library does depends on shape and alignment."""
    rows = [F.linear(row[None].clone(), weight, bias) for row in x.flatten(0, -2)]
    return torch.cat(rows).view(*x.shape[:-1], weight.shape[0]) if rows else F.linear(x, weight, bias)


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, config: Config, arrived: Tensor | None) -> Tensor:
    from target.kernels.skinny import multiply

    flat = x.flatten(0, -2) if x.dim() != 2 else x
    flat = flat if flat.stride(-1) == 1 else flat.contiguous()
    return multiply(flat, weight, bias, config, arrived).view(*x.shape[:-1], weight.shape[0])


# ---- the seam ----


class Multiplies:
    """A module that multiplies with weights, by the product it was given."""

    product: Product = staticmethod(F.linear)


class Linear(Multiplies, nn.Linear):
    """x W^T + b; parameters, names and starting values are those of nn.Linear."""

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight, self.bias)


def choose_products(model: nn.Module, product: Product) -> None:
    """Give every module that multiplies with weights its product."""
    for module in model.modules():
        if isinstance(module, Multiplies):
            module.product = product


def fast_product(device: torch.device, table: Table | None = None) -> Product:
    """The fastest product on a device: torch's own where the table says nothing or the kernels cannot run."""
    table = Table.read() if table is None else table
    if not table.holds_for(device) or kernels_need(device):
        return F.linear
    return FastProduct(table.on(device), _none_arrived(device))


def fixed_product(device: torch.device, table: Table | None = None) -> Product:
    """The product of fixed order; on a CPU one row at a time. PlanError for a GPU that the kernels cannot run on."""
    if device.type == "cpu":
        return row_by_row
    if missing := kernels_need(device):
        raise PlanError(f"products of fixed order need {missing}")
    return FixedProduct((Table.read() if table is None else table).on(device), _none_arrived(device))


def _none_arrived(device: torch.device) -> Tensor:
    return torch.zeros(MOST_BLOCKS, dtype=torch.int32, device=device)


def in_fixed_order(model: object) -> bool:
    """Whether a model was given products of fixed order."""
    product = model.product if isinstance(model, Multiplies) else None
    return product is row_by_row or isinstance(product, FixedProduct)


def kernels_need(device: torch.device) -> str:
    """What the kernels would need on a device, empty where they can run."""
    if device.type != "cuda":
        return "a CUDA device"
    if find_spec("triton") is None:
        return "the package triton"
    if torch.cuda.get_device_capability(device) < OLDEST:
        return "compute capability 8.0"
    refusal = _refusal(device)
    return f"a triton that works here, which says: {refusal}" if refusal else ""


@lru_cache(maxsize=16)
def _refusal(device: torch.device) -> str:
    from target.kernels.trial import refusal

    return refusal(device)
