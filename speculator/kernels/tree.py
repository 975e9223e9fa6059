"""Triton kernels of a tree round between its passes: what is verified, the verdict, the growth of the next tree.

Owns: device code and its launches, which read and write the state of rows in place. Must never know heads or the host
side of a round. A program has a row to itself: at most 64 nodes, or the k * k candidates of a level, fit its registers.
`speculator.tree.TreeGrowth` and `speculator.round_glue.TorchGlue` are the twins: the same whole numbers bit for bit.
"""

# triton reads the annotations of kernels, and its decorators are untyped where it is installed
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc,unused-ignore"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from speculator.drafting import Drafted
from speculator.kernels.chain import PAGES_EACH, Begun, Judged, State, _even, _key, _vectors
from speculator.readout import Ranking, Reading
from speculator.tree import Frontier, Grown
from target.cache import PagedCache
from target.readout import Readout

NOBODY = tl.constexpr(0x7F800001)  # ranks below -inf
TILE = 8192  # values that a program moves at once


@triton.jit
def _rank(score):
    """Of scores, which are at most 0: the smaller this int32, the better; -0.0 and 0.0 are equal."""
    return score.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _total(
    number,  # [...] places in KP x KP
    scores_ptr,
    score_total_ptr,
    above_ptr,
    slots_ptr,
    K: tl.constexpr,
    KP: tl.constexpr,
    NODES: tl.constexpr,
    LEVEL: tl.constexpr,
    SUMMED: tl.constexpr,
):
    """Scores along the paths of children, and which places are children."""
    node, child = number // KP, number % KP
    there = (node < NODES) & (child < K)
    score = tl.load(scores_ptr + node * K + child, mask=there, other=0.0)
    if SUMMED:
        score -= tl.load(score_total_ptr + node, mask=there, other=0.0)
    score = tl.where(score < 0.0, score, 0.0)  # the NaN of a broken head becomes 0 too
    if LEVEL > 1:
        slot = tl.load(slots_ptr + node, mask=there, other=0)
        score = tl.load(above_ptr + slot, mask=there, other=0.0) + score
    return score, there


@triton.jit
def grow_kernel(
    columns_ptr,  # [R, NODES, K] int64
    scores_ptr,  # [R, NODES, K] float32
    values_ptr,  # [R, NODES, K] float32
    score_total_ptr,  # [R, NODES] float32, where SUMMED
    total_ptr,  # [R, NODES] float32, where SUMMED
    temperature_ptr,  # [R, NODES] float32, where TEMPERED
    ids_ptr,  # [Vd] int64, where NAMED
    context_ptr,  # [R] int64
    words_ptr,  # [2, R, ROOM] int64: tokens and parents of all candidates
    reals_ptr,  # [2, R, ROOM] float32: their scores and log q
    last_ptr,  # [5, R, K] int64 the frontier that was run, where LEVEL > 1
    next_ptr,  # [5, R, K] int64: tokens, parents, masks, slots, positions
    LEVEL: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    NODES: tl.constexpr,
    ROOM: tl.constexpr,
    CHUNK: tl.constexpr,
    SUMMED: tl.constexpr,
    TEMPERED: tl.constexpr,
    NAMED: tl.constexpr,
):
    """The children of one row's frontier become candidates of LEVEL, and the best K of them the next frontier."""
    FIRST: tl.constexpr = 0 if LEVEL == 1 else K + (LEVEL - 2) * K * K
    ABOVE: tl.constexpr = 0 if LEVEL <= 2 else FIRST - K * K
    WIDTH: tl.constexpr = KP if LEVEL == 1 else KP * KP
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    columns_ptr += row * NODES * K
    scores_ptr += row * NODES * K
    values_ptr += row * NODES * K
    score_total_ptr += row * NODES
    total_ptr += row * NODES
    words_ptr += row * ROOM
    reals_ptr += row * ROOM
    last_ptr += row * K
    next_ptr += row * K
    size, step = rows * ROOM, rows * K

    number = tl.arange(0, WIDTH)
    node, child = number // KP, number % KP
    slots_ptr = last_ptr + 3 * step
    above_ptr = reals_ptr + ABOVE
    score, there = _total(number, scores_ptr, score_total_ptr, above_ptr, slots_ptr, K, KP, NODES, LEVEL, SUMMED)
    token = tl.load(columns_ptr + node * K + child, mask=there, other=0)
    if NAMED:
        token = tl.load(ids_ptr + token, mask=there, other=0)
    logprob = tl.load(values_ptr + node * K + child, mask=there, other=0.0)
    if TEMPERED:
        temperature = tl.load(temperature_ptr + row * NODES + node, mask=there, other=1.0)
        logprob = tl.math.div_rn(logprob, tl.where(temperature > 0, temperature, 1.0))
    if SUMMED:
        logprob -= tl.load(total_ptr + node, mask=there, other=0.0)

    above = tl.zeros([WIDTH], tl.int64)
    masks = tl.zeros([WIDTH], tl.int64)
    place = child
    if LEVEL > 1:
        above = tl.load(slots_ptr + node, mask=there, other=0) + ABOVE
        masks = tl.load(last_ptr + 2 * step + node, mask=there, other=0)
        masks |= tl.full([WIDTH], 1, tl.int64) << ((LEVEL - 2) * K + node)
        worse = tl.zeros([WIDTH, CHUNK], tl.int32)
        mine = tl.where(there, _rank(score), NOBODY)[:, None]
        for begin in range(0, NODES * KP, CHUNK):
            rival = begin + tl.arange(0, CHUNK)
            found, real = _total(rival, scores_ptr, score_total_ptr, above_ptr, slots_ptr, K, KP, NODES, LEVEL, SUMMED)
            theirs = tl.where(real, _rank(found), NOBODY)[None, :]
            worse += (theirs < mine + (rival[None, :] < number[:, None]).to(tl.int32)).to(tl.int32)
        place = tl.sum(worse, 1)

    at = FIRST + node * K + child
    tl.store(words_ptr + at, token, mask=there)
    tl.store(words_ptr + size + at, above if LEVEL > 1 else above - 1, mask=there)
    tl.store(reals_ptr + at, score, mask=there)
    tl.store(reals_ptr + size + at, logprob, mask=there)

    best = there & (place < K)
    position = tl.load(context_ptr + row) + (LEVEL - 1)
    tl.store(next_ptr + place, token, mask=best)
    tl.store(next_ptr + step + place, node.to(tl.int64), mask=best)
    tl.store(next_ptr + 2 * step + place, masks, mask=best)
    tl.store(next_ptr + 3 * step + place, (at - FIRST).to(tl.int64), mask=best)
    tl.store(next_ptr + 4 * step + place, tl.zeros([WIDTH], tl.int64) + position, mask=best)


@triton.jit
def select_kernel(
    words_ptr,  # [2, R, ROOM] int64
    reals_ptr,  # [2, R, ROOM] float32
    chosen_ptr,  # [2, R, NODES] int64: tokens, parents
    logprobs_ptr,  # [R, NODES] float32
    SEEN: tl.constexpr,
    ROOM: tl.constexpr,
    NODES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The best NODES of one row's SEEN candidates, in the order they were seen; among equals the earlier ones."""
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    number = tl.arange(0, WIDTH)
    there = number < SEEN
    at, size = row * ROOM + number, rows * ROOM
    rank = tl.where(there, _rank(tl.load(reals_ptr + at, mask=there, other=0.0)), NOBODY)
    bound = 0  # the rank of the last one chosen: the largest number that fewer than NODES are below
    for bit in tl.static_range(30, -1, -1):
        trial = bound | (1 << bit)
        bound = tl.where(tl.sum((rank < trial).to(tl.int32), 0) < NODES, trial, bound)
    left = NODES - tl.sum((rank < bound).to(tl.int32), 0)
    equal = (rank == bound).to(tl.int32)
    taken = (rank < bound) | ((equal > 0) & (tl.cumsum(equal, 0) <= left))
    place = tl.cumsum(taken.to(tl.int32), 0) - 1
    above = tl.load(words_ptr + size + at, mask=there, other=-1)
    parent = tl.gather(place, tl.maximum(above, 0).to(tl.int32), 0)
    parent = tl.where(above < 0, -1, parent).to(tl.int64)
    out = row * NODES + place
    tl.store(chosen_ptr + out, tl.load(words_ptr + at, mask=taken, other=0), mask=taken)
    tl.store(chosen_ptr + rows * NODES + out, parent, mask=taken)
    tl.store(logprobs_ptr + out, tl.load(reals_ptr + size + at, mask=taken, other=0.0), mask=taken)


class KernelGrowth:
    """`speculator.tree.TreeGrowth` in one kernel a level and one for the end; the same arguments, bits and order.

    `context` [R] int64 gives the frontier its positions, `ids` [Vd] the target's ids of columns; None, they are equal.
    """

    def __init__(self, k: int, depth: int, context: Tensor, ids: Tensor | None) -> None:
        self._k, self._levels, self._context, self._ids = k, 0, context, ids
        self._room = k + (depth - 1) * k * k
        rows, device = context.shape[0], context.device
        self._words = torch.empty(2, rows, self._room, dtype=torch.int64, device=device)
        self._reals = torch.empty(2, rows, self._room, dtype=torch.float32, device=device)
        self._frontier = self._words  # of no use before the first level

    def frontier(self) -> Frontier:
        return Frontier(*self._frontier.unbind(0))

    def grow(self, found: Reading | Ranking) -> None:
        columns, scores, values, *more = _parts(found)
        assert columns is not None
        rows, nodes, k = columns.shape
        self._levels += 1
        last, self._frontier = self._frontier, torch.empty(5, rows, k, dtype=torch.int64, device=columns.device)
        score_total, total, temperature = (scores if part is None else part for part in more)
        padded = triton.next_power_of_2(k)
        grow_kernel[(rows,)](
            columns, scores, values, score_total, total, temperature, columns if self._ids is None else self._ids,
            self._context, self._words, self._reals, last, self._frontier, LEVEL=self._levels, K=k, KP=padded,
            NODES=nodes, ROOM=self._room, CHUNK=min(16, padded * padded), SUMMED=more[0] is not None,
            TEMPERED=more[2] is not None, NAMED=self._ids is not None, num_warps=4 if padded > 4 else 1,
        )  # fmt: skip

    def select(self, nodes: int) -> Grown:
        rows, k = self._words.shape[1], self._k
        seen = k + (self._levels - 1) * k * k
        nodes, width = min(nodes, seen), triton.next_power_of_2(seen)
        chosen = torch.empty(2, rows, nodes, dtype=torch.int64, device=self._words.device)
        logprobs = torch.empty(rows, nodes, dtype=torch.float32, device=self._words.device)
        select_kernel[(rows,)](
            self._words, self._reals, chosen, logprobs, SEEN=seen, ROOM=self._room, NODES=nodes, WIDTH=width,
            num_warps=1 if width <= 512 else 4,
        )  # fmt: skip
        return Grown(chosen[0], chosen[1], logprobs)


def _parts(found: Reading | Ranking) -> tuple[Tensor | None, ...]:
    """Columns, scores and values [R, n, k], then what normalises them: totals of scores and values, temperatures."""
    if isinstance(found, Ranking):
        return *(part.contiguous() for part in found), None, None, None
    it, shape = found.found, (*found.places, found.asked.best)
    best = (part.contiguous().view(shape) for part in (it.columns, it.scores, it.logits))
    return *best, it.score_total, it.total, found.asked.temperature


# ---- between the passes of a round ----


@triton.jit(do_not_specialize=["spare", "pages"])
def begin_tree_kernel(
    orders_ptr,  # [R, 4] int64: row, drafted nodes, cached tokens, last token
    ended_ptr,  # by row: bool
    root_ptr,  # by row
    cached_ptr,  # by row
    held_ptr,  # by row [NODES]
    above_ptr,  # by row [NODES]: parents of what is held, -1 is the root
    tables_ptr,  # by row [pages]
    seed_ptr,  # by row, where NOISE
    temperature_ptr,  # by row float32, where NOISE
    whole_ptr,  # [3, EVEN] int64: rows, context, counts
    tokens_ptr,  # [R, T] int64
    positions_ptr,  # [R, T] int64
    parents_ptr,  # [R, T] int64
    depths_ptr,  # [R, T] int64
    ancestors_ptr,  # [R, T] int64
    pages_ptr,  # [R, pages] int64
    keys_ptr,  # [R, T] int64, where NOISE
    hot_ptr,  # [R, T] float32, where NOISE
    spare,
    pages,
    T: tl.constexpr,
    WIDTH: tl.constexpr,
    ROUNDS: tl.constexpr,
    NODES: tl.constexpr,
    NOISE: tl.constexpr,
    PAGES: tl.constexpr,
):
    """The tree that a row holds, below its root; a row whose sequence the round before has ended is padding."""
    r, even = tl.program_id(0).to(tl.int64), _even()
    order = orders_ptr + r * 4
    row, have, context, root = tl.load(order), tl.load(order + 1), tl.load(order + 2), tl.load(order + 3)
    over = (tl.load(ended_ptr + row) != 0) & (root < 0)
    row, have = tl.where(over, spare, row).to(tl.int64), tl.where(over, -1, have)
    known = over | (root >= 0)
    context = tl.where(over, 0, tl.where(known, context, tl.load(cached_ptr + row)))
    root = tl.where(over, 0, tl.where(known, root, tl.load(root_ptr + row)))
    tl.store(whole_ptr + r, row)
    tl.store(whole_ptr + even + r, context)
    tl.store(whole_ptr + 2 * even + r, have + 1)

    node = tl.arange(0, WIDTH)
    there, at = node < T, r * T + node
    valid = (node > 0) & there & (node <= have)
    token = tl.load(held_ptr + row * NODES + node - 1, mask=there & (node > 0), other=0)
    parent = tl.load(above_ptr + row * NODES + node - 1, mask=valid, other=-1) + 1
    own = tl.full([WIDTH], 1, tl.int64) << node
    masks, depth, hop = own, valid.to(tl.int32), parent.to(tl.int32)
    for _ in tl.static_range(ROUNDS):  # pointer doubling
        masks |= tl.gather(masks, hop, 0)
        depth += tl.gather(depth, hop, 0)
        hop = tl.gather(hop, hop, 0)
    position = context + depth
    tl.store(tokens_ptr + at, tl.where(node == 0, root, token), mask=there)
    tl.store(positions_ptr + at, position, mask=there)
    tl.store(parents_ptr + at, parent, mask=there)
    tl.store(depths_ptr + at, depth.to(tl.int64), mask=there)
    tl.store(ancestors_ptr + at, tl.where(valid, masks, own), mask=there)
    if NOISE:
        tl.store(keys_ptr + at, _key(tl.load(seed_ptr + row), position + 1), mask=there)
        tl.store(hot_ptr + at, tl.load(temperature_ptr + row) + tl.zeros([WIDTH], tl.float32), mask=there)
    column = tl.arange(0, PAGES)
    for begin in range(0, pages, PAGES):
        inside = begin + column < pages
        page = tl.load(tables_ptr + row * pages + begin + column, mask=inside, other=0)
        tl.store(pages_ptr + r * pages + begin + column, page, mask=inside)


@triton.jit
def judge_tree_kernel(
    columns_ptr,  # [R, T] int64, the target's own tokens
    logits_ptr,  # [R, T] float32
    total_ptr,  # [R, T] float32
    finite_ptr,  # [R, T] bool
    whole_ptr,  # [3, EVEN] int64: rows, context, counts
    tokens_ptr,  # [R, T] int64
    parents_ptr,  # [R, T] int64
    depths_ptr,  # [R, T] int64
    ancestors_ptr,  # [R, T] int64
    limit_ptr,  # by row
    stops_ptr,  # by row [STOPS]
    cached_ptr,  # by row
    root_ptr,  # by row
    ended_ptr,  # by row: bool
    room_ptr,  # by row
    seed_ptr,  # by row, where NOISE
    result_ptr,  # [R, RESULT] int64, see `round_result.Layout`
    true_ptr,  # [R, STEPS] int64, committed tokens
    places_ptr,  # [R, STEPS] int64, their positions
    path_ptr,  # [R, STEPS] int64, their nodes
    kept_ptr,  # [3, EVEN] int64: kept, the next context, 1 where the row is no padding
    keys_ptr,  # [STEPS - 1, EVEN] int64 of the draws of each level, where NOISE
    T: tl.constexpr,
    WIDTH: tl.constexpr,
    STEPS: tl.constexpr,
    STEPS_PAD: tl.constexpr,
    STOPS: tl.constexpr,
    RESULT: tl.constexpr,
    NOISE: tl.constexpr,
):
    """Keep the deepest node whose whole path was drawn, among several the first; note what that commits."""
    r, even = tl.program_id(0).to(tl.int64), _even()
    row, context, count = tl.load(whole_ptr + r), tl.load(whole_ptr + even + r), tl.load(whole_ptr + 2 * even + r)
    node = tl.arange(0, WIDTH)
    at, there = r * T + node, node < T
    valid = there & (node < count)
    own = tl.load(columns_ptr + at, mask=there, other=0)
    above = tl.load(parents_ptr + at, mask=there, other=0)
    drawn = tl.load(tokens_ptr + at, mask=there, other=0) == tl.load(columns_ptr + r * T + above, mask=there, other=0)
    bit = tl.full([WIDTH], 1, tl.int64) << node
    met = tl.sum(tl.where((drawn & valid) | (node == 0), bit, 0), 0)
    ancestors = tl.load(ancestors_ptr + at, mask=there, other=0)
    depth = tl.load(depths_ptr + at, mask=there, other=0).to(tl.int32)
    accepted = there & ((ancestors & ~met) == 0)
    best = tl.max(tl.where(accepted, depth * WIDTH + (WIDTH - 1 - node), -1), 0)
    last, reach = WIDTH - 1 - best % WIDTH, best // WIDTH
    path = tl.sum(tl.where(node == last, ancestors, 0), 0)
    walked = there & ((bit & path) != 0) & (depth < STEPS)
    live = count > 0
    kept = tl.where(live, reach + 1, 0).to(tl.int64)
    logprob = tl.load(logits_ptr + at, mask=there, other=0.0) - tl.load(total_ptr + at, mask=there, other=0.0)
    sound = (tl.load(finite_ptr + at, mask=there, other=1) != 0) | (node >= count)

    # each place is written once: by the node of the path that has its depth, or as one after the last
    result, begin = result_ptr + r * RESULT, r * STEPS
    words = logprob.to(tl.float64).to(tl.int64, bitcast=True)
    tl.store(result + depth, own, mask=walked)
    tl.store(result + STEPS + 1 + depth, node.to(tl.int64), mask=walked)
    tl.store(result + 2 * STEPS + 1 + depth, words, mask=walked)
    tl.store(true_ptr + begin + depth, own, mask=walked)
    tl.store(path_ptr + begin + depth, node.to(tl.int64), mask=walked)
    step = tl.arange(0, STEPS_PAD)
    inside, nothing = step < STEPS, tl.zeros([STEPS_PAD], tl.int64)
    after, first = inside & (step > reach), tl.sum(tl.where(node == 0, words, 0), 0)
    tl.store(result + step, nothing - 1, mask=after)
    tl.store(result + STEPS + 1 + step, nothing, mask=after)
    tl.store(result + 2 * STEPS + 1 + step, nothing + first, mask=after)
    tl.store(true_ptr + begin + step, nothing, mask=after)
    tl.store(path_ptr + begin + step, nothing, mask=after)
    tl.store(places_ptr + begin + step, context + step, mask=inside)
    tl.store(result + STEPS, kept)
    tl.store(result + 3 * STEPS + 1, tl.min(sound.to(tl.int64), 0))

    stop = tl.load(stops_ptr + row * STOPS + tl.arange(0, STOPS))
    stopped = tl.max(tl.max(((own[:, None] == stop[None, :]) & walked[:, None]).to(tl.int32), 1), 0)
    newest = tl.sum(tl.where(node == tl.where(live, last, 0), own, 0), 0)
    limit, following = tl.load(limit_ptr + row), context + kept
    tl.store(ended_ptr + row, (stopped != 0) | (following + 1 >= limit))
    tl.store(room_ptr + row, tl.maximum(limit - context - 3, 0))
    tl.store(cached_ptr + row, following)
    tl.store(root_ptr + row, newest)
    tl.store(kept_ptr + r, kept)
    tl.store(kept_ptr + even + r, following)
    tl.store(kept_ptr + 2 * even + r, live.to(tl.int64))
    if NOISE:
        key = _key(tl.load(seed_ptr + row), following + step + 1)
        tl.store(keys_ptr + step * even + r, key, mask=step < STEPS - 1)


@triton.jit
def _slot(pages_ptr, index, inside, pages, PAGE: tl.constexpr):
    """Where a sequence index is stored."""
    page = tl.load(pages_ptr + tl.minimum(index // PAGE, pages - 1), mask=inside, other=0)
    return page * PAGE + index % PAGE


@triton.jit(do_not_specialize=["slots", "pages"])
def move_kernel(
    store_ptr,  # [layers, slots, SIZE]
    pages_ptr,  # [R, pages] int64
    context_ptr,  # [R] int64
    kept_ptr,  # [R] int64
    path_ptr,  # [R, STEPS] int64
    slots,
    pages,
    SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    STEPS: tl.constexpr,
    STEPS_PAD: tl.constexpr,
    PAGE: tl.constexpr,
):
    """Keys and values of kept nodes move next to the committed ones, in one layer: all are read, then all written."""
    r, layer = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    step, column = tl.arange(0, STEPS_PAD), tl.program_id(2) * CHUNK + tl.arange(0, CHUNK)
    node = tl.load(path_ptr + r * STEPS + step, mask=step < STEPS, other=0)
    moved = (step < tl.load(kept_ptr + r)) & (node > step)
    context = tl.load(context_ptr + r)
    pages_ptr += r * pages
    source = _slot(pages_ptr, context + node, moved, pages, PAGE)
    destination = _slot(pages_ptr, context + step, moved, pages, PAGE)
    inside = moved[:, None] & (column < SIZE)[None, :]
    at = store_ptr + layer * slots * SIZE + column[None, :]
    values = tl.load(at + source[:, None] * SIZE, mask=inside, other=0.0)
    tl.debug_barrier()
    tl.store(at + destination[:, None] * SIZE, values, mask=inside)


@triton.jit
def hold_kernel(
    tokens_ptr,  # [R, N] int64
    parents_ptr,  # [R, N] int64
    logprobs_ptr,  # [R, N] float32
    rows_ptr,  # [R] int64
    held_ptr,  # by row [NODES]
    above_ptr,  # by row [NODES]
    result_ptr,  # [R, RESULT] int64, from the first drafted token on
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    NODES: tl.constexpr,
    RESULT: tl.constexpr,
):
    """A drafted tree, for the next round and for the result."""
    r, node = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    there, at = node < N, r * N + node
    token, parent = tl.load(tokens_ptr + at, mask=there), tl.load(parents_ptr + at, mask=there)
    row, result = tl.load(rows_ptr + r), result_ptr + r * RESULT + node
    tl.store(held_ptr + row * NODES + node, token, mask=there)
    tl.store(above_ptr + row * NODES + node, parent, mask=there)
    tl.store(result, token, mask=there)
    tl.store(result + N, parent, mask=there)
    logprob = tl.load(logprobs_ptr + at, mask=there)
    tl.store(result + 2 * N, logprob.to(tl.float64).to(tl.int64, bitcast=True), mask=there)


class Shapes(NamedTuple):
    """The shapes of R trees of T nodes, as `speculator.tree.Tree` has them."""

    parents: Tensor  # [R, T] int64
    depths: Tensor  # [R, T] int64
    ancestors: Tensor  # [R, T] int64


def launch_begin_tree(
    orders: Tensor, state: State, spare: int, queries: int, depth: int, noise: bool
) -> tuple[Begun, Shapes]:
    """Orders [R, 4] int64, as `round_glue.Order` has them -> the trees of `queries` nodes, root included, they name."""
    rows, tables = orders.shape[0], state["tables"]
    whole = _vectors(3, rows, orders)
    tokens, positions, *shapes = (torch.empty(rows, queries, dtype=torch.int64, device=orders.device) for _ in range(5))
    pages = torch.empty(rows, tables.shape[1], dtype=torch.int64, device=orders.device)
    keys = torch.empty(rows * queries, dtype=torch.int64, device=orders.device) if noise else None
    hot = torch.empty(rows * queries, dtype=torch.float32, device=orders.device) if noise else None
    begin_tree_kernel[(rows,)](
        orders, state["ended"], state["root"], state["cached"], state["tokens"], state["parents"], tables,
        state["seed"], state["temperature"], whole, tokens, positions, *shapes, pages,
        orders if keys is None else keys, orders if hot is None else hot, spare, pages.shape[1], T=queries,
        WIDTH=triton.next_power_of_2(queries), ROUNDS=depth.bit_length(), NODES=state["tokens"].shape[1],
        NOISE=noise, PAGES=PAGES_EACH, num_warps=1,
    )  # fmt: skip
    return Begun(whole, tokens, positions, pages, keys, hot), Shapes(*shapes)


def launch_judge_tree(
    found: Readout, begun: Begun, shapes: Shapes, state: State, depth: int, nodes: int
) -> tuple[Judged, Tensor]:
    """The coupled verdict on what the target draws after each of R * T nodes, and its path [R, depth + 1] int64.

    What rows remember of their sequences is brought up to date. Drafts of `nodes` come next.
    """
    (rows, queries), noise, steps = begun.tokens.shape, begun.keys is not None, depth + 1
    tokens, positions, path = (torch.empty(rows, steps, dtype=torch.int64, device=found.total.device) for _ in range(3))
    result = torch.empty(rows, 3 * (steps + nodes) + 2, dtype=torch.int64, device=tokens.device)
    kept, keys = _vectors(3, rows, tokens), _vectors(depth if noise else 0, rows, tokens)
    judge_tree_kernel[(rows,)](
        found.columns.contiguous(), found.logits.contiguous(), found.total.contiguous(), found.finite.contiguous(),
        begun.whole, begun.tokens, *shapes, state["limit"], state["stops"], state["cached"], state["root"],
        state["ended"], state["room"], state["seed"], result, tokens, positions, path, kept, keys if noise else kept,
        T=queries, WIDTH=triton.next_power_of_2(queries), STEPS=steps, STEPS_PAD=triton.next_power_of_2(steps),
        STOPS=state["stops"].shape[1], RESULT=result.shape[1], NOISE=noise, num_warps=1,
    )  # fmt: skip
    count, context, live = kept[:, :rows].unbind()
    given = keys[:, :rows] if noise else None
    return Judged(result, tokens, positions, count, context, live, positions[:0], given, None), path


def launch_move(cache: PagedCache, begun: Begun, judged: Judged, path: Tensor) -> None:
    """Keys and values of the nodes of `path` [R, D + 1] move next to the committed ones, in the target's layers."""
    store, (rows, steps) = cache.groups[0], path.shape
    size, padded = store[0, 0].numel(), triton.next_power_of_2(steps)
    chunk = min(triton.next_power_of_2(size), max(TILE // padded, 1))
    move_kernel[(rows, store.shape[0], triton.cdiv(size, chunk))](
        store, begun.pages, begun.whole[1], judged.kept, path, store.shape[1], begun.pages.shape[1], SIZE=size,
        CHUNK=chunk, STEPS=steps, STEPS_PAD=padded, PAGE=cache.page_size, num_warps=4,
    )  # fmt: skip


def launch_hold(drafted: Drafted, begun: Begun, judged: Judged, state: State) -> None:
    """Drafts of R rows are what the rows hold, and the end of the result."""
    rows, nodes = drafted.tokens.shape
    width = judged.result.shape[1]
    hold_kernel[(rows,)](
        drafted.tokens, drafted.parents, drafted.logprobs, begun.whole, state["tokens"], state["parents"],
        judged.result[:, width - 3 * nodes :], N=nodes, WIDTH=triton.next_power_of_2(nodes),
        NODES=state["tokens"].shape[1], RESULT=width, num_warps=1,
    )  # fmt: skip
