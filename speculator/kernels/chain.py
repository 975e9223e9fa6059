"""Triton kernels of a chain round between its passes: what is verified, the verdict, each drafted token.

Owns: device code and its launches, which read and write the state of rows in place. Must never know the host side of a
round. A program has a row to itself, and nothing in it depends on other rows. `speculator.round_glue.TorchGlue` is the
twin: the same whole numbers bit for bit, those of padding too.
"""

# triton reads the annotations of kernels, and its decorators are untyped where it is installed
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc,unused-ignore"

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from speculator.round_state import MOST_STOPS
from target.batch import Batch
from target.kernels.lm_head import _mixed
from target.readout import Readout

State = Mapping[str, Tensor]  # memory by row of `RoundState`, with `cached` and `root` of `Rows`
# of `sampling.noise_keys`, and what it adds for the target's own draws
COUNTER, TARGET = (tl.constexpr(odd - 2**64) for odd in (0xD1342543DE82EF95, 0xA0761D6478BD642F))
PAGES_EACH = 1024  # of a page table that are copied at once
WIDEST = 1024  # values of an output that a program moves


@triton.jit
def _even():
    """Between vectors of a value a row: an even number, so that each begins where 16 bytes are read at once."""
    count = tl.num_programs(0).to(tl.int64)
    return count + count % 2


@triton.jit
def _key(seed, counter):
    """The key of the target's noise at an absolute position."""
    return _mixed(seed + counter * COUNTER + TARGET)


@triton.jit(do_not_specialize=["spare", "pages"])
def begin_kernel(
    orders_ptr,  # [R, 4] int64: row, drafted nodes, cached tokens, last token
    ended_ptr,  # by row: bool
    room_ptr,  # by row
    root_ptr,  # by row
    cached_ptr,  # by row
    held_ptr,  # by row [NODES]
    tables_ptr,  # by row [pages]
    seed_ptr,  # by row, where NOISE
    temperature_ptr,  # by row float32, where NOISE
    whole_ptr,  # [3, EVEN] int64: rows, context, counts
    tokens_ptr,  # [R, T] int64
    positions_ptr,  # [R, T] int64
    pages_ptr,  # [R, pages] int64
    keys_ptr,  # [R, T] int64, where NOISE
    hot_ptr,  # [R, T] float32, where NOISE
    spare,
    pages,
    T: tl.constexpr,
    WIDTH: tl.constexpr,
    NODES: tl.constexpr,
    NOISE: tl.constexpr,
    PAGES: tl.constexpr,
):
    """The draft that a row holds, below its root; a row whose sequence the round before has ended is padding."""
    r, even = tl.program_id(0).to(tl.int64), _even()
    order = orders_ptr + r * 4
    row, have, context, root = tl.load(order), tl.load(order + 1), tl.load(order + 2), tl.load(order + 3)
    over = (tl.load(ended_ptr + row) != 0) & (root < 0)
    row, have = tl.where(over, spare, row).to(tl.int64), tl.where(over, -1, have)
    known = over | (root >= 0)
    context = tl.where(over, 0, tl.where(known, context, tl.load(cached_ptr + row)))
    root = tl.where(over, 0, tl.where(known, root, tl.load(root_ptr + row)))
    have = tl.where(known, have, tl.minimum(have, tl.load(room_ptr + row)))
    tl.store(whole_ptr + r, row)
    tl.store(whole_ptr + even + r, context)
    tl.store(whole_ptr + 2 * even + r, have + 1)
    node = tl.arange(0, WIDTH)
    inside, at = node < T, r * T + node
    token = tl.load(held_ptr + row * NODES + node - 1, mask=inside & (node > 0), other=0)
    position = context + tl.where(node <= have, node, 0)
    tl.store(tokens_ptr + at, tl.where(node == 0, root, token), mask=inside)
    tl.store(positions_ptr + at, position, mask=inside)
    if NOISE:
        tl.store(keys_ptr + at, _key(tl.load(seed_ptr + row), position + 1), mask=inside)
        tl.store(hot_ptr + at, tl.load(temperature_ptr + row) + tl.zeros([WIDTH], tl.float32), mask=inside)
    column = tl.arange(0, PAGES)
    for begin in range(0, pages, PAGES):
        there = begin + column < pages
        page = tl.load(tables_ptr + row * pages + begin + column, mask=there, other=0)
        tl.store(pages_ptr + r * pages + begin + column, page, mask=there)


@triton.jit
def judge_kernel(
    columns_ptr,  # [R, T] int64, the target's own tokens
    logits_ptr,  # [R, T] float32
    total_ptr,  # [R, T] float32
    finite_ptr,  # [R, T] bool
    whole_ptr,  # [3, EVEN] int64: rows, context, counts
    tokens_ptr,  # [R, T] int64
    limit_ptr,  # by row
    stops_ptr,  # by row [STOPS]
    seed_ptr,  # by row, where NOISE
    temperature_ptr,  # by row float32, where NOISE
    cached_ptr,  # by row
    root_ptr,  # by row
    ended_ptr,  # by row: bool
    room_ptr,  # by row
    parents_ptr,  # by row [NODES]
    result_ptr,  # [R, RESULT] int64, see `round_result.Layout`
    committed_ptr,  # [R, T] int64
    positions_ptr,  # [R, T] int64, those of committed tokens
    kept_ptr,  # [3, EVEN] int64: kept, the next context, 1 where the row is no padding
    levels_ptr,  # [2, DEPTH, EVEN] int64: positions of drafted tokens of each depth, keys of each draw where NOISE
    hot_ptr,  # [R] float32, where NOISE
    T: tl.constexpr,
    WIDTH: tl.constexpr,
    STOPS: tl.constexpr,
    NODES: tl.constexpr,
    RESULT: tl.constexpr,
    DEPTH: tl.constexpr,
    LEVELS: tl.constexpr,
    NOISE: tl.constexpr,
):
    """Accept drafted tokens while they are the target's own; note what that commits and where drafts start."""
    r, even = tl.program_id(0).to(tl.int64), _even()
    row, context = tl.load(whole_ptr + r), tl.load(whole_ptr + even + r)
    nodes = tl.load(whole_ptr + 2 * even + r)
    node = tl.arange(0, WIDTH)
    inside, at = node < T, r * T + node
    own = tl.load(columns_ptr + at, mask=inside, other=0)
    drafted = tl.load(tokens_ptr + at + 1, mask=node + 1 < T, other=-1)
    taken = (drafted == own) & (node + 1 < nodes) & (node + 1 < T)
    reach = tl.min(tl.where(taken, WIDTH, node), 0)
    live = nodes > 0
    kept = tl.where(live, reach + 1, 0)
    tokens = tl.where(node <= reach, own, -1)
    logprob = tl.load(logits_ptr + at, mask=inside, other=0.0) - tl.load(total_ptr + at, mask=inside, other=0.0)
    first = tl.sum(tl.where(node == 0, logprob, 0.0), 0)
    logprob = tl.where(node <= reach, logprob, first)
    sound = (tl.load(finite_ptr + at, mask=inside, other=1) != 0) | (node >= nodes)
    result = result_ptr + r * RESULT
    tl.store(result + node, tokens, mask=inside)
    tl.store(result + T, kept.to(tl.int64))
    tl.store(result + T + 1 + node, tl.where(node <= reach, node, 0).to(tl.int64), mask=inside)
    tl.store(result + 2 * T + 1 + node, logprob.to(tl.float64).to(tl.int64, bitcast=True), mask=inside)
    tl.store(result + 3 * T + 1, tl.min(sound.to(tl.int64), 0))

    committed = tl.maximum(tokens, 0)
    tl.store(committed_ptr + at, committed, mask=inside)
    tl.store(positions_ptr + at, context + node, mask=inside)
    newest = tl.sum(tl.where(node == tl.maximum(kept - 1, 0), committed, 0), 0)
    stop = tl.load(stops_ptr + row * STOPS + tl.arange(0, STOPS))
    stopped = tl.max(tl.max(((tokens[:, None] == stop[None, :]) & inside[:, None]).to(tl.int32), 1), 0)
    limit = tl.load(limit_ptr + row)
    context += 1
    tl.store(ended_ptr + row, (stopped != 0) | (context + kept >= limit))
    tl.store(room_ptr + row, tl.maximum(limit - context - 2, 0))
    context += kept - 1
    tl.store(cached_ptr + row, context)
    tl.store(root_ptr + row, newest)
    tl.store(kept_ptr + r, kept.to(tl.int64))
    tl.store(kept_ptr + even + r, context)
    tl.store(kept_ptr + 2 * even + r, live.to(tl.int64))

    if DEPTH > 0:
        level = tl.arange(0, LEVELS)
        there = level < DEPTH
        parent = level.to(tl.int64) - 1
        tl.store(result + 3 * T + 2 + DEPTH + level, parent, mask=there)
        tl.store(parents_ptr + row * NODES + level, parent, mask=there)
        tl.store(levels_ptr + level * even + r, context + level, mask=there)
        if NOISE:
            key = _key(tl.load(seed_ptr + row), context + level + 1)
            tl.store(levels_ptr + (DEPTH + level) * even + r, key, mask=there)
            tl.store(hot_ptr + r, tl.load(temperature_ptr + row))


@triton.jit
def settle_kernel(
    outputs_ptr,  # [R, T, SIZE], rows any distance apart
    more_ptr,  # [R, T, SIZE], what is still to be added to them
    rows_ptr,  # [R] int64
    kept_ptr,  # [R] int64
    store_ptr,  # by row [SIZE]
    out_ptr,  # [R, SIZE]
    row_stride,
    token_stride,
    more_row_stride,
    more_token_stride,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A row's output after its newest committed token; padding starts its drafts from nothing."""
    r, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < SIZE
    kept = tl.load(kept_ptr + r)
    last, there = tl.maximum(kept - 1, 0), inside & (kept > 0)
    value = tl.load(outputs_ptr + r * row_stride + last * token_stride + column, mask=there, other=0.0).to(tl.float32)
    more = tl.load(more_ptr + r * more_row_stride + last * more_token_stride + column, mask=there, other=0.0)
    value = (value + more.to(tl.float32)).to(out_ptr.dtype.element_ty)
    tl.store(store_ptr + tl.load(rows_ptr + r) * SIZE + column, value, mask=inside)
    tl.store(out_ptr + r * SIZE + column, value, mask=inside)


@triton.jit(do_not_specialize=["level"])
def note_kernel(
    columns_ptr,  # [R] int64
    logits_ptr,  # [R] float32
    total_ptr,  # [R] float32
    ids_ptr,  # by column int64, where NAMED
    hot_ptr,  # [R] float32, where NOISE
    rows_ptr,  # [R] int64
    held_ptr,  # by row [NODES]
    result_ptr,  # [R, RESULT] int64, from the first drafted token on
    token_ptr,  # [R] int64
    level,
    NODES: tl.constexpr,
    RESULT: tl.constexpr,
    DEPTH: tl.constexpr,
    NAMED: tl.constexpr,
    NOISE: tl.constexpr,
):
    """The token that was drawn at a level, for the next pass, for the next round and for the result."""
    r = tl.program_id(0).to(tl.int64)
    token, logprob = tl.load(columns_ptr + r), tl.load(logits_ptr + r)
    if NAMED:
        token = tl.load(ids_ptr + token)
    if NOISE:
        temperature = tl.load(hot_ptr + r)
        logprob = tl.math.div_rn(logprob, tl.where(temperature > 0, temperature, 1.0))
    logprob -= tl.load(total_ptr + r)
    tl.store(token_ptr + r, token)
    tl.store(held_ptr + tl.load(rows_ptr + r) * NODES + level, token)
    result = result_ptr + r * RESULT + level
    tl.store(result, token)
    tl.store(result + 2 * DEPTH, logprob.to(tl.float64).to(tl.int64, bitcast=True))


class Begun(NamedTuple):
    """What R rows verify: T tokens each."""

    whole: Tensor  # [3, EVEN] int64: rows, context, and counts, 0 for padding
    tokens: Tensor  # [R, T] int64
    positions: Tensor  # [R, T] int64
    pages: Tensor  # [R, P] int64
    keys: Tensor | None  # [R * T] int64, of the noise of each draw; None where all rows are greedy
    temperature: Tensor | None  # [R * T] float32

    @property
    def batch(self) -> Batch:
        """Of R chains, without a bound on their length."""
        _, context, counts = self.whole[:, : len(self.tokens)].unbind()
        return Batch(self.tokens, self.positions, context, counts, self.pages, static=True)


class Judged(NamedTuple):
    """A verdict on R rows, and where their next drafts start."""

    result: Tensor  # [R, W] int64, see `round_result.Layout`; drafted tokens are still to come
    tokens: Tensor  # [R, T] int64, committed ones, 0 after
    positions: Tensor  # [R, T] int64
    kept: Tensor  # [R] int64
    context: Tensor  # [R] int64, cached tokens from now on
    live: Tensor  # [R] int64, 0 for padding, else 1
    levels: Tensor  # [depth, R] int64, positions of drafted tokens by depth - 1
    keys: Tensor | None  # [depth, R] int64, of the noise of each draw
    temperature: Tensor | None  # [R] float32


def launch_begin(orders: Tensor, state: State, spare: int, queries: int, noise: bool) -> Begun:
    """Orders [R, 4] int64, as `round_glue.Order` has them -> the chains of `queries` tokens that they name."""
    rows, tables = orders.shape[0], state["tables"]
    whole = _vectors(3, rows, orders)
    tokens, positions = (torch.empty(rows, queries, dtype=torch.int64, device=orders.device) for _ in range(2))
    pages = torch.empty(rows, tables.shape[1], dtype=torch.int64, device=orders.device)
    keys = torch.empty(rows * queries, dtype=torch.int64, device=orders.device) if noise else None
    hot = torch.empty(rows * queries, dtype=torch.float32, device=orders.device) if noise else None
    begin_kernel[(rows,)](
        orders, state["ended"], state["room"], state["root"], state["cached"], state["tokens"], tables, state["seed"],
        state["temperature"], whole, tokens, positions, pages, orders if keys is None else keys,
        orders if hot is None else hot, spare, pages.shape[1], T=queries, WIDTH=triton.next_power_of_2(queries),
        NODES=state["tokens"].shape[1], NOISE=noise, PAGES=PAGES_EACH, num_warps=4,
    )  # fmt: skip
    return Begun(whole, tokens, positions, pages, keys, hot)


def launch_judge(found: Readout, begun: Begun, state: State, depth: int) -> Judged:
    """The coupled verdict on what the target draws after each of R * T tokens; drafts of `depth` come next.

    What rows remember of their sequences is brought up to date.
    """
    (rows, queries), noise = begun.tokens.shape, begun.keys is not None
    tokens, positions = torch.empty_like(begun.tokens), torch.empty_like(begun.tokens)
    result = torch.empty(rows, 3 * (queries + depth) + 2, dtype=torch.int64, device=tokens.device)
    kept, levels = _vectors(3, rows, tokens), _vectors((1 + noise) * depth, rows, tokens)
    hot = torch.empty(rows, dtype=torch.float32, device=tokens.device) if noise else None
    judge_kernel[(rows,)](
        found.columns.contiguous(), found.logits.contiguous(), found.total.contiguous(), found.finite.contiguous(),
        begun.whole, begun.tokens, state["limit"], state["stops"], state["seed"], state["temperature"], state["cached"],
        state["root"], state["ended"], state["room"], state["parents"], result, tokens, positions, kept, levels,
        kept if hot is None else hot, T=queries, WIDTH=triton.next_power_of_2(queries), STOPS=MOST_STOPS,
        NODES=state["parents"].shape[1], RESULT=result.shape[1], DEPTH=depth,
        LEVELS=triton.next_power_of_2(max(depth, 1)), NOISE=noise, num_warps=1,
    )  # fmt: skip
    keys = levels[depth:, :rows] if noise else None
    counts, context, live = kept[:, :rows].unbind()
    return Judged(result, tokens, positions, counts, context, live, levels[:depth, :rows], keys, hot)


def launch_settle(outputs: Tensor, more: Tensor, begun: Begun, judged: Judged, store: Tensor) -> Tensor:
    """The sum of two parts of outputs [R, T, H] -> each row's after its newest committed token [R, 1, H].

    It is kept in `store` [rows, 1, H] too.
    """
    outputs, more = (part if part.stride(-1) == 1 else part.contiguous() for part in (outputs, more))
    rows, _, size = outputs.shape
    out = torch.empty(rows, 1, size, dtype=outputs.dtype, device=outputs.device)
    width = min(triton.next_power_of_2(size), WIDEST)
    settle_kernel[(rows, triton.cdiv(size, width))](
        outputs, more, begun.whole, judged.kept, store, out, *outputs.stride()[:2], *more.stride()[:2], SIZE=size,
        WIDTH=width, num_warps=4,
    )  # fmt: skip
    return out


def launch_note(
    found: Readout, ids: Tensor | None, level: int, begun: Begun, judged: Judged, held: Tensor, depth: int
) -> Tensor:
    """The tokens [R, 1] drawn at `level`, from 1 on; `ids` [V] are the target's of the columns, None where equal.

    They and their log-probabilities go into the result, and into the drafts that rows hold, `held` [rows, N].
    """
    rows, width = judged.result.shape
    token = torch.empty(rows, 1, dtype=torch.int64, device=held.device)
    drafted, hot = judged.result[:, width - 3 * depth :], judged.temperature
    note_kernel[(rows,)](
        found.columns.contiguous(), found.logits.contiguous(), found.total.contiguous(), held if ids is None else ids,
        held if hot is None else hot, begun.whole, held, drafted, token, level - 1, NODES=held.shape[1], RESULT=width,
        DEPTH=depth, NAMED=ids is not None, NOISE=hot is not None, num_warps=1,
    )  # fmt: skip
    return token


def _vectors(count: int, rows: int, like: Tensor) -> Tensor:
    """[count, EVEN] of int64."""
    return torch.empty(count, rows + rows % 2, dtype=torch.int64, device=like.device)
