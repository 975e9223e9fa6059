"""Where sessions lie: a row and KV pages, of one engine or of one of several ranks that have sessions of their own.

Owns: which rank a new session goes to. Must never know sessions or what a page holds, nor import torch.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from speculator.pool import Pool
from speculator.types import EngineInfo


class Places:
    """Rows are numbered over all ranks, each of which has as many; pages are numbered on each rank."""

    def __init__(self, info: EngineInfo) -> None:
        self.pools = [Pool(pages) for pages in info.rank_pages or (info.total_pages,)]
        self.rows = info.max_rows // len(self.pools)  # of one rank
        self._free = [list(range(rank * self.rows, (rank + 1) * self.rows)) for rank in range(len(self.pools))]

    @property
    def largest(self) -> int:
        """Pages that one session can have."""
        return max(pool.capacity for pool in self.pools)

    @property
    def capacity(self) -> int:
        return sum(pool.capacity for pool in self.pools)

    @property
    def used(self) -> int:
        return sum(pool.used for pool in self.pools)

    @property
    def reserved(self) -> int:
        return sum(pool.reserved for pool in self.pools)

    @property
    def unpromised(self) -> int:
        """Pages that the next session could have, on the rank with most of them that has a row."""
        return max((self._left(rank) for rank, rows in enumerate(self._free) if rows), default=0)

    @property
    def full(self) -> bool:
        """Whether no rank has a row left."""
        return not any(self._free)

    @property
    def free_rows(self) -> list[int]:
        return sorted(row for rows in self._free for row in rows)

    def rank(self, row: int) -> int:
        return row // self.rows

    def has(self, pages: int) -> bool:
        return self._best(pages) is not None

    def take(self, pages: int) -> int | None:
        """A row whose rank promises so many pages: of the rank with fewest sessions, then with most pages left."""
        rank = self._best(pages)
        if rank is None:
            return None
        self.pools[rank].reserve(pages)
        return heapq.heappop(self._free[rank])

    def page(self, row: int) -> int:
        """A free page of the row's rank, which was promised before."""
        return self.pools[self.rank(row)].take()

    def give(self, row: int, pages: Sequence[int], reserved: int) -> None:
        """The row, its pages and its promise back."""
        rank = self.rank(row)
        self.pools[rank].give(pages, reserved)
        heapq.heappush(self._free[rank], row)

    def _best(self, pages: int) -> int | None:
        fitting = [rank for rank, rows in enumerate(self._free) if rows and self.pools[rank].fits(pages)]
        return max(fitting, key=lambda rank: (len(self._free[rank]), self._left(rank), -rank), default=None)

    def _left(self, rank: int) -> int:
        return self.pools[rank].capacity - self.pools[rank].reserved
