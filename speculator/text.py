"""Token ids as text that arrives in pieces.

Owns: what the service asks of a tokenizer, and the rule that a piece of text is never taken back. Must never import
a tokenizer library.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

UNFINISHED = "\ufffd"  # what decoders write for bytes that are no whole character yet


class Tokenizer(Protocol):
    """What the service needs to take and give text."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class TextStream:
    """Decodes growing output: each piece is final, incomplete UTF-8 waits for its other bytes.

    Decodes a short window only, since the text of a token may depend on the one before it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._told = 0  # tokens of the window whose text was given

    def push(self, ids: Sequence[int], last: bool = False) -> str:
        """The text that `ids` add; with `last` everything held back comes too."""
        self._window.extend(ids)
        before = self._tokenizer.decode(self._window[: self._told])
        now = self._tokenizer.decode(self._window)
        if (now.endswith(UNFINISHED) or len(now) == len(before)) and not last:
            return ""
        self._window = self._window[self._told :]
        self._told = len(self._window)
        return now[len(before) :]
