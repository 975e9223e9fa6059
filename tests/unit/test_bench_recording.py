"""Recordings: what a run writes down, and how an interrupted one goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from bench_toys import GREEDY, SAMPLED, Letters, lucky_engine, run, toy_prompts

from speculator.bench.measure import Bench, Wishes
from speculator.bench.outcomes import Outcome, count, judged, outcomes
from speculator.bench.plain import RecordError
from speculator.bench.prompts import Prompt, PromptError
from speculator.bench.recording import Answer, Recording, Round, read_recording
from speculator.bench.records import Settings, Shape
from speculator.bench.rounds import Plan, answer_seed
from speculator.engine import Engine
from speculator.local import generate
from speculator.types import DraftShape

CHAIN = DraftShape(4)
RECORDED = Settings("t", "h", "eagle3", Shape(4), 0.0, "coupled", 0, 8, 2)
SETTINGS = {"temperature": 0.0, "depth": 4}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return lucky_engine()


def answer(**changes: object) -> Answer:
    rounds = (
        Round(4, (5, 6, 7), (-1, 0, 1), (-0.1, -0.2, -0.3), (0, 1), (5, 6, 9), (-0.1,) * 3),
        Round(7, (1, 2, 3), (-1, 0, 1), (-0.1, -0.2, -0.3), (0, 1, 2), (1, 2, 3, 4), (-0.1,) * 4),
    )
    made = Answer("a", "toy", "x", 1, 0, (1, 2, 3), (8, 5, 6, 9, 1, 2), True, rounds)
    return replace(made, **changes)  # type: ignore[arg-type]


def test_what_lies_past_the_end_counts_for_nothing() -> None:
    assert outcomes(answer()) == [Outcome(4, 3, 2, 3), Outcome(7, 2, 2, 2)]  # the end is at 9
    assert count(7, 9, 3, 0) == Outcome(7, 2, 0, 1)
    assert count(4, 9, 0, 0) == Outcome(4, 0, 0, 1)


def test_judged_are_drafts_whose_predecessors_were_accepted() -> None:
    found = [[(j.depth, j.accepted) for j in judged(answer(), r)] for r in answer().rounds]
    assert found == [[(1, True), (2, True), (3, False)], [(1, True), (2, True)]]
    tree = Round(4, (5, 6, 7), (-1, -1, 0), (-0.1,) * 3, (1,), (6, 9), (0.0,) * 2)
    assert [(j.depth, j.accepted) for j in judged(answer(), tree)] == [(1, False), (1, True)]


@pytest.mark.parametrize("params", [GREEDY, SAMPLED])
def test_answers_are_those_of_plain_decoding(engine: Engine, params: object) -> None:
    for one in run(engine, params, CHAIN):  # type: ignore[arg-type]
        plain = generate(engine, one.prompt, 60, replace(params, seed=one.seed))  # type: ignore[type-var]
        assert [t for step in plain for t in step] == list(one.tokens)
        assert sum(o.tokens for o in outcomes(one)) == len(one.tokens) - 1


def test_the_second_turn_is_asked_after_the_own_answer(engine: Engine) -> None:
    first, second = (a for a in run(engine, GREEDY, CHAIN) if a.id == "1")
    said = [*toy_prompts()[1].turns]
    spoken = [said[0], Letters().decode(first.tokens), said[1]]
    assert list(second.prompt) == Letters().encode_chat("|".join(spoken))


def test_an_answer_ends_with_its_end_mark(engine: Engine) -> None:
    whole = run(engine, GREEDY, CHAIN)[0]
    mark = whole.tokens[20]
    cut = run(engine, GREEDY, CHAIN, ends=frozenset({mark}))[0]
    assert cut.stopped and cut.tokens == whole.tokens[: whole.tokens.index(mark) + 1]


def test_prompts_do_not_share_noise() -> None:
    keys = [("toy", "1", 1), ("toy", "1", 2), ("toy", "2", 1), ("toys", "1", 1)]
    assert len({answer_seed(seed, key) for seed in (0, 1) for key in keys}) == 8


def test_prompts_without_room_are_noted_and_none_at_all_is_one_sentence(engine: Engine) -> None:
    long = Prompt("long", "toy", "x", ("word " * 400,))
    plan, wishes = Plan(GREEDY, CHAIN, 8, 2), Wishes(timed=1, resamples=0)
    bench = Bench(engine, Letters(), [long, toy_prompts()[0]], wishes, lambda answers, total, label: answers)
    assert [answer.id for answer in bench.run(plan)] == ["0"]
    assert bench.notes == ["toy long, turn 1 left out: 2000 tokens."]
    assert bench.report(plan, RECORDED, {}, None, False).overall.prompts == 1
    bench = Bench(engine, Letters(), [long], wishes, lambda answers, total, label: answers)
    with pytest.raises(PromptError, match="leaves room"):
        bench.report(plan, RECORDED, {}, None, False)


def play(
    engine: Engine, path: Path, count: int = 6, settings: dict[str, object] = SETTINGS
) -> tuple[list[Answer], Bench]:
    bench = Bench(engine, Letters(), toy_prompts(count), Wishes(), lambda answers, total, label: answers)
    with Recording(path, settings) as recording:
        before = len(recording.answers)
        answers = bench.run(Plan(GREEDY, CHAIN, 30, 4), recording)
        bench.notes.append(f"{len(recording.answers) - before} played")
    return answers, bench


def test_a_cut_recording_is_gone_on_with(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    whole, _ = play(engine, path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:5]) + lines[5][:40])
    again, bench = play(engine, path)
    assert [replace(a, rounds=()) for a in again] == [replace(a, rounds=()) for a in whole]
    assert [outcomes(a) for a in again] == [outcomes(a) for a in whole]
    assert any("last line was cut" in note for note in bench.notes)
    assert f"{len(whole) - 4} played" in bench.notes
    assert len(read_recording(path)[1]) == len(whole)
    assert play(engine, path)[1].notes == ["0 played"]


def test_a_recording_of_other_settings_is_refused(engine: Engine, tmp_path: Path) -> None:
    play(engine, tmp_path / "run.jsonl", 1)
    with pytest.raises(RecordError, match="recorded with depth 4, not 5"):
        play(engine, tmp_path / "run.jsonl", 1, {**SETTINGS, "depth": 5})


def test_a_recording_of_other_texts_is_refused(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play(engine, tmp_path / "run.jsonl", 2)
    changed = [replace(prompt, turns=("another question", *prompt.turns[1:])) for prompt in toy_prompts(2)]
    monkeypatch.setitem(globals(), "toy_prompts", lambda count: changed[:count])
    with pytest.raises(RecordError, match="prompt . of toy was another text when it was recorded"):
        play(engine, tmp_path / "run.jsonl", 2)


def test_a_recording_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordError, match="cannot be written"):
        Recording(tmp_path / "file" / "run.jsonl", SETTINGS)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("hello\n", "line 1: no whole JSON object"),
        ('{"format": "other"}\n', "line 1: the field format"),
        (
            '{"format": "speculator/recording-1", "settings": {}}\n{"id": 3}\n',
            "line 2: the field set is missing|line 2: id",
        ),
        ("{", "line 1: no recording"),
    ],
)
def test_a_broken_recording_names_its_line(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "run.jsonl").write_text(text)
    with pytest.raises(RecordError, match=told):
        read_recording(tmp_path / "run.jsonl")
