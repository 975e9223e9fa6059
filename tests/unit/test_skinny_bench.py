"""How `speculator bench skinny` picks: candidates by a static model, choices by times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the static model asks the kernels for their shared memory")

from speculator.bench import skinny
from speculator.bench.skinny import Shape, Task, candidates, choice, estimate, fastest, fixed_choice, shapes_of
from target.products import TILES, Config, Table, default_config

SHAPE = Shape(4096, 4096)
NARROW, WIDE, SPLIT = Config(32, 256), Config(64, 128), Config(128, 128, 4)


def test_shapes_of_models_come_once() -> None:
    both = shapes_of(["llama-3.1-8b", "qwen3-8b"])
    assert len(both) == len(set(both)) == 8 and SHAPE in both


@pytest.mark.parametrize("shape", shapes_of(sorted(skinny.MODELS)))
def test_candidates_are_few_differ_in_kind_and_hold_the_default(shape: Shape) -> None:
    found = candidates(shape, 16)
    assert default_config(*shape) in found and 8 <= len(found) == len(set(found)) <= 17
    assert len({(config.block_n, config.split == 1) for config in found}) >= 4
    assert all(shape.k // config.split >= 512 for config in found if config.split > 1)
    assert all(min(estimate(config, shape, tile) for tile in TILES) < 1e-3 for config in found)


def test_the_model_knows_what_makes_a_kernel_slow() -> None:
    """Too little in flight, too few programs, more shared memory than there is, rows read by too many programs."""
    assert estimate(NARROW._replace(stages=2, block_k=16), SHAPE, 16) > 2 * estimate(NARROW, SHAPE, 16)
    assert estimate(Config(128, 128), SHAPE, 16) > 2 * estimate(Config(128, 128, 4), SHAPE, 16)
    assert estimate(Config(128, 256, stages=8), SHAPE, 64) == float("inf")
    assert estimate(Config(16, 128), SHAPE, 64) > estimate(SPLIT, SHAPE, 64)
    assert estimate(NARROW, SHAPE, 16) > SHAPE.bytes / skinny.BANDWIDTH


def times_of(*triples: tuple[Config, int, float]) -> dict[Task, float]:
    return {Task(SHAPE, tile, config): value for config, tile, value in triples}


def test_cublas_keeps_a_shape_unless_a_kernel_is_clearly_faster() -> None:
    times = times_of((NARROW, 16, 9.0), (SPLIT, 16, 8.0), (NARROW, 64, 20.0))
    best = fastest(times, 16)
    assert best is not None and best.config == SPLIT and fastest(times, 32) is None
    assert choice(best, times, 13.0) == SPLIT
    assert choice(best, times, 8.1) is None and choice(None, times, 13.0) is None


def test_the_fixed_order_loses_least_where_it_loses_most(monkeypatch: pytest.MonkeyPatch) -> None:
    times = times_of(
        *((NARROW, tile, value) for tile, value in zip(TILES, (8.0, 12.0, 30.0), strict=True)),
        *((SPLIT, tile, value) for tile, value in zip(TILES, (10.0, 11.0, 12.0), strict=True)),
        (WIDE, 16, 7.0),  # does not fit the largest tile
    )
    monkeypatch.setattr(skinny, "keeps_bits", lambda shape, config: True)
    assert fixed_choice(SHAPE, times) == SPLIT
    monkeypatch.setattr(skinny, "keeps_bits", lambda shape, config: config != SPLIT)
    assert fixed_choice(SHAPE, times) == NARROW
    monkeypatch.setattr(skinny, "keeps_bits", lambda shape, config: False)
    assert fixed_choice(SHAPE, times) == default_config(*SHAPE)


def test_what_is_written_is_a_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Pairs decide, not what a product takes alone; cuBLAS keeps what it wins there."""
    times = times_of(*((SPLIT, tile, 9.0) for tile in TILES), *((NARROW, tile, 8.0) for tile in TILES[:2]))
    pairs = times_of(*((SPLIT, tile, 9.0) for tile in TILES), (NARROW, 16, 9.5))
    monkeypatch.setattr(skinny, "keeps_bits", lambda shape, config: True)
    monkeypatch.setattr(skinny, "_figures", lambda shape, rows, chosen, fixed, pdl: {"rows": rows})
    entry = skinny.tuned(SHAPE, times, skinny.Pairs(pairs, {16: 13.0, 32: 8.0, 64: 13.0}), False)
    assert [p["cublas_us"] for p in entry["pairs"]] == [13.0, 8.0, 13.0]
    assert [p["us"] for p in entry["pairs"][0]["ours"]] == [9.0, 9.5]
    (tmp_path / "t.json").write_text(json.dumps({"device": "x", "provenance": {}, "shapes": [entry]}))
    table = Table.read(tmp_path / "t.json")
    assert table.fast(*SHAPE, 8) == table.fast(*SHAPE, 64) == table.fixed(*SHAPE) == SPLIT
    assert table.fast(*SHAPE, 32) is None


def test_what_starts_early_is_taken_where_pairs_gain_by_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    early = SPLIT._replace(pdl=True, ahead=128)
    times = times_of(*((SPLIT, tile, 9.0) for tile in TILES))
    pairs = times | times_of((early, 16, 8.0), (early, 64, 9.5), (early._replace(ahead=32), 16, 8.5))
    monkeypatch.setattr(skinny, "keeps_bits", lambda shape, config: True)
    monkeypatch.setattr(skinny, "_figures", lambda shape, rows, chosen, fixed, pdl: {"rows": rows})
    entry = skinny.tuned(SHAPE, times, skinny.Pairs(pairs, dict.fromkeys(TILES, 20.0)), True)
    (tmp_path / "t.json").write_text(json.dumps({"device": "x", "pdl": True, "shapes": [entry]}))
    read = Table.read(tmp_path / "t.json")
    on, off = Table("x", read.entries, pdl=True), Table("x", read.entries)
    assert on.fast(*SHAPE, 8) == on.fixed(*SHAPE) == early and on.fast(*SHAPE, 64) == SPLIT
    assert off.fast(*SHAPE, 8) == off.fixed(*SHAPE) == early._replace(pdl=False)


def test_finalists_are_timed_in_every_way_to_launch_them(monkeypatch: pytest.MonkeyPatch) -> None:
    others = [Config(16, 64, stages=s) for s in range(2, 7)]
    times = times_of(*((c, 16, 10.0 + i) for i, c in enumerate(others)), *((SPLIT, tile, 30.0) for tile in TILES))
    monkeypatch.setattr(skinny, "keeps_bits", lambda shape, config: True)
    plain = skinny.finalists(SHAPE, times, False)
    joined = SPLIT._replace(joined=True)
    assert [task.config for task in plain if task.tile == 16] == [*others[: skinny.FINALISTS], SPLIT, joined]
    assert [task.config for task in plain if task.tile == 64] == [SPLIT, joined]
    both = skinny.finalists(SHAPE, times, True)
    assert both[: len(plain)] == plain and len(both) == len(set(both)) == len(plain) * (1 + len(skinny.AHEAD))
    assert all(task.config.pdl for task in both[len(plain) :])


def test_without_a_gpu_the_bench_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert skinny.main([]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err
