"""vLLM's per-request acceptance as a report: counts, ends of answers, intervals, and files that are something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from speculator.bench.plain import RecordError
from speculator.bench.records import PromptRow, read_report, report_from_json, report_to_json
from speculator.bench.report.command import main
from speculator.bench.vllm_import import FULL_DRAFTS, PAST_THE_END, Asked, read_requests, read_vllm
from speculator.errors import ConfigError

GREEDY = Asked(0.0)


def rows(path: Path) -> tuple[PromptRow, ...]:
    return read_vllm(path, GREEDY).prompts


def spec(
    accepted: list[int], drafted: list[int] | None = None, depth: int = 3, detailed: bool = True
) -> dict[str, Any]:
    """A record as vLLM writes it, from what each step accepted (and drafted; default: all of `depth`)."""
    drafted = drafted or [depth] * len(accepted)
    found: dict[str, Any] = {
        "mean_acceptance_length": 1 + sum(accepted) / max(1, len(accepted)),
        "draft_acceptance_rate": sum(accepted) / max(1, sum(drafted)),
        "acceptance_histogram": [accepted.count(j) for j in range(depth + 1)],
        "num_spec_steps": len(accepted),
        "num_accepted_draft_tokens": sum(accepted),
        "num_draft_tokens": sum(drafted),
        "num_spec_tokens": depth,
    }
    return {**found, "per_step_accepted": accepted, "per_step_drafted": drafted} if detailed else found


def response(record: dict[str, Any] | None, tokens: int | None = None, name: str = "cmpl-1") -> dict[str, Any]:
    usage = {} if tokens is None else {"usage": {"prompt_tokens": 11, "completion_tokens": tokens}}
    return {
        "id": name,
        "model": "big",
        "system_fingerprint": "vllm-0.32.0",
        **usage,
        "metrics": {"speculative_decoding": record},
    }


def saved(path: Path, *values: Any) -> Path:
    path.write_text("\n".join(json.dumps(value) for value in values), encoding="utf-8")
    return path


def test_the_example_of_the_documentation(tmp_path: Path) -> None:
    """docs.vllm.ai, features/speculative_decoding/acceptance_metrics, v0.32.0."""
    record = {
        "mean_acceptance_length": 1.2325581395348837,
        "draft_acceptance_rate": 0.07751937984496124,
        "acceptance_histogram": [39, 1, 0, 3],
        "num_spec_steps": 43,
        "num_accepted_draft_tokens": 10,
        "num_draft_tokens": 129,
        "num_spec_tokens": 3,
    }
    made = read_vllm(saved(tmp_path / "r.jsonl", response(record)), GREEDY)
    figures = made.overall
    assert figures.tau == pytest.approx(record["mean_acceptance_length"], abs=1e-6)
    assert figures.acceptance_rate == pytest.approx(record["draft_acceptance_rate"], abs=1e-6)
    assert figures.histogram == (39, 1, 0, 3)
    assert figures.survival == pytest.approx((4 / 43, 3 / 43, 3 / 43), abs=1e-6)
    assert figures.conditional == pytest.approx((4 / 43, 3 / 4, 1.0), abs=1e-6)
    assert made.engine == "vllm" and made.settings.target == "big" and made.provenance["fingerprint"] == "vllm-0.32.0"


def test_a_report_survives_its_own_file(tmp_path: Path) -> None:
    values = [response(spec([1, 2, 0]), 7, f"r{i}") for i in range(6)]
    made = read_vllm(saved(tmp_path / "r.jsonl", *values), GREEDY)
    assert report_from_json(json.loads(json.dumps(report_to_json(made)))) == made
    assert made.overall.intervals.tau == (2.0, 2.0)  # every prompt is the same


@pytest.mark.parametrize("form", ["list", "lines", "stream", "batch", "bare"])
def test_every_form_of_the_file_is_read(tmp_path: Path, form: str) -> None:
    first, second = spec([3, 0]), spec([1, 1])
    path = tmp_path / "r"
    if form == "list":
        path.write_text(json.dumps([response(first, 6, "a"), response(second, 5, "b")]))
    elif form == "stream":
        chunk = {"id": "a", "choices": [{}]}
        events = [f"data: {json.dumps(one)}" for one in (chunk, response(first, 6, "a"), response(second, 5, "b"))]
        path.write_text("\n\n".join([*events, "data: [DONE]"]))
    elif form == "batch":
        bodies = [response(first, 6, "x"), response(second, 5, "y")]
        saved(path, *({"custom_id": n, "response": {"body": body}} for n, body in zip("ab", bodies, strict=True)))
    else:
        saved(path, *([first, second] if form == "bare" else [response(first, 6, "a"), response(second, 5, "b")]))
    found = rows(path)
    assert [row.accepted_at for row in found] == [(1, 1, 1), (2, 0, 0)]
    assert [row.tokens for row in found] == [5, 4]
    assert form == "bare" or [row.id for row in found] == ["a", "b"]


def test_what_lies_past_the_end_of_an_answer_is_not_counted(tmp_path: Path) -> None:
    """6 tokens, 1 of them by prefill: the first step committed 4, so 1 of the second one's 3 is left."""
    whole = rows(saved(tmp_path / "a", response(spec([3, 2]), 8)))[0]
    cut = rows(saved(tmp_path / "b", response(spec([3, 2]), 6)))[0]
    assert (whole.tokens, whole.accepted_at, whole.drafted_at) == (7, (2, 2, 1), (2, 2, 2))
    last = rows(saved(tmp_path / "c", response(spec([3, 0]), 6)))[0]
    assert (last.tokens, last.accepted_at, last.drafted_at) == (5, (1, 1, 1), (2, 1, 1))
    assert (cut.tokens, cut.accepted_at, cut.drafted_at) == (5, (2, 1, 1), (2, 1, 1))


def test_steps_without_drafts_are_no_rounds(tmp_path: Path) -> None:
    row = rows(saved(tmp_path / "a", response(spec([1]), 30)))[0]
    assert (row.rounds, row.tokens) == (1, 2)


def test_drafts_of_changing_length_have_their_own_denominators(tmp_path: Path) -> None:
    made = read_vllm(saved(tmp_path / "a", response(spec([2, 1, 0], [3, 1, 1]), 20)), GREEDY)
    assert made.overall.drafted_at == (3, 1, 1)
    assert made.overall.acceptance == pytest.approx((2 / 3, 1.0, 0.0), abs=1e-6)
    assert made.overall.survival == pytest.approx((2 / 3, 1 / 3, 0.0), abs=1e-6)


def test_what_the_records_cannot_say_is_said(tmp_path: Path) -> None:
    detailed = read_requests(saved(tmp_path / "a", response(spec([1]), 3), response(None)))
    summary = read_requests(saved(tmp_path / "b", response(spec([1, 0], [3, 1], detailed=False), 4)))
    assert PAST_THE_END not in detailed.notes and any("1 values without" in note for note in detailed.notes)
    assert {PAST_THE_END, FULL_DRAFTS} <= set(summary.notes)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({**spec([1, 2]), "num_spec_steps": 3}, "num_spec_steps"),
        ({**spec([1, 2]), "num_accepted_draft_tokens": 9}, "num_accepted_draft_tokens"),
        ({**spec([1, 2]), "per_step_drafted": [0, 6]}, "per_step_drafted"),
        ({**spec([1, 2]), "per_step_accepted": [2, 2]}, "per_step_accepted"),
        ({**spec([1, 2]), "acceptance_histogram": "many"}, "acceptance_histogram"),
        ({**spec([1, 2]), "new_field": 1}, "new_field"),
    ],
)
def test_a_wrong_record_is_named_by_line_and_field(tmp_path: Path, value: dict[str, Any], says: str) -> None:
    path = saved(tmp_path / "r.jsonl", response(spec([1])), response(value))
    with pytest.raises(RecordError, match=f"line 2.*{says}"):
        read_requests(path)


def test_a_wrong_count_of_tokens_is_named(tmp_path: Path) -> None:
    value = response(spec([1]))
    with pytest.raises(RecordError, match=r"item 1.*usage\.completion_tokens"):
        read_requests(saved(tmp_path / "r", {**value, "usage": {"completion_tokens": "7"}}))


def test_files_that_are_something_else_are_refused(tmp_path: Path) -> None:
    cases = {"": "speculative_decoding", "{}": "speculative_decoding", '{"a": 1}\n{"b"': "line 2", "[1]": "item 1"}
    for text, says in cases.items():
        (tmp_path / "r").write_text(text)
        with pytest.raises(RecordError, match=says) as caught:
            read_requests(tmp_path / "r")
        assert "\n" not in str(caught.value)


def test_the_command_imports_and_marks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path / "r.jsonl", *(response(spec([1, 2, 0]), 7, f"r{i}") for i in range(6)))
    with pytest.raises(ConfigError, match="--temperature"):
        main([str(path), "--vllm"])
    out = tmp_path / "out.json"
    assert main([str(path), "--vllm", "--temperature", "0.7", "--synthetic", "--json", str(out)]) == 0
    made = read_report(out)
    assert made.synthetic and made.temperature == 0.7
    assert "Synthetic run" in capsys.readouterr().out
