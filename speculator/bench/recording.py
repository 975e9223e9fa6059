"""What a run of the acceptance benchmark writes down: one JSONL line for every answer, with all its rounds.

Owns: the file and its life (a header, whole lines, going on after an interruption). Must never import torch or decide
what a figure means. Rounds are kept as the engine gave them; what lies past the end of an answer is cut by readers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from speculator.bench.plain import RecordError, from_json, to_json

FORMAT = "speculator/recording-1"


@dataclass(frozen=True, slots=True)
class Round:
    """One verified draft. Times are seconds of the engine step that it was part of, its parts one after the other."""

    base: int  # committed tokens before it, prompt included
    tokens: tuple[int, ...]  # drafted
    parents: tuple[int, ...]
    logq: tuple[float, ...]  # log q(token | parents' path)
    accepted: tuple[int, ...]  # nodes
    committed: tuple[int, ...]  # accepted tokens and the bonus
    logp: tuple[float, ...]  # log p of the committed tokens, before temperature
    verify: float = 0.0
    draft: float = 0.0
    host: float = 0.0
    sessions: int = 1  # rounds in the step
    alone: bool = True  # no prompt was read in the step; over gRPC: no other session was part of it
    commit: float = 0.0  # taking the result over
    rpc: float = 0.0  # on the way to a server and back; 0 in process
    at: float = 0.0  # on the clock of its run, when it was committed


@dataclass(frozen=True, slots=True)
class Answer:
    """One turn of one prompt, up to and including the end mark or the limit of tokens."""

    id: str
    set: str
    category: str
    turn: int  # from 1
    seed: int
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    stopped: bool  # at an end mark, not at the limit
    rounds: tuple[Round, ...]
    asked: str = ""  # fingerprint of the texts that were asked, this turn the last

    @property
    def key(self) -> tuple[str, str, int]:
        return self.set, self.id, self.turn

    @property
    def end(self) -> int:
        """Length of prompt and answer."""
        return len(self.prompt) + len(self.tokens)

    @property
    def whole(self) -> tuple[int, ...]:
        return self.prompt + self.tokens


def dumped(answer: Answer) -> str:
    """One line, without its end."""
    return json.dumps(to_json(answer), separators=(",", ":"))


class Recording:
    """A recording file that is being written, or none when `path` is None.

    An existing file is gone on with if its header says the same `settings`; a cut last line is dropped and noted.
    RecordError names the setting that differs, or the line that is broken.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self.path, self.answers, self.notes = path, list[Answer](), list[str]()
        self._file: TextIO | None = None
        if path is None:
            return
        if path.exists() and path.stat().st_size:
            self._resume(path, settings)
        else:
            self._begin(path, settings)

    def add(self, answer: Answer) -> None:
        self.answers.append(answer)
        if self._file:
            self._file.write(dumped(answer) + "\n")
            self._file.flush()

    def __enter__(self) -> Recording:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._file:
            self._file.close()

    def _begin(self, path: Path, settings: dict[str, Any]) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("w", encoding="utf-8")
        except OSError as error:
            raise RecordError(f"{path} cannot be written: {error.strerror}.") from None
        self._file.write(json.dumps({"format": FORMAT, "settings": settings}) + "\n")
        self._file.flush()

    def _resume(self, path: Path, settings: dict[str, Any]) -> None:
        found, self.answers, kept = _read(path)
        for name in {**found, **settings}:
            if found.get(name) != json.loads(json.dumps(settings.get(name))):
                was, now = found.get(name), settings.get(name)
                raise RecordError(
                    f"{path} was recorded with {name} {was!r}, not {now!r}: name another file", field=name
                )
        if kept < path.stat().st_size:
            self.notes.append(f"{path}: the last line was cut; its prompt is run again.")
            with path.open("r+b") as file:
                file.truncate(kept)
        self._file = path.open("a", encoding="utf-8")


def read_recording(path: Path) -> tuple[dict[str, Any], list[Answer]]:
    """Settings and whole answers of a recording; a cut last line is left out. RecordError names a broken line."""
    settings, answers, _ = _read(path)
    return settings, answers


def _read(path: Path) -> tuple[dict[str, Any], list[Answer], int]:
    """Settings, answers, and how many bytes whole lines take."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error}") from None
    kept = data.rfind(b"\n") + 1
    lines = data[:kept].split(b"\n")[:-1]
    if not lines:
        raise RecordError(f"{path}, line 1: no recording ({FORMAT} is expected)", field="format")
    header = _object(path, 1, lines[0])
    if header.get("format") != FORMAT:
        raise RecordError(f"{path}, line 1: the field format must be {FORMAT!r}, not {header.get('format')!r}")
    return header.get("settings", {}), [_answer(path, i, line) for i, line in enumerate(lines[1:], 2)], kept


def _answer(path: Path, number: int, line: bytes) -> Answer:
    try:
        return from_json(Answer, _object(path, number, line))
    except RecordError as error:
        raise RecordError(f"{path}, line {number}: {error.message}", field=error.field) from None


def _object(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise RecordError(f"{path}, line {number}: no whole JSON object ({error})") from None
    if not isinstance(found, dict):
        raise RecordError(f"{path}, line {number}: a JSON object is expected")
    return found


def done(answers: Sequence[Answer]) -> dict[tuple[str, str, int], Answer]:
    """Answers by set, id and turn."""
    return {answer.key: answer for answer in answers}
