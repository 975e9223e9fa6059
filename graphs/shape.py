"""Graph shapes: which padded batch sizes are recorded, and which of them holds a batch.

Owns: `GraphShape` and `Ladder`. Must never know tensors, recorders or models.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from graphs.errors import ShapeError

Variant = tuple[str | int, ...]


@dataclass(frozen=True)
class GraphShape:
    """What one graph is recorded for: `rows` rows of `query_len` tokens each."""

    rows: int
    query_len: int
    variant: Variant = ()  # what else changes the recorded pass: "greedy" or "sampled", draft depth, chain or tree

    def __post_init__(self) -> None:
        if self.rows < 1 or self.query_len < 1:
            raise ShapeError(f"a graph needs 1 row of 1 token or more, got {self.rows} of {self.query_len}")

    @property
    def tokens(self) -> int:
        """Rows times query length, padding included."""
        return self.rows * self.query_len

    def holds(self, rows: int, query_len: int, variant: Variant = ()) -> bool:
        return 0 < rows <= self.rows and 0 < query_len <= self.query_len and variant == self.variant

    def __str__(self) -> str:
        return f"{self.rows}x{self.query_len}" + "".join(f"/{part}" for part in self.variant)


class Ladder:
    """An immutable set of shapes, smallest first by tokens."""

    def __init__(self, shapes: Iterable[GraphShape]) -> None:
        self.shapes = tuple(sorted(set(shapes), key=_order))

    @classmethod
    def grid(cls, rows: Sequence[int], query_lens: Sequence[int], variants: Sequence[Variant] = ((),)) -> Ladder:
        """Every combination."""
        return cls(GraphShape(*combination) for combination in product(rows, query_lens, variants))

    def fit(self, rows: int, query_len: int, variant: Variant = ()) -> GraphShape | None:
        """The smallest shape of the variant that holds the batch, None when none does."""
        return next((shape for shape in self.shapes if shape.holds(rows, query_len, variant)), None)

    def misfit(self, rows: int, query_len: int, variant: Variant = ()) -> str:
        """Why `fit` found nothing."""
        if all(shape.variant != variant for shape in self.shapes):
            return f"no shape is {'/'.join(map(str, variant)) or 'plain'}"
        return f"no shape holds {rows} rows of {query_len}"

    def largest_first(self) -> tuple[GraphShape, ...]:
        """The order of warm-up and capture: the first takes the memory that the others reuse."""
        return self.shapes[::-1]

    def __iter__(self) -> Iterator[GraphShape]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __repr__(self) -> str:
        return f"Ladder({', '.join(map(str, self.shapes))})"


def row_ladder(most: int) -> tuple[int, ...]:
    """Row counts up to `most`: dense where few sessions run, then in steps that pad at most a third, then an eighth."""
    if most < 1:
        raise ShapeError(f"a ladder needs room for 1 row or more, got {most}")
    steps = [1, 2, 4, *range(8, 32, 4), *range(32, 64, 8), *range(64, most + 1, 16)]
    return (*(step for step in steps if step < most), most)


def token_ladder(most: int = 8192, least: int = 64) -> tuple[int, ...]:
    """Token counts of prompt buckets: powers of two from `least`, with the steps halved above 1024, up to `most`."""
    if most < 1 or least < 1:
        raise ShapeError(f"token buckets hold 1 token or more, got {least} to {most}")
    buckets, step = [], least
    while step < most:
        buckets += [step, step * 3 // 2] if step >= 1024 else [step]
        step *= 2
    return (*(bucket for bucket in buckets if bucket < most), most)


def _order(shape: GraphShape) -> tuple[int, int, tuple[str, ...]]:
    return shape.tokens, shape.rows, tuple(map(str, shape.variant))
