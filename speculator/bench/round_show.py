"""The report of `speculator bench round` as tables on a terminal.

Owns: columns and titles, and that each of them says what is synthetic. Must never compute a figure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

TIMES = ("ms", "floor_ms", "of_floor")
WIDE = 150  # columns, where no terminal says how many there are
WORDS = ("round", "peer", "error", "drafts", "way", "first", "accepted")

Tables = Iterable[tuple[str, Sequence[str], Sequence[Mapping[str, Any]]]]  # title, columns, rows


def show(report: Mapping[str, Any]) -> None:
    """Print a report."""
    console = _console()
    console.print(report["provenance"])
    for shape in report["shapes"]:
        _show_shape(shape, console)


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=WIDE)


def show_tables(provenance: Mapping[str, Any], title: str, bandwidth: float | None, tables: Tables) -> None:
    """Print one shape's tables under their title; `bandwidth` in TB/s, None where it was not measured."""
    console = _console()
    console.print(provenance)
    _show_tables(title, bandwidth, tables, console)


def _show_tables(title: str, bandwidth: float | None, tables: Tables, console: Console) -> None:
    console.print(f"\n[bold]{title}[/]")
    if bandwidth is not None:
        console.print(f"copy bandwidth in this run: {bandwidth:.2f} TB/s")
    for name, columns, rows in tables:
        if rows:
            console.print(_table(name, columns, rows))


def _show_shape(shape: Mapping[str, Any], console: Console) -> None:
    rounds = [{"round": title(row), **row} for row in shape["rounds"]]
    ledgers = [{"round": row["round"], **row["ledger_ms"]} for row in rounds if "ledger_ms" in row]
    told = ("committed", "tokens_per_second", "replayed", "host_us", "error")
    peers = ("peer", "depth", "queries", "rows", "context", "ms", "ours_ms", "ratio", "error")
    paces = ("accept", "rows", "context", "plain_tok_s", "policy_tok_s", "ratio", "drafts", "error")
    tables = (
        ("target pass, one row", ("queries", "context", *TIMES), shape["passes"]),
        ("rounds (synthetic)", ("round", *TIMES, *told), rounds),
        ("ledger of a round, ms (synthetic)", tuple(ledgers[0]) if ledgers else (), ledgers),
        ("the depth policy beside plain decoding (synthetic)", paces, shape["policy"]),
        ("peers in the same run (synthetic)", peers, shape["peers"]),
    )
    words = f"{shape['shape']} on {shape['device']}, {shape['says']}"
    _show_tables(words, shape["bandwidth_tb_s"], tables, console)


def title(row: Mapping[str, Any]) -> str:
    """What a timed round was."""
    return f"{row['draft']}, graphs {row['graphs']}, batch {row['rows']}, context {row['context']}"


def _table(title: str, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> Table:
    table, listed = Table(title=title, title_justify="left"), list(rows)
    used = [column for column in columns if any(column in row for row in listed)]
    for column in used:
        table.add_column(column, justify="left" if column in WORDS else "right", overflow="fold")
    for row in listed:
        table.add_row(*(str(row.get(column, "")) for column in used))
    return table
