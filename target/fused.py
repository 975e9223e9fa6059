"""The pieces of a layer as fused Triton kernels: 7 or 8 a layer of a Llama or Qwen3 pass of up to 64 rows.

Owns: which modules take them, and when a product ends in SiLU. Must never know device code or models. The seven are
norm with residual add, qkv, attention (per-head norms, rotation, storing keys and values, split passes and their
joining, which is a kernel of its own where that is faster), o, norm with residual add, gate and up with SiLU-mul, down.
Gated attention has a copy and the gate beside these; a gated DeltaNet layer two products, gates, rows, the rule, gated
norm and o in place of the three of attention.
Torch's pieces stay the oracle, the way on a CPU and the only ones with a gradient; what has no fused form (latent
attention, routed experts) keeps them between fused norms.

Against torch's pieces on the same input: sums, rotations and stored keys round in the same places, norms
differ by at most one unit in the last place of the model's type, SiLU-mul by two.
"""

from __future__ import annotations

import os
from functools import partial

import torch
from torch import Tensor, nn

from target.attention.base import Attend, Turn, fused_form
from target.deltanet import GatedDeltaNet, SiluGatedNorm
from target.errors import PlanError
from target.gated import GatedAttention
from target.layers import Attends, GatedMLP, Pieces, RMSNorm, SelfAttention, ZeroCentredNorm
from target.pdl import pdl_on
from target.products import (
    TUNED_TYPES,
    Config,
    FastProduct,
    FixedProduct,
    Linear,
    behind,
    kernels_need,
    launched,
    library,
)
from target.rope import Rope

OVERRIDE = "SPECULATOR_FUSED"  # on or off; on where it is not set
LARGEST_NORM = 1 << 14  # values of a normed row, which one program holds
GATED_ROWS = 64  # with more, a pass is not bound by launches and torch's product is faster
GATED = Config(block_n=64, block_k=128, stages=3, pdl=True)  # two programs of a Hopper multiprocessor at a time
GATED_MANY = GATED._replace(stages=5)  # above 16 rows, by `python -m speculator.bench.layer` on an H200


class FusedPieces(Pieces):
    """Pieces on a GPU, without gradients. `gated` by the number of rows alone, so recorded passes give equal bits.

    With `pdl` kernels begin while the launch before them still ends; the bits are the same.
    """

    def __init__(self, pdl: bool = False) -> None:
        self.pdl = pdl

    def norm(self, norm: RMSNorm, x: Tensor) -> Tensor:
        return _norm(norm, x, None, self.pdl)[1]

    def add_norm(self, norm: RMSNorm, x: Tensor, more: Tensor) -> tuple[Tensor, Tensor]:
        return _norm(norm, x, more, self.pdl)

    def beside(self, norm: RMSNorm, x: Tensor, other: RMSNorm | None, table: Tensor, tokens: Tensor) -> Tensor:
        from target.kernels.norm import launch_beside

        plain = not any(isinstance(one, ZeroCentredNorm) for one in (norm, other))
        if not plain or table.shape[1] != x.shape[-1] or table.dtype != x.dtype or not table.is_contiguous():
            return super().beside(norm, x, other, table, tokens)
        weight, eps = (None, 0.0) if other is None else (other.weight, other.eps)
        return launch_beside(tokens, table, weight, eps, x, norm.weight, norm.eps, self.pdl)

    def attend(self, layer: Attends, qkv: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        fused = fused_form(attend)
        if fused is None:
            return super().attend(layer, qkv, cos, sin, attend)
        q, k = layer.q_norm, layer.k_norm
        norms = (q.factor, k.factor, q.eps) if q is not None and k is not None else ()
        return fused(layer.layer, qkv, Turn(cos, sin, *norms), layer.window)

    def gated(self, gate_up: nn.Module, x: Tensor) -> Tensor:
        from target.kernels.silu import launch_gated, launch_silu_mul

        assert isinstance(gate_up, Linear)
        rows = x.numel() // x.shape[-1]
        config = gated_config(gate_up, rows)
        if config is None:
            return launch_silu_mul(gate_up(x), self.pdl)
        after = behind(gate_up.product, gate_up.weight, rows)
        return launch_gated(x, gate_up.weight, gate_up.bias, launched(config, self.pdl), after)

    def delta_gates(self, b: Tensor, a: Tensor, a_log: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        from target.kernels.deltanet_parts import launch_gates

        return launch_gates(b, a, a_log, bias, self.pdl)

    def silu_gated_norm(self, x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
        from target.kernels.deltanet_parts import launch_gated_norm

        return launch_gated_norm(x, gate, weight, eps, self.pdl)


def _norm(norm: RMSNorm, x: Tensor, more: Tensor | None, pdl: bool) -> tuple[Tensor, Tensor]:
    from target.kernels.norm import launch_norm

    return launch_norm(x, more, norm.weight, norm.eps, isinstance(norm, ZeroCentredNorm), pdl)


def gated_config(gate_up: Linear, rows: int) -> Config | None:
    """How the product that ends in SiLU is cut up; None where the product stays by itself.

    One of fixed order does, since all numbers of rows must go through the same one, and one that was asked of torch.
    """
    weight, product = gate_up.weight, gate_up.product
    if rows > GATED_ROWS or weight.dtype not in TUNED_TYPES or not weight.is_contiguous():
        return None
    if isinstance(product, FixedProduct) or product is library:
        return None
    found = product.table.fast(weight.shape[0], weight.shape[1], rows) if isinstance(product, FastProduct) else None
    return found if found is not None and found.split == 1 else GATED if rows <= 16 else GATED_MANY


FUSED = FusedPieces()
FUSED_PDL = FusedPieces(pdl=True)


def fuse(*models: nn.Module | None, pdl: bool = False) -> int:
    """Give the layers of models the fused pieces, on whatever device they are; how many modules took them."""
    taken, pieces = 0, FUSED_PDL if pdl else FUSED
    for module in (module for model in models if model is not None for module in model.modules()):
        if isinstance(module, SelfAttention | GatedAttention | GatedMLP | GatedDeltaNet | SiluGatedNorm) or (
            isinstance(module, RMSNorm) and module.weight.numel() <= LARGEST_NORM
        ):
            module.pieces = pieces
            taken += 1
        if isinstance(module, Rope):
            module.tables = partial(_tables, pdl)
    return taken


def _tables(
    pdl: bool, positions: Tensor, inverse: Tensor, amplitude: float, interleaved: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    from target.kernels.turn import launch_turn

    return launch_turn(positions, inverse, amplitude, interleaved, dtype, pdl)


def fuse_where_possible(device: torch.device, *models: nn.Module | None) -> int:
    """`fuse` for serving, where it is wanted, on a GPU that the kernels run on; 0 elsewhere."""
    return fuse(*models, pdl=pdl_on(device)) if fused_on(device) else 0


def fused_on(device: torch.device) -> bool:
    """Whether kernels take the place of torch's pieces on a device: wanted, and able to run there."""
    return fused_wanted() and not kernels_need(device)


def fused_wanted() -> bool:
    """What SPECULATOR_FUSED says; PlanError when it is neither on nor off."""
    wanted = os.environ.get(OVERRIDE) or "on"
    if wanted not in ("on", "off"):
        raise PlanError(f"unknown {OVERRIDE} '{wanted}': on or off")
    return wanted == "on"
