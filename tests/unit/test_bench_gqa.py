"""The bench of grouped-query attention, as far as it needs no device: what is tuned and how a choice is made."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from speculator.bench import gqa


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
