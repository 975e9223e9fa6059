"""vLLM's per-request acceptance records as an acceptance report, so that engines can be compared.

Owns: the format `metrics.speculative_decoding` of vLLM's responses (`--per-request-spec-decode-metrics summary` or
`detailed`, PR 48915; not in 0.28, documented for 0.32; experimental there) and what it leaves open. Must never compute
a figure. Accepted are a JSON list or one JSON value a line: completions, chat completions, their streamed chunks
(`data: ...`), lines of `vllm run-batch`, or the bare records.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from speculator.bench.figures import Counted, figures, prompt_rows
from speculator.bench.outcomes import Outcome
from speculator.bench.outputs import unreadable
from speculator.bench.plain import RecordError, from_json
from speculator.bench.recording import Answer
from speculator.bench.records import SCHEMA, PromptRow, Report, Settings, Shape

WHERE = "metrics.speculative_decoding"
RESAMPLES = 2000
FORMAT = f"vLLM {WHERE} (PR 48915)"
PAST_THE_END = (
    "vLLM counts drafted tokens that the target agreed with past the end of an answer as accepted; they could not be "
    "taken out of requests without per-step arrays and usage.completion_tokens, which raises tau a little."
)
FULL_DRAFTS = (
    "Some requests have totals only and drafted less than num_spec_tokens a step: every draft of theirs is "
    "taken as full, so acceptance rates are lower bounds. Start vLLM with --per-request-spec-decode-metrics detailed."
)


@dataclass(frozen=True, slots=True)
class Spec:
    """One record, field by field as vLLM writes it; `mean_acceptance_length` and the rate follow from the others."""

    acceptance_histogram: tuple[int, ...]
    num_spec_steps: int
    num_accepted_draft_tokens: int
    num_draft_tokens: int
    num_spec_tokens: int
    mean_acceptance_length: float | None = None
    draft_acceptance_rate: float | None = None
    per_step_accepted: tuple[int, ...] | None = None
    per_step_drafted: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a server: its record and what its response says of it. Counts are None where it says nothing."""

    id: str
    spec: Spec
    model: str = ""
    fingerprint: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """What a response does not say of its run: names ("" takes the model's own), sampling, and made-up acceptance."""

    temperature: float
    target: str = ""
    head: str = ""
    synthetic: bool = False  # the server ran with synthetic acceptance (rejection_sample_method)


@dataclass(frozen=True, slots=True)
class Imported:
    """The requests of a file with their rounds, and `notes` on what the records could not say."""

    requests: Sequence[Request]
    counted: Sequence[Counted]
    depth: int
    notes: Sequence[str]


def read_requests(path: Path) -> Imported:
    """Reads a file; RecordError names the line and the field that is wrong, or says that no record is inside."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(unreadable(path, error)) from None
    found = [(place, _request(value, f"{path} {place}", place)) for place, value in _values(text, path)]
    requests = [request for _, request in found if request is not None]
    if not requests:
        raise RecordError(
            f"{path} holds no {WHERE}: start vLLM with --per-request-spec-decode-metrics detailed and a draft model",
            field=WHERE,
        )
    depth = max(request.spec.num_spec_tokens for request in requests)
    counted = [_counted(request, path.stem) for request in requests]
    return Imported(requests, counted, depth, _notes(requests, len(found) - len(requests)))


# ---- the file ----


def _values(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    whole = _whole(text)
    if whole is not None:
        values = whole if isinstance(whole, list) else [whole]
        yield from ((f"item {i + 1}", value) for i, value in enumerate(values))
        return
    for i, line in enumerate(text.splitlines()):
        line = line.strip().removeprefix("data:").strip()
        if line and line != "[DONE]" and not line.startswith(":"):
            yield f"line {i + 1}", _json(line, f"{path} line {i + 1}")


def _whole(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None


def _json(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise RecordError(f"{where} is no whole JSON value: {error.msg} at column {error.colno}") from None


def _request(value: Any, where: str, place: str) -> Request | None:
    """A request, or None for a response without a record: n > 1, or a chunk that is not the last."""
    if not isinstance(value, dict):
        raise RecordError(f"{where} must be an object, not {type(value).__name__}")
    name = str(value.get("custom_id") or "")
    value = _body(value)
    metrics = value if "acceptance_histogram" in value else _inner(value, "metrics").get("speculative_decoding")
    if metrics is None:
        return None
    usage = _inner(value, "usage")
    return Request(
        id=name or str(value.get("id") or place),
        spec=_spec(metrics, where),
        model=str(value.get("model") or ""),
        fingerprint=str(value.get("system_fingerprint") or ""),
        prompt_tokens=_tokens(usage, "prompt_tokens", where),
        completion_tokens=_tokens(usage, "completion_tokens", where),
    )


def _body(value: Mapping[str, Any]) -> Mapping[str, Any]:
    return _inner(_inner(value, "response"), "body") or value


def _inner(value: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = value.get(key)
    return found if isinstance(found, dict) else {}


def _tokens(usage: Mapping[str, Any], name: str, where: str) -> int | None:
    value = usage.get(name)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise RecordError(f"{where}: the field usage.{name} must be a count, not {value!r}", field=f"usage.{name}")
    return value


def _spec(value: Any, where: str) -> Spec:
    try:
        spec = from_json(Spec, value, WHERE)
    except RecordError as error:
        raise RecordError(f"{where}: {error.message}", field=error.field) from None
    _check(spec, where)
    return spec


def _check(spec: Spec, where: str) -> None:
    counts = spec.acceptance_histogram
    accepted = sum(j * count for j, count in enumerate(counts))
    _agree(sum(counts) == spec.num_spec_steps, "num_spec_steps", where)
    _agree(accepted == spec.num_accepted_draft_tokens, "num_accepted_draft_tokens", where)
    _agree(len(counts) <= spec.num_spec_tokens + 1, "num_spec_tokens", where)
    if (steps := _steps(spec)) is not None:
        drafted = [d for _, d in steps]
        same = sorted(a for a, _ in steps) == sorted(j for j, count in enumerate(counts) for _ in range(count))
        _agree(same and len(steps) == len(spec.per_step_accepted or ()), "per_step_accepted", where)
        fits = all(0 <= a <= d <= spec.num_spec_tokens for a, d in steps)
        _agree(fits and sum(drafted) == spec.num_draft_tokens, "per_step_drafted", where)


def _agree(fits: bool, name: str, where: str) -> None:
    if not fits:
        field = f"{WHERE}.{name}"
        raise RecordError(f"{where}: the field {field} does not agree with the other counts of its record", field=field)


# ---- rows ----


def _steps(spec: Spec) -> list[tuple[int, int]] | None:
    """Pairs (accepted, drafted), one a verification step; None without the arrays."""
    if spec.per_step_accepted is None or spec.per_step_drafted is None:
        return None
    return list(zip(spec.per_step_accepted, spec.per_step_drafted, strict=False))


def _outcomes(request: Request) -> list[Outcome]:
    """The rounds of a request. Without arrays their order is that of the histogram, and every draft is a full one."""
    spec = request.spec
    steps = _steps(spec)
    if steps is None:
        steps = [(j, spec.num_spec_tokens) for j, count in enumerate(spec.acceptance_histogram) for _ in range(count)]
        return [Outcome(0, drafted, accepted, accepted + 1) for accepted, drafted in steps]
    whole = [Outcome(0, drafted, accepted, accepted + 1) for accepted, drafted in steps]
    return whole if request.completion_tokens is None else _ended(whole, request.completion_tokens - 1)


def _ended(rounds: list[Outcome], committed: int) -> list[Outcome]:
    """Rounds without what the last one drafted and accepted past the end of the answer.

    `committed` tokens came after the first one, which prefill made. Steps that drafted nothing are not in the arrays,
    so with fewer tokens than committed the last round need not be the end.
    """
    excess = sum(one.tokens for one in rounds) - committed
    if excess < 0 or not rounds:
        return rounds
    last = rounds[-1]
    room = max(0, last.tokens - excess)
    return [*rounds[:-1], Outcome(0, min(last.drafted, room), min(last.accepted, room), room)]


def _counted(request: Request, name: str) -> Counted:
    answer = Answer(request.id, name, "", 1, 0, prompt=(), tokens=(), stopped=False, rounds=())
    return answer, _outcomes(request)


def _rows(found: Imported) -> tuple[PromptRow, ...]:
    rows = prompt_rows(found.counted, found.depth)
    pairs = zip(rows, found.requests, strict=True)
    return tuple(replace(row, context=request.prompt_tokens or 0) for row, request in pairs)


def _notes(requests: Sequence[Request], without: int) -> list[str]:
    notes = [f"Imported from {FORMAT}; rounds are vLLM's verification steps with at least one drafted token."]
    if without:
        notes.append(f"{without} values without a record (n > 1, or chunks before the last) are not counted.")
    if any(_steps(request.spec) is None or request.completion_tokens is None for request in requests):
        notes.append(PAST_THE_END)
    if any(_steps(one.spec) is None and _shortened(one.spec) for one in requests):
        notes.append(FULL_DRAFTS)
    return notes


def _shortened(spec: Spec) -> bool:
    return spec.num_draft_tokens < spec.num_spec_steps * spec.num_spec_tokens


# ---- the report ----


def read_vllm(path: Path, asked: Asked) -> Report:
    """A report from a file of responses; what they do not say is told by `asked`. Raises as `read_requests`."""
    found = read_requests(path)
    overall = figures(found.counted, found.depth, RESAMPLES)
    made = _named(found.requests, "model")
    settings = Settings(
        target=asked.target or made,
        head=asked.head,
        method=asked.head or "unknown",
        shape=Shape(found.depth),
        temperature=asked.temperature,
        rule="vllm",
        seed=0,
        max_tokens=max((request.completion_tokens or 0) for request in found.requests),
        batch=0,
        files=(str(path),),
        resamples=RESAMPLES,
    )
    origin = {"format": FORMAT, "file": str(path), "model": made, "fingerprint": _named(found.requests, "fingerprint")}
    return Report(
        schema=SCHEMA,
        engine="vllm",
        synthetic=asked.synthetic,
        provenance={key: value for key, value in origin.items() if value},
        settings=settings,
        temperature=asked.temperature,
        mean_tau=overall.tau,
        overall=overall,
        sets={path.stem: overall},
        prompts=_rows(found),
        notes=tuple(found.notes),
    )


def _named(requests: Sequence[Request], field: str) -> str:
    return ", ".join(sorted({getattr(request, field) for request in requests} - {""}))
