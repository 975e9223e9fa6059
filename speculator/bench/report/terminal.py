"""An acceptance report in the terminal.

Owns: the order of what is printed. Must never compute a figure.
"""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from speculator.bench.records import Report
from speculator.bench.report.tables import Table, definitions, names, provenance, tables
from speculator.bench.report.words import SYNTHETIC, bracketed, headlines, sampling_text, shape_text, subject


def show(report: Report, console: Console) -> None:
    """Headline figures with what they mean, then every table, then where the run came from."""
    chosen = report.settings
    console.print(Text(f"Acceptance of {subject(chosen)}", style="bold"))
    console.print(
        Text(f"{shape_text(chosen.shape)}, {sampling_text(chosen.temperature, chosen.rule)}, {report.engine}")
    )
    if report.synthetic:
        console.print(Text(SYNTHETIC, style="bold yellow"))
    rows = [[one.name, bracketed(one.value, one.interval), one.means] for one in headlines(report)]
    level = f"({100 * chosen.confidence:.0f} % intervals over prompts)"
    console.print(grid(Table("Headline", level, ["figure", "value", "meaning"], rows), words=True))
    for table in tables(report):
        console.print(grid(table))
    for note in report.notes:
        console.print(Text(f"Note: {note}"))
    for table in (definitions(report), names(report), provenance(report)):
        if table.rows:
            console.print(grid(table, words=True))


def grid(table: Table, words: bool = False) -> Grid:
    title = f"{table.title} {table.note}" if words else table.title
    grid = Grid(title=Text(title), title_justify="left", box=box.SIMPLE, caption=None if words else Text(table.note))
    grid.caption_justify = "left"
    for i, name in enumerate(table.header):
        grid.add_column(Text(name), justify="left" if i == 0 or words else "right", overflow="fold")
    for row in table.rows:
        grid.add_row(*(Text(cell) for cell in row))
    return grid
