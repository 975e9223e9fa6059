"""Where two reports begin to differ, told along one text, and what `bench compare` says of one report alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from report_samples import figures, full_report

from speculator.bench.compare import Comparison, compare, main, paired
from speculator.bench.plain import RecordError
from speculator.bench.records import Against, Counterfactual, PromptRow, Report, Shape, SweepPoint, write_report


def report(*reached: int, **settings: Any) -> Report:
    """Counterfactual chains of which the deepest reached these positions so many times out of 1000."""
    chains = tuple(Counterfactual(Shape(i + 1), "recorded", figures(reached[: i + 1])) for i in range(len(reached)))
    made = full_report()
    return replace(made, counterfactual=chains, settings=replace(made.settings, **settings), prompts=rows(600))


def rows(accepted: int) -> tuple[PromptRow, ...]:
    return tuple(
        PromptRow(str(i), "toy", "", 1, 9, 1000, 1000 + accepted + i, (1000, 1000), (accepted + i, accepted // 2))
        for i in range(8)
    )


@pytest.mark.parametrize(
    ("a", "b", "equal_to"),
    [
        ((700, 420, 210), (700, 420, 210), 3),
        ((700, 420, 210), (700, 300, 210), 1),
        ((700, 420, 210), (600, 420, 210), 0),
        ((700, 420), (700, 420, 210), 2),
        ((700, 420), (), None),
    ],
)
def test_chains_along_the_text_tell_where_the_difference_begins(
    a: tuple[int, ...], b: tuple[int, ...], equal_to: int | None
) -> None:
    assert compare(report(*a), report(*b)).equal_to == equal_to


@pytest.mark.parametrize("change", [{"temperature": 0.5}, {"seed": 9}, {"target": "another"}, {"max_tokens": 7}])
def test_other_texts_cannot_tell_it(change: dict[str, Any]) -> None:
    assert compare(report(700), report(700)).equal_to == 1
    assert compare(report(700), report(700, **change)).equal_to is None


def test_a_comparison_of_reports_is_that_of_their_prompts() -> None:
    one, other = report(700), replace(report(600), prompts=rows(300))
    found, of_rows = compare(one, other), paired(one.prompts, other.prompts)
    assert isinstance(found, Comparison) and (found.tau, found.survival) == (of_rows.tau, of_rows.survival)
    assert found.tau.significant and found.tau.difference == pytest.approx(-0.3)
    with pytest.raises(RecordError, match="share 2 prompts"):
        paired(one.prompts[:2], other.prompts)


def test_prompts_of_one_name_and_two_texts_are_not_paired() -> None:
    one = [replace(row, asked="aa") for row in rows(600)]
    assert paired(one, rows(600)).prompts == 8  # an older report does not say
    assert paired(one, one).prompts == 8
    with pytest.raises(RecordError, match="Prompt 3 of toy, turn 1, is another text in A than in B"):
        paired(one, [replace(row, asked="bb" if row.id == "3" else "aa") for row in rows(600)])


def test_served_and_loaded_weights_are_known_to_be_the_same() -> None:
    here = replace(report(700, target="/models/a/target"), provenance={"target_revision": "ab"})
    there = replace(report(700, target="a"), provenance={"target_revision": "ab"})
    assert compare(here, there).equal_to == 1 and compare(here, there).settings == ()
    other = replace(there, provenance={"target_revision": "cd"})
    assert compare(here, other).equal_to is None and compare(here, other).settings == ("target: ab against cd",)


def test_a_comparison_of_synthetic_runs_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    write_report(report(700), first)
    write_report(replace(report(700), synthetic=True), second)
    for pair, marked in (((first, first), False), ((first, second), True)):
        assert main([*map(str, pair), "--json", str(tmp_path / "c.json")]) == 0
        assert ("Synthetic run" in capsys.readouterr().out) is marked
        assert json.loads((tmp_path / "c.json").read_text())["synthetic"] is marked


@pytest.mark.parametrize(
    ("more", "told"), [(["--confidence", "95"], "between 0 and 1"), (["--json", "."], "it is a folder")]
)
def test_wrong_wishes_are_one_sentence(
    more: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_report(report(700), tmp_path / "a.json")
    assert main([str(tmp_path / "a.json"), str(tmp_path / "a.json"), *more]) == 2
    assert told in " ".join(capsys.readouterr().err.split())


def test_one_report_shows_its_sweep_in_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = SweepPoint(Shape(2), 0.0, "coupled", 0, figures((700, 420)), "eagle3", "eagle3")
    pair = Against(0, -0.25, (-0.3, -0.2), 0.0004, True, (1, 2))
    path = tmp_path / "a.json"
    write_report(replace(full_report(), sweep=(first, replace(first, head="other", against=(pair,)))), path)
    assert main([str(path), "--json", str(tmp_path / "pairs.json")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "-0.250" in said and "yes" in said and "1, 2" in said
    write_report(replace(full_report(), sweep=()), path)
    assert main([str(path)]) == 2
    assert "name a second report" in " ".join(capsys.readouterr().err.split())


def test_the_sentence_names_the_position(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, made in (("a", report(700, 420)), ("b", report(700, 300))):
        write_report(made, tmp_path / f"{name}.json")
    assert main([str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    assert "drafts begin to differ at position 2" in " ".join(capsys.readouterr().out.split())
    assert main([str(tmp_path / "a.json"), str(tmp_path / "a.json")]) == 0
    assert "all of the 2 positions" in " ".join(capsys.readouterr().out.split())
