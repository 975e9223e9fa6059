"""The acceptance report for people: complete, escaped, self-contained, and honest about synthetic runs."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import pytest
from report_samples import figures, full_report, report
from rich.console import Console

from speculator.bench.plain import RecordError
from speculator.bench.records import Report, Shape, report_to_json, write_report
from speculator.bench.report import charts
from speculator.bench.report.command import main
from speculator.bench.report.heat import heat_grid
from speculator.bench.report.html import page
from speculator.bench.report.tables import by_position, tables
from speculator.bench.report.terminal import show
from speculator.bench.report.words import SYNTHETIC, headlines, seconds, share

VOID = {"meta", "br", "line", "polyline", "polygon", "circle", "rect"}


class Page(HTMLParser):
    """Checks that tags close in order, and collects text, tags and attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        assert self._open == [], f"not closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def terminal(made: Report) -> str:
    out = StringIO()
    show(made, Console(file=out, width=200))
    return out.getvalue()


@pytest.mark.parametrize("made", [report(), full_report()], ids=["small", "full"])
def test_the_page_is_whole_and_loads_nothing(made: Report) -> None:
    html = page(made)
    parsed = Page(html)
    assert not {"script", "link", "img", "iframe", "object"} & set(parsed.tags)
    assert not {"src", "href", "onload"} & {name for name, _ in parsed.attributes}
    assert not re.search(r"https?:|url\(|@import", html)
    assert "prefers-color-scheme: dark" in html


def test_every_part_of_a_full_report_is_on_the_page_and_in_the_terminal() -> None:
    made = full_report()
    parsed, printed = Page(page(made)), terminal(made)
    assert parsed.tags.count("svg") == 7
    for text in ("2.33", "2.23 to 2.43", "44.3 %", "1.15 x", "n-gram", "writing", "digits", "Noise floor", "abc123"):
        assert text in parsed.text and text in printed
    assert "Tokens per target pass, as this run defines it." in parsed.text  # the run's own words win
    assert "mean acceptance length" in parsed.text and "Two prompts were cut." in printed


def test_a_small_report_leaves_out_what_it_does_not_have() -> None:
    text = Page(page(report())).text
    for absent in ("Calibration", "Where a round goes", "Sweep", "Noise floor", "Speed-up", "Baselines", "None"):
        assert absent not in text
    assert not re.search(r"\bnan\b", text)


def test_an_empty_run_is_a_page_too() -> None:
    nothing = replace(figures(), rounds=0, tau=None, acceptance_rate=None, survival=(None,), conditional=(None,))
    made = replace(report(), overall=replace(nothing, histogram=(0,)), sets={})
    assert "–" in Page(page(made)).text and "–" in terminal(made)


def test_text_of_a_report_is_escaped() -> None:
    evil = '<script>alert("x")</script>&'
    made = full_report()
    settings = replace(made.settings, target=evil, head=evil, rule=evil, temperature=0.5, method=evil)
    made = replace(
        made,
        engine=evil,
        settings=settings,
        provenance={evil: evil},
        sets={evil: made.overall},
        groups={evil: {evil: made.overall}},
        notes=(evil,),
        definitions={"tau": evil, evil: evil},
        sweep=tuple(replace(point, head=evil) for point in made.sweep),
        baselines=tuple(replace(one, name=evil) for one in made.baselines),
        token_classes=tuple(replace(one, name=evil) for one in made.token_classes),
    )
    parsed = Page(page(made))
    assert "script" not in parsed.tags
    assert parsed.text.count(evil) >= 10
    assert "[bold]x" in terminal(replace(made, notes=("[bold]x[/bold]",)))  # rich's own marks are text as well


@pytest.mark.parametrize("synthetic", [True, False])
def test_every_output_says_when_a_run_is_synthetic(synthetic: bool) -> None:
    made = replace(full_report(), synthetic=synthetic)
    assert (SYNTHETIC in Page(page(made)).text) is synthetic
    assert ("Synthetic run" in terminal(made)) is synthetic


# ---- figures ----


def test_figures_stand_at_their_positions() -> None:
    table = by_position(report())
    assert [row[0] for row in table.rows] == ["1", "2", "3"]
    assert [row[1].split(" (")[0] for row in table.rows] == ["70.0 %", "42.0 %", "21.0 %"]
    assert [row[2].split(" (")[0] for row in table.rows] == ["70.0 %", "60.0 %", "50.0 %"]
    assert [row[4:] for row in table.rows] == [["700", "1000"], ["420", "1000"], ["210", "1000"]]


def test_lists_of_unequal_length_are_shown_as_far_as_they_go() -> None:
    made = replace(report(), overall=replace(report().overall, conditional=(0.7,), accepted_at=(700,)))
    assert by_position(made).rows[2][2] == "–"
    Page(page(made))


def test_marks_of_the_survival_chart_fall_with_survival() -> None:
    heights = [float(y) for y in re.findall(r'<circle[^>]*cy="([\d.]+)"', charts.survival(report()))]
    assert len(heights) == 3 and heights == sorted(heights)  # y grows downwards
    quarter = heights[1] - heights[0]
    assert quarter == pytest.approx((0.70 - 0.42) / (0.42 - 0.21) * (heights[2] - heights[1]), abs=0.3)


def test_parts_of_a_round_lie_side_by_side() -> None:
    time = full_report().time
    assert time is not None
    bars = [
        (float(x), float(w))
        for x, w in re.findall(r'<rect[^>]* x="([\d.]+)"[^>]*width="([\d.]+)"', charts.ledger(time))
    ]
    draft, verify, host, plain = bars
    assert verify[0] == pytest.approx(draft[0] + draft[1], abs=0.2)
    assert host[0] == pytest.approx(verify[0] + verify[1], abs=0.2)
    assert verify[1] == pytest.approx(2.5 * draft[1], rel=0.01)
    assert plain[1] == pytest.approx(time.tau * 0.004 / 0.008 * (draft[1] + verify[1] + host[1]), rel=0.01)


def test_runs_of_several_seeds_share_a_cell_of_the_heat_map() -> None:
    made = full_report()
    grid = heat_grid(made)
    assert (list(grid.rows), list(grid.columns)) == (["greedy", "T 1, coupled"], ["chain 1", "chain 2"])
    first = replace(made.sweep[0], figures=figures((300,)))
    assert heat_grid(replace(made, sweep=(first, *made.sweep[1:]))).values[0, 0] == pytest.approx((1.3 + 1.1) / 2)
    tree = replace(first, shape=Shape(5, 48, 8))
    assert "5 / 48 / 8" in heat_grid(replace(made, sweep=(tree,))).columns


def test_curves_of_trees_and_chains_are_told_apart() -> None:
    made = full_report()
    tree = replace(made, settings=replace(made.settings, shape=Shape(3, 20, 4)))
    assert "this head, chain" in charts.survival(made) and "this head, tree" in charts.survival(tree)
    assert "measured, tree" in charts.conditional(tree) and "theory of a chain" in charts.conditional(tree)


def test_headlines_bear_their_intervals() -> None:
    shown = {one.key: (one.value, one.interval) for one in headlines(full_report())}
    assert shown["tau"] == ("2.33", "2.23 to 2.43")
    assert shown["measured"] == ("1.15 x", "predicted 1.17")
    assert shown["recommended_depth"] == ("depth 3", "")


def test_numbers_in_words() -> None:
    assert (share(None), share(0.1234), seconds(0.00123), seconds(2e-5), seconds(3.0)) == (
        "–",
        "12.3 %",
        "1.23 ms",
        "20 µs",
        "3 s",
    )


def test_tables_have_as_many_cells_as_columns() -> None:
    for table in tables(full_report()):
        assert {len(row) for row in table.rows} == {len(table.header)}


# ---- the command ----


def test_the_command_writes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_report(full_report(), tmp_path / "r.json")
    assert main([str(tmp_path / "r.json"), "-o", str(tmp_path / "r.html")]) == 0
    assert (tmp_path / "r.html").read_text(encoding="utf-8") == page(full_report())
    assert "2.33" in capsys.readouterr().out


def test_wrong_files_are_named_in_one_sentence(tmp_path: Path) -> None:
    good = report_to_json(report())
    cases = {
        "cut.json": (json.dumps(good)[:200], "no whole JSON"),
        "other.json": ('{"a": 1}', "schema"),
        "old.json": (json.dumps({**good, "schema": "speculator/acceptance-0"}), "acceptance-0"),
        "type.json": (json.dumps({**good, "temperature": "hot"}), "temperature"),
        "list.json": ("[]", "schema"),
    }
    for name, (text, says) in cases.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        with pytest.raises(RecordError, match=says) as caught:
            main([str(tmp_path / name)])
        assert name in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(RecordError, match="missing.json"):
        main([str(tmp_path / "missing.json")])
