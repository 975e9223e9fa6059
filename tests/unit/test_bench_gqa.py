"""The bench of grouped-query attention, as far as it needs no device: shapes, wanted figures, how choices are made."""

from __future__ import annotations

from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_flash import eager, flash3, named_build
from test_gqa import scene

from speculator.bench import gqa


def asked(*options: str) -> list[gqa.Cell]:
    return gqa.cells(gqa._parser().parse_args(options))


def test_without_options_the_wanted_figures_are_the_table() -> None:
    cells = asked("--flash3", "somewhere")
    assert [(c.length, c.queries) for c in cells[:4]] == [(512, 8), (4096, 8), (32768, 8), (131072, 8)]
    assert [(c.length - c.queries, c.queries) for c in cells[4:]] == [
        (0, 512), (0, 2048), (0, 8192), (4096, 512), (4096, 2048), (4096, 8192)
    ]  # fmt: skip
    assert {c[:2] for c in cells} == {(64, 1)}


def test_with_options_the_table_is_their_product() -> None:
    assert len(asked("--batches", "1")) == 2 * 3 * 3
    assert asked("--pages", "64", "--batches", "2", "--lengths", "9", "--queries", "8", "16") == [
        gqa.Cell(64, 2, 9, 8)  # more queries than tokens there are not
    ]
    assert len(asked("--tune")) == 3 * 3 * 4


@pytest.mark.parametrize(
    ("length", "queries", "ours", "flash", "met"),
    [
        (512, 8, 8.0, 20.0, True), (512, 8, 8.1, 20.0, False), (4096, 8, 13.0, 9.0, True),
        (32768, 8, 50.0, 40.0, True), (32768, 8, 50.1, 40.0, False),
        (2048, 2048, 90.0, 70.0, True), (2048, 2048, 60.0, 70.0, False), (4096, 64, 1.0, 1.0, None),
    ],
)  # fmt: skip
def test_what_is_wanted_of_a_cell(length: int, queries: int, ours: float, flash: float, met: bool | None) -> None:
    times = {"ours": ours, "flash3": flash, "flash3_speed": flash / ours}
    found = gqa.wanted(gqa.Cell(64, 1, length, queries), times)
    assert found.get("met") is met


def test_without_the_peer_only_absolute_figures_are_held() -> None:
    assert "met" in gqa.wanted(gqa.Cell(64, 1, 512, 8), {"ours": 1.0})
    for length, queries in ((32768, 8), (2048, 2048)):
        assert gqa.wanted(gqa.Cell(64, 1, length, queries), {"ours": 1.0}) == {}


def test_the_verdict_counts_what_is_met_and_what_failed() -> None:
    rows: list[dict[str, Any]] = [
        {**gqa.Cell(64, 1, 512, 8)._asdict(), "flash3_speed": 1.2, "met": True},
        {**gqa.Cell(64, 1, 4096, 8)._asdict(), "flash3_speed": 0.9, "met": False},
        {**gqa.Cell(64, 1, 32768, 8)._asdict(), "error": "wrong by 1.0"},
    ]
    assert list(gqa.verdict(rows)) == [
        "queries 8: at least 0.90 of FlashAttention-3's speed (page 64, batch 1, length 4096)",
        "1 of 2 wanted figures met, 1 cells failed",
    ]


@pytest.mark.parametrize(("counts", "planned"), [([8], True), ([90], False)])
def test_rounds_are_timed_with_a_plan_and_prompts_without(
    counts: list[int], planned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each at its own splits, on results that are compared first."""
    calls: list[tuple[bool, int]] = []

    def forward(*given: Any) -> None:
        calls.append((given[29] is not None, given[30]))
        flash3(*given)

    named_build(monkeypatch)
    monkeypatch.setattr(torch.ops._vllm_fa3_C, "fwd", forward)
    monkeypatch.setattr(
        torch.ops._vllm_fa3_C, "get_scheduler_metadata", lambda *_: torch.ones(4, dtype=torch.int32), raising=False
    )
    monkeypatch.setattr(gqa, "microseconds", lambda call: 5.0 if call(1) is not None else 0.0)
    s = eager(scene([100], counts, dtype=torch.bfloat16))
    s.cache.layers[0].copy_(s.cache.layers[1].nan_to_num(0.5))
    f = gqa.Field(s.batch._replace(longest=100 + counts[0]), s.cache, s.q, s.k, s.v)
    found = gqa._flash3(f)
    splits = gqa.FLASH_SPLITS if planned else gqa.PROMPT_SPLITS
    assert found == {"flash3": 5.0, "flash3_splits": splits[0]}
    assert calls == [(planned, one) for one in splits for _ in range(2)]


def test_what_does_not_fit_is_left_out_in_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (1 << 30, 1 << 31))
    monkeypatch.setattr(gqa, "_cache", lambda cell: SimpleNamespace())
    monkeypatch.setattr(gqa, "field", lambda cell, cache: cell)
    args = gqa._parser().parse_args([])
    assert [cell.length for cell, _ in gqa._fields(args)] == [c.length for c in gqa.WANTED if c.length < 131072]
    assert "left out, too large for this device" in capsys.readouterr().out


def row(**times: float) -> dict[str, object]:
    return {"times": sorted(times.items(), key=lambda pair: pair[1])}


def test_the_best_single_choice_is_never_far_from_the_best_of_a_cell() -> None:
    rows = [row(a=10.0, b=12.0, c=30.0), row(a=40.0, b=22.0, c=20.0), row(a=8.0, b=8.0, c=8.0)]
    found = gqa.single_best(rows)  # type: ignore[arg-type]
    assert [name for name, _, _ in found] == ["b", "a", "c"]
    assert found[0][1:] == pytest.approx(((1.2 * 1.1) ** (1 / 3), 1.2))


def test_what_did_not_run_everywhere_is_no_single_choice() -> None:
    assert [name for name, _, _ in gqa.single_best([row(a=2.0, b=1.0), row(a=2.0)])] == ["a"]  # type: ignore[list-item]
    assert gqa.single_best([]) == []


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
def test_what_is_tried_differs_and_has_the_default_first(monkeypatch: pytest.MonkeyPatch) -> None:
    from target.kernels.gqa import pick

    monkeypatch.setattr(
        gqa, "_default", lambda c: pick(c.queries, c.heads, c.kv_heads, c.dim, torch.bfloat16, torch.device("cpu"))
    )
    for queries in gqa.TUNED[2]:
        cell = gqa.Cell(64, 8, 512, queries)
        for configs in (list(gqa._cuts(cell)), list(gqa._kernels(cell))):
            names = [gqa._name(config, configs[0]) for config in configs]
            assert len(set(names)) == len(names) and names[0] == gqa.DEFAULT and names.count(gqa.DEFAULT) == 1
        assert {config.shortest for config in gqa._cuts(cell)} == {1, 2, 4, 8}
        assert {config.parts for config in gqa._cuts(cell)} == {0, 1, 2, 4, 64}
