"""A PNG of `speculator bench round`: each round as a bar of its ledger, its floor as a line, peers beside them.

Owns: the picture. Must never compute a figure; matplotlib is imported when it is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from speculator.bench.round_show import title
from speculator.errors import ConfigError

DPI, WIDTH, BAR, HEAD = 160, 9.0, 0.24, 1.4  # inches: the page, a bar, title and legend of a panel


def write_plot(report: Mapping[str, Any], path: Path) -> None:
    """Draw every shape of a report into one file; ConfigError when matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("PNG plots need matplotlib: pip install 'speculator[bench]'.") from error
    bars = [_bars(shape) for shape in report["shapes"]]
    heights = [HEAD + BAR * max(1, len(group)) for group in bars]
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    panels = figure.subplots(len(bars), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, shape, group in zip(panels, report["shapes"], bars, strict=True):
        _draw(axes, group)
        axes.set_title(f"{shape['shape']}, {shape['says']}", fontsize=8)
    about = report["provenance"]
    figure.suptitle(f"SYNTHETIC. {about['device']}, commit {about['commit']}", fontsize=8, color="firebrick")
    figure.savefig(path, dpi=DPI)


def _bars(shape: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What is drawn of a shape, top to bottom."""
    found = [
        {"name": f"target pass, {row['queries']} tokens, context {row['context']}", "floor": row["floor_ms"],
         "parts": {"a pass": row["ms"]}}
        for row in shape["passes"]
    ]  # fmt: skip
    for row in shape["rounds"]:
        if "ms" in row:
            parts = row.get("ledger_ms", {"a round": row["ms"]})
            found.append({"name": title(row), "floor": row["floor_ms"], "parts": parts})
    for row in shape["peers"]:
        if "ms" in row:
            what = f"{row['queries']} tokens" if "queries" in row else f"depth {row['depth']}, batch {row['rows']}"
            found.append({"name": f"{row['peer']}, {what}, context {row['context']}", "parts": {"a peer": row["ms"]}})
    return found


def _draw(axes: Any, bars: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(part for bar in bars for part in bar["parts"]))
    for number, part in enumerate(names):
        values = [bar["parts"].get(part, 0.0) for bar in bars]
        below = [_before(bar["parts"], part, names) for bar in bars]
        axes.barh(range(len(bars)), values, left=below, label=part, color=f"C{number}")
    for place, bar in enumerate(bars):
        if "floor" in bar:
            axes.plot([bar["floor"]] * 2, [place - 0.45, place + 0.45], color="black", linewidth=1.5)
    axes.plot([], [], color="black", linewidth=1.5, label="floor")
    axes.set_yticks(range(len(bars)), [bar["name"] for bar in bars], fontsize=6)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds", fontsize=7)
    beneath = -0.02 - 1.2 / (3 + len(bars))
    axes.legend(fontsize=6, ncols=len(names) + 1, loc="upper center", bbox_to_anchor=(0.4, beneath))


def _before(parts: Mapping[str, float], part: str, names: list[str]) -> float:
    return sum(parts.get(name, 0.0) for name in names[: names.index(part)])
