"""How committed text is shown: what the head drafted in one colour, what the target added in another.

Owns: the two styles, and plain marks where there is no colour. Must never know where tokens come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Console
from rich.text import Text

from speculator.text import TextStream, Tokenizer

DRAFTED, TARGET = "green", "yellow"


class Piece(NamedTuple):
    """Text that came at once; `drafted` says who had it first."""

    text: str
    drafted: bool


class Speech:
    """Turns one session's rounds into pieces of text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._stream = TextStream(tokenizer)

    def say(self, tokens: Sequence[int], accepted: int, last: bool) -> list[Piece]:
        """The pieces of a round, whose first `accepted` tokens were drafted; `last` lets nothing be held back."""
        parts = [part for part in ((tokens[:accepted], True), (tokens[accepted:], False)) if part[0]]
        pieces = [
            Piece(self._stream.push(ids, last and index == len(parts)), drafted)
            for index, (ids, drafted) in enumerate(parts, 1)
        ]
        return [piece for piece in pieces if piece.text]


class Painter:
    """Writes pieces as they come: in colour, or with drafted text in [brackets] if `marks`, or as they are."""

    def __init__(self, console: Console, marks: bool = True) -> None:
        self._console = console
        self._colour = has_colour(console)
        self._marks = marks and not self._colour

    def paint(self, piece: Piece) -> None:
        if not (self._colour or self._marks):
            self._console.file.write(piece.text)  # byte for byte: rich would drop control characters
            self._console.file.flush()
            return
        text = f"[{piece.text}]" if self._marks and piece.drafted else piece.text
        self._console.print(Text(text, DRAFTED if piece.drafted else TARGET), end="", soft_wrap=True)

    def end(self) -> None:
        self._console.print()

    def legend(self) -> Text:
        """What the two styles mean."""
        if self._marks:
            return Text("[in brackets]: drafted by the head and accepted; the rest: added by the target")
        return Text.assemble(("drafted by the head and accepted", DRAFTED), ", ", ("added by the target", TARGET))


def has_colour(console: Console) -> bool:
    return console.is_terminal and not console.no_color and console.color_system is not None
