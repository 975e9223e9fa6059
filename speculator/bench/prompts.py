"""Prompt sets as they are published: MT-bench, Spec-Bench, HumanEval, GSM8K, MBPP, MATH-500, JSONL, plain text.

Owns: which fields a format has, and errors that name line and field. Must never know a tokenizer or a model. Texts are
taken as they stand in the files; nothing is wrapped around them but the chat template, later.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speculator.bench.outputs import unreadable
from speculator.errors import InvalidArgumentError

OPEN_SET = Path(__file__).parent / "data" / "open.jsonl"


class PromptError(InvalidArgumentError):
    """A prompt file that cannot be used; says which line and which field."""

    reason = "BAD_PROMPTS"


@dataclass(frozen=True, slots=True)
class Prompt:
    """One conversation to be had: each turn is asked after the model's own answer to the one before."""

    id: str  # unique in its set
    set: str
    category: str
    turns: tuple[str, ...]

    def fingerprint(self, turn: int) -> str:
        """Of the texts up to `turn`, counted from 1."""
        return hashlib.sha256("\0".join(self.turns[:turn]).encode()).hexdigest()[:12]


@dataclass(frozen=True, slots=True)
class Format:
    """How one record of a published set is read. The first format whose `fields` all stand in a record is taken."""

    fields: tuple[str, ...]
    turns: Callable[[Mapping[str, Any]], Any]
    id: str = ""
    category: str = ""


FORMATS: Mapping[str, Format] = {
    "mt-bench": Format(("question_id", "category", "turns"), lambda r: r["turns"], "question_id", "category"),
    "spec-bench": Format(("question_id", "category", "turns"), lambda r: r["turns"], "question_id", "category"),
    "humaneval": Format(("task_id", "prompt", "entry_point"), lambda r: [r["prompt"]], "task_id"),
    "gsm8k": Format(("question", "answer"), lambda r: [r["question"]]),
    "mbpp": Format(("task_id", "text", "test_list"), lambda r: [r["text"]], "task_id"),
    "mbpp-sanitized": Format(("task_id", "prompt", "test_list"), lambda r: [r["prompt"]], "task_id"),
    "math-500": Format(("problem", "solution", "subject"), lambda r: [r["problem"]], "unique_id", "subject"),
    "turns": Format(("turns",), lambda r: r["turns"], "id", "category"),
    "jsonl": Format(("prompt",), lambda r: [r["prompt"]], "id", "category"),
}
TEXT = "text"  # one prompt a line, no JSON


def read_prompts(path: Path | None = None, form: str = "", limit: int = 0) -> list[Prompt]:
    """The prompts of a file (the set of this package by default), at most `limit` unless 0.

    `form` names a format of FORMATS or "text"; without it the fields of the first record decide. PromptError.
    """
    path = path or OPEN_SET
    lines = [(number, line) for number, line in enumerate(_lines(path), 1) if line.strip()]
    if not lines:
        raise PromptError(f"{path} holds no prompt.")
    name = set_name(path)
    if form == TEXT or not form and not _is_json(path, lines[0][1]):
        prompts = [Prompt(str(number), name, name, (line.strip(),)) for number, line in lines]
    else:
        prompts = _records(path, name, lines, form)
    _check_ids(path, prompts)
    return prompts[: limit or None]


def set_name(path: Path) -> str:
    """gsm8k for gsm8k.jsonl.gz."""
    return path.name.split(".")[0]


def _lines(path: Path) -> list[str]:
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
        return text.split("\n")  # splitlines() would also split at U+2028, which JSON leaves as it is
    except FileNotFoundError:
        raise PromptError(
            f"{path} cannot be read: there is no such file; prompt sets are named by their path."
        ) from None
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise PromptError(unreadable(path, error)) from None


def _is_json(path: Path, line: str) -> bool:
    return ".jsonl" in path.suffixes or ".json" in path.suffixes or line.lstrip().startswith("{")


def _records(path: Path, name: str, lines: list[tuple[int, str]], form: str) -> list[Prompt]:
    records = [(number, _parsed(path, number, line)) for number, line in lines]
    known = _format(path, form, records[0])
    return [_prompt(path, number, record, known, name) for number, record in records]


def _parsed(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise PromptError(f"{path}, line {number}: no whole JSON object ({error}).") from None
    if not isinstance(record, dict):
        raise PromptError(f"{path}, line {number}: a JSON object is expected, not {type(record).__name__}.")
    return record


def _format(path: Path, form: str, first: tuple[int, dict[str, Any]]) -> str:
    if form:
        if form not in FORMATS:
            raise PromptError(f"There is no prompt format {form!r}; known: {', '.join([*FORMATS, TEXT])}.")
        return form
    number, record = first
    for name, known in FORMATS.items():
        if all(field in record for field in known.fields):
            return name
    fields = ", ".join(sorted(map(str, record))) or "none"
    raise PromptError(f"{path}, line {number}: the fields ({fields}) fit no known format: {', '.join(FORMATS)}.")


def _prompt(path: Path, number: int, record: Mapping[str, Any], form: str, name: str) -> Prompt:
    known = FORMATS[form]
    for field in known.fields:
        if field not in record:
            raise PromptError(f"{path}, line {number}: the field {field!r} of format {form} is missing.", field=field)
    turns = known.turns(record)
    if not isinstance(turns, list) or not turns or not all(isinstance(t, str) and t.strip() for t in turns):
        raise PromptError(f"{path}, line {number}: every prompt must be a text that is not empty.", field="turns")
    category = str(record.get(known.category) or name)
    return Prompt(str(record.get(known.id, number)), name, category, tuple(turns))


def _check_ids(path: Path, prompts: list[Prompt]) -> None:
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise PromptError(f"{path}: two prompts have the id {prompt.id!r}.", field="id")
        seen.add(prompt.id)
