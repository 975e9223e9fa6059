"""Prompt sets as they are published, told by their fields; wrong ones are answered with line and field."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from speculator.bench.prompts import PromptError, read_prompts

PUBLISHED: dict[str, tuple[dict[str, Any], tuple[str, ...], str, str]] = {
    "mt-bench": (
        {"question_id": 81, "category": "writing", "turns": ["Write.", "Shorter."], "reference": []},
        ("Write.", "Shorter."), "81", "writing",
    ),
    "humaneval": (
        {"task_id": "HumanEval/0", "prompt": "def f():\n", "entry_point": "f", "canonical_solution": "", "test": ""},
        ("def f():\n",), "HumanEval/0", "file",
    ),
    "gsm8k": ({"question": "How many?", "answer": "#### 4"}, ("How many?",), "1", "file"),
    "mbpp": (
        {"text": "Write a function.", "code": "", "task_id": 11, "test_list": [], "test_setup_code": ""},
        ("Write a function.",), "11", "file",
    ),
    "math-500": (
        {"problem": "Solve $x$.", "solution": "", "answer": "", "subject": "Algebra", "level": 2, "unique_id": "a/1"},
        ("Solve $x$.",), "a/1", "Algebra",
    ),
    "jsonl": ({"prompt": "Hello.", "category": "greeting"}, ("Hello.",), "1", "greeting"),
    "turns": ({"turns": ["Hello.", "Again."]}, ("Hello.", "Again."), "1", "file"),
}  # fmt: skip


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize("form", ["", "named"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_format_is_read(tmp_path: Path, name: str, form: str) -> None:
    record, turns, given, category = PUBLISHED[name]
    (prompt,) = read_prompts(write(tmp_path / "file.jsonl", record), name if form else "")
    assert (prompt.turns, prompt.id, prompt.category, prompt.set) == (turns, given, category, "file")


def test_a_packed_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "HumanEval.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(PUBLISHED["humaneval"][0]).encode()))
    assert read_prompts(path)[0].set == "HumanEval"


def test_other_line_separators_are_no_ends_of_lines(tmp_path: Path) -> None:
    path = tmp_path / "file.jsonl"
    path.write_text('{"prompt": "one\u2028two"}\r\n', encoding="utf-8")
    assert [p.turns for p in read_prompts(path)] == [("one\u2028two",)]


def test_a_text_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("First?\n\nSecond?\n")
    assert [p.turns for p in read_prompts(path)] == [("First?",), ("Second?",)]
    assert len(read_prompts(path, limit=1)) == 1


def test_the_open_set_has_six_categories_and_second_turns() -> None:
    prompts = read_prompts()
    assert Counter(p.category for p in prompts) == dict.fromkeys(
        ("chat", "math", "code", "writing", "facts", "rewriting"), 4
    )
    assert sum(len(p.turns) == 2 for p in prompts) >= 6


@pytest.mark.parametrize(
    ("lines", "form", "told"),
    [
        (['{"question": "a", "answer": "b"}', '{"question": "a"}'], "", "line 2: the field 'answer'"),
        (['{"question": "a", "answer": "b"}'], "mbpp", "line 1: the field 'task_id' of format mbpp"),
        (['{"colour": "red"}'], "", r"line 1: the fields \(colour\) fit no known format"),
        (['{"prompt": "a"}', "{"], "", "line 2: no whole JSON object"),
        (["[1]"], "", "line 1: a JSON object is expected"),
        (['{"prompt": " "}'], "", "line 1: every prompt must be a text"),
        (['{"turns": []}'], "", "line 1: every prompt must be a text"),
        (['{"prompt": "a", "id": 1}', '{"prompt": "b", "id": 1}'], "", "two prompts have the id '1'"),
        (["", " "], "", "holds no prompt"),
        (['{"prompt": "a"}'], "yaml", "no prompt format 'yaml'"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path: Path, lines: list[str], form: str, told: str) -> None:
    path = tmp_path / "file.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(PromptError, match=told):
        read_prompts(path, form)


def test_a_file_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="cannot be read"):
        read_prompts(tmp_path / "none.jsonl")
