"""Orders on their way from rank 0 to the others: tensors of one fixed size, broadcast.

Owns: cutting an order into such tensors. Must never know engines. The tensors lie on the host: every rank needs the
numbers there anyway, and a rank that waits for work must not keep its device busy.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from speculator.ranks.codec import Codec, Order

WORDS = 2048  # int64 of one tensor; longer orders (prompts, first page tables) take several


class Channel:
    """One direction, rank 0 to all; the group is for this alone. RuntimeError when a rank is gone."""

    def __init__(self, group: dist.ProcessGroup | None, words: int = WORDS) -> None:
        self.group, self.rank = group, dist.get_rank(group)
        self._codec, self._frame = Codec(), torch.zeros(words, dtype=torch.int64)

    def send(self, order: Order) -> None:
        """On rank 0."""
        words = self._codec.encode(order)
        whole = torch.tensor([len(words), *words], dtype=torch.int64)
        for part in whole.split(self._frame.numel()):
            self._frame[: len(part)] = part
            dist.broadcast(self._frame, group=self.group, group_src=0)

    def receive(self) -> Order:
        """On the others; waits for as long as it takes."""
        words, missing = list[int](), 1
        while len(words) < missing:
            dist.broadcast(self._frame, group=self.group, group_src=0)
            words += self._frame.tolist()
            missing = words[0] + 1
        return self._codec.decode(words[1:missing])
