"""KV pages by number: who was promised how many, and which are free.

Owns: reservations and the free pages. Must never know what a page holds, nor import torch.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence


class Pool:
    """KV pages. Reservation is a promise by number; pages are handed out when needed, lowest numbers first."""

    def __init__(self, total: int) -> None:
        self.capacity = total - 1  # page 0 is the null page
        self.reserved = 0
        self._free = list(range(1, total))

    @property
    def used(self) -> int:
        return self.capacity - len(self._free)

    @property
    def free(self) -> list[int]:
        return sorted(self._free)

    def fits(self, pages: int) -> bool:
        return self.reserved + pages <= self.capacity

    def reserve(self, pages: int) -> bool:
        if not self.fits(pages):
            return False
        self.reserved += pages
        return True

    def take(self) -> int:
        return heapq.heappop(self._free)

    def give(self, pages: Sequence[int], reserved: int) -> None:
        for page in pages:
            heapq.heappush(self._free, page)
        self.reserved -= reserved
