"""Orders on their way from rank 0 to the others: tensors of one fixed size, broadcast.

Owns: cutting an order into such tensors. Must never know engines. The tensors lie on the host: every rank needs the
numbers there anyway, and a rank that waits for work must not keep its device busy. Rank 0 does not wait until they have
arrived: while it runs the next step, another stage may still be busy with the one before.
"""

from __future__ import annotations

from collections import deque

import torch
import torch.distributed as dist

from speculator.ranks.codec import Codec, Kind, Order

MOST_SENT = 16  # tensors on their way at once; then the sender waits for the oldest
WORDS = 2048  # int64 of one tensor; longer orders (prompts, first page tables) take several


class Channel:
    """One direction, rank 0 to all; the group is for this alone. RuntimeError when a rank is gone."""

    def __init__(self, group: dist.ProcessGroup | None, words: int = WORDS) -> None:
        self.group, self.rank = group, dist.get_rank(group)
        self._codec, self._frame = Codec(), torch.zeros(words, dtype=torch.int64)
        self._sent: deque[tuple[dist.Work, torch.Tensor]] = deque()

    def send(self, order: Order) -> None:
        """On rank 0; waits for its arrival only where it is the last order of all."""
        words = self._codec.encode(order)
        whole = torch.tensor([len(words), *words], dtype=torch.int64)
        for part in whole.split(self._frame.numel()):
            frame = torch.zeros_like(self._frame)
            frame[: len(part)] = part
            self._sent.append((dist.broadcast(frame, group=self.group, group_src=0, async_op=True), frame))
            self._arrived(MOST_SENT)
        if order.kind is Kind.END:
            self._arrived(0)

    def _arrived(self, most: int) -> None:
        """Wait until `most` or fewer are on their way."""
        while len(self._sent) > most:
            self._sent.popleft()[0].wait()

    def receive(self) -> Order:
        """On the others; waits for as long as it takes."""
        words, missing = list[int](), 1
        while len(words) < missing:
            dist.broadcast(self._frame, group=self.group, group_src=0)
            words += self._frame.tolist()
            missing = words[0] + 1
        return self._codec.decode(words[1:missing])
