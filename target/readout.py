"""What is asked about logits, and who answers it: from the weights, without writing them down, or from written ones.

Owns: the question, the answer, the torch twin that answers from written logits, and which models answer by kernels.
Must never know sampling rules, drafts or device code.

A row's answer follows from its own input and the question alone: the order of a sum depends on the shape of the
weights, never on the number of rows. Among equal scores the smallest column wins.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from target.fused import fused_on
from target.pdl import pdl_on
from target.products import TUNED_TYPES, Config, FixedProduct, Product, behind

MOST = 16  # best tokens of a row that can be asked for
ROWS = 64  # with more, one pass over the weights no longer pays for all of them
READ = Config(block_n=64, block_k=128, stages=3)  # two programs of a Hopper multiprocessor at a time


Find = Callable[[Tensor, Tensor | None], Tensor]  # (logits [N, V], temperature [N]) -> the least value kept [N, 1]


class Keep(NamedTuple):
    """A filter that knows from a row's best values which others are excluded."""

    width: int  # how many of the best it has to see; 0 is all
    floor: Callable[[Tensor], Tensor]  # those [N, width] in descending order -> the least that is kept [N, 1] float32
    find: Find | None = None  # the same from a row's logits, where a kernel can


class Asked(NamedTuple):
    """A question about the logits l of N rows over V columns.

    A row's values are l / temperature (l where that is 0), its scores values + noise where the temperature is above 0,
    and -inf where `keep` excludes the value.
    """

    best: int = 1  # how many of the best scores, 1..MOST
    temperature: Tensor | None = None  # [N] float32; None is 0 everywhere
    keys: Tensor | None = None  # [N] int64, which noise; None is no noise. Needs a temperature.
    ids: Tensor | None = None  # [V] int64, what the noise calls every column; None is 0..V - 1
    ranked: bool = False  # totals of values that are kept and of scores, instead of the total of logits
    keep: Keep | None = None  # None keeps all


class Readout(NamedTuple):
    """The answer. Where `finite` is false, columns are still columns, and nothing else means anything."""

    columns: Tensor  # [N, best] int64, descending by score
    scores: Tensor  # [N, best] float32
    logits: Tensor  # [N, best] float32, those of the columns, -inf where they are excluded
    total: Tensor  # [N] float32, logsumexp of the logits, of the kept values where `ranked`
    score_total: Tensor | None  # [N] float32, logsumexp of the scores where `ranked`
    finite: Tensor  # [N] bool: every logit is


Noise = Callable[[Tensor, Tensor], Tensor]  # (keys [N], ids [V]) -> standard Gumbel noise [N, V] float32
Reader = Callable[[Tensor, Tensor, Product, Asked], Readout | None]  # (x [N, H], weight [V, H], product, asked)


def read_logits(logits: Tensor, asked: Asked, noise: Noise) -> Readout:
    """The twin: answer from logits [N, V] of any type."""
    exact = logits.float()
    values = exact if asked.temperature is None else exact / _divisor(asked.temperature)[:, None]
    scores, said = values, exact
    if asked.keys is not None and asked.temperature is not None:
        ids = torch.arange(logits.shape[1], device=logits.device) if asked.ids is None else asked.ids
        scores = values + noise(asked.keys, ids) * (asked.temperature > 0)[:, None]
    if asked.keep is not None:
        excluded = values < asked.keep.floor(_best_values(values, asked.keep.width))
        scores, values, said = (part.masked_fill(excluded, -math.inf) for part in (scores, values, said))
    columns = _best_columns(scores, asked.best)
    return Readout(
        columns=columns,
        scores=scores.gather(1, columns),
        logits=said.gather(1, columns),
        total=(values if asked.ranked else exact).logsumexp(-1),
        score_total=scores.logsumexp(-1) if asked.ranked else None,
        finite=exact.isfinite().all(-1),
    )


def _best_columns(scores: Tensor, best: int) -> Tensor:
    if best == 1:
        return scores.argmax(-1, keepdim=True)
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :best]  # topk breaks ties as it likes


def _best_values(values: Tensor, width: int) -> Tensor:
    """[N, width] in descending order, -inf past the last column; all values for a width of 0."""
    if not width:
        return values.sort(dim=1, descending=True).values
    best = values.topk(min(width, values.shape[1]), dim=1).values
    return torch.nn.functional.pad(best, (0, width - best.shape[1]), value=-math.inf)


def values_of(readout: Readout, asked: Asked) -> Tensor:
    """Values [N, best] of the columns, the same bits that the scores were made from."""
    return readout.logits if asked.temperature is None else readout.logits / _divisor(asked.temperature)[:, None]


def _divisor(temperature: Tensor) -> Tensor:
    return torch.where(temperature > 0, temperature, 1.0)


# ---- the seam ----


class Reads:
    """A module that multiplies with a vocabulary matrix, and who reads it for questions about logits."""

    reader: Reader | None = None

    def ask(self, x: Tensor, weight: Tensor, product: Product, asked: Asked) -> Readout | None:
        """Of x [..., H] as N rows and weight [V, H]; None where the logits have to be written first."""
        return None if self.reader is None else self.reader(x.flatten(0, -2), weight, product, asked)


def choose_readers(device: torch.device, *models: nn.Module | None) -> int:
    """Give models the kernel where a device can run it; how many modules took it."""
    if not fused_on(device):
        return 0
    found = [m for model in models if model is not None for m in model.modules() if isinstance(m, Reads)]
    for module in found:
        module.reader = read_by_kernel
    return len(found)


# ---- the kernels ----


def read_by_kernel(x: Tensor, weight: Tensor, product: Product, asked: Asked) -> Readout | None:
    """Answer in one pass over the weights where that pays, else from logits that the product writes.

    None where more of the best are asked for than kernels keep. Both round logits to the weights' type, but of the same
    sums only in fixed order.
    """
    if asked.best > min(MOST, weight.shape[0]):
        return None
    config = None if asked.keep is not None else reading_config(product, weight, x.shape[0])
    if config is None:
        return read_written(product(x, weight, None), asked)
    from target.kernels.lm_head import launch_read

    return launch_read(
        x if x.stride(-1) == 1 else x.contiguous(), weight, asked, config, behind(product, weight, len(x))
    )


def read_written(logits: Tensor, asked: Asked) -> Readout:
    """`read_logits` by kernels, in one pass over logits [N, V] and those that a filter takes to find its floor.

    The noise is that of `speculator.sampling.gumbel`; at most MOST of the best can be asked for.
    """
    from target.kernels.lm_head import launch_written

    return launch_written(logits, asked, _least(logits, asked), pdl_on(logits.device))


def _least(logits: Tensor, asked: Asked) -> Tensor | None:
    """The least values [N, 1] that are kept; None where all are."""
    if asked.keep is None:
        return None
    if asked.keep.find is not None:
        return asked.keep.find(logits, asked.temperature)
    values = logits.float()
    if asked.temperature is not None:
        values = values / _divisor(asked.temperature)[:, None]
    return asked.keep.floor(_best_values(values, asked.keep.width))


def reading_config(product: Product, weight: Tensor, rows: int) -> Config | None:
    """How the product is cut up, the same for any number of rows; None where its logits are written.

    In fixed order written logits and read ones are the same bits, so a row's tokens do not depend on which it met.
    """
    if weight.dtype not in TUNED_TYPES or not weight.is_contiguous():
        return None
    if isinstance(product, FixedProduct):
        fixed = product.table.fixed(weight.shape[0], weight.shape[1])
        return fixed if fixed.split == 1 else None
    return READ._replace(pdl=pdl_on(weight.device)) if rows <= ROWS else None
