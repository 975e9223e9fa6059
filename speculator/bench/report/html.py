"""One self-contained HTML page from an acceptance report: no script, nothing loaded, light and dark.

Owns: the order of the page and its words. Must never compute a figure; every text from the report is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from speculator.bench.records import Report
from speculator.bench.report import charts
from speculator.bench.report.style import STYLE
from speculator.bench.report.tables import Table, reference_tables, tables
from speculator.bench.report.words import SYNTHETIC, Headline, headlines, means, sampling_text, shape_text, subject

WORDS = frozenset({"Settings", "Provenance", "What others call it"})  # tables of words, not of figures
NARROW = 4  # columns that fit half of the page


def page(report: Report) -> str:
    """The whole HTML document."""
    title = f"Acceptance of {subject(report.settings)}"
    body = "".join(
        (_head(report, title), _tiles(report), _notes(report), _charts(report), _tables(report), _reference(report))
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body><main>{body}</main></body></html>\n"
    )


def _head(report: Report, title: str) -> str:
    chosen, figures = report.settings, report.overall
    run = f"{shape_text(chosen.shape)}, {sampling_text(chosen.temperature, chosen.rule)}, engine {report.engine}"
    size = f"{figures.prompts} prompts, {figures.rounds} rounds, {figures.tokens} tokens"
    lines = f'<h1>{escape(title)}</h1><p class="soft">{escape(run)}. {escape(size)}.</p>'
    return lines + (f'<div class="warning" role="note">{escape(SYNTHETIC)}</div>' if report.synthetic else "")


def _tiles(report: Report) -> str:
    level = f"{100 * report.settings.confidence:.0f} %"
    made = "".join(_tile(headline) for headline in headlines(report))
    note = f"Ranges are {level} bootstrap intervals over prompts: what another draw of prompts could have given."
    below = f'<p class="note">{escape(note)}</p>' if report.settings.resamples else ""
    return f'<section class="tiles">{made}</section>{below}'


def _tile(headline: Headline) -> str:
    interval = f'<div class="interval soft">{escape(headline.interval)}</div>' if headline.interval else ""
    figure = f'<div class="soft">{escape(headline.name)}</div><div class="figure">{escape(headline.value)}</div>'
    return f'<div class="tile">{figure}{interval}<p class="soft">{escape(headline.means)}</p></div>'


def _notes(report: Report) -> str:
    items = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    return f'<section class="card"><h2>To know</h2><ul>{items}</ul></section><br>' if items else ""


# ---- charts ----


def _charts(report: Report) -> str:
    cards = [
        ("Survival", "survival", charts.survival(report)),
        ("Conditional acceptance", "conditional", charts.conditional(report)),
        ("Accepted tokens a round", "histogram", charts.histogram(report)),
        ("Accept length by depth", "depths", charts.depths(report)),
        ("Sweep", "sweep", charts.sweep(report)),
    ]
    if report.calibration is not None:
        cards.insert(3, ("Calibration", "calibration", charts.calibration(report.calibration)))
    if report.time is not None:
        cards.insert(4, ("Where a round goes", "ledger", charts.ledger(report.time)))
    return f'<section class="cards">{"".join(_chart(report, *card) for card in cards if card[2])}</section>'


def _chart(report: Report, title: str, key: str, picture: str) -> str:
    caption = f"<figcaption>{escape(means(report, key))}</figcaption>"
    return f'<figure class="card"><h2>{escape(title)}</h2>{caption}{picture}</figure>'


# ---- tables ----


def _tables(report: Report) -> str:
    return f'<br><section class="cards">{"".join(_table(table) for table in tables(report))}</section>'


def _reference(report: Report) -> str:
    terms = "".join(f"<dt>{escape(key)}</dt><dd>{escape(text)}</dd>" for key, text in report.definitions.items())
    defined = f'<div class="card"><h2>Definitions</h2><dl>{terms}</dl></div><br>' if terms else ""
    listed = "".join(_table(table) for table in reference_tables(report))
    summary = "<summary>Definitions, names in other engines, settings, provenance</summary>"
    return f'<details open>{summary}<br>{defined}<section class="cards">{listed}</section></details>'


def _table(table: Table) -> str:
    head = _row("th", table.header)
    rows = "".join(_row("td", row) for row in table.rows)
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    kind = ' class="words"' if table.title in WORDS else ""
    whole = f'<div class="scroll"><table{kind}><thead>{head}</thead><tbody>{rows}</tbody></table></div>'
    size = "card wide" if len(table.header) > NARROW else "card"
    return f'<div class="{size}"><h2>{escape(table.title)}</h2>{note}{whole}</div>'


def _row(tag: str, cells: Iterable[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"
