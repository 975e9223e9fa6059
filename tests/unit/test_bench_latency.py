"""Whose tokens a second are compared with whose, and that a text that differs is said to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from speculator.bench.latency import Timed, figures, main
from speculator.errors import ConfigError
from tests.e2e.tiny_pair import make_pair


def test_a_ratio_is_the_median_over_repeats_of_pairs_and_not_of_medians() -> None:
    plain = [Timed(seconds, 100, 0.0, 10) for seconds in (1.0, 2.0, 4.0)]
    drafts = [Timed(seconds, 100, 0.0, 10) for seconds in (1.0, 1.0, 1.0)]
    row = figures({"plain": [[1]], "d": [[1]]}, {"plain": plain, "d": drafts})["variants"]["d"]
    assert row["ratio_to_plain"] == 2.0 and row["ratios"] == [1.0, 2.0, 4.0]
    crossed = {"plain": plain, "d": [Timed(2.0, 100), Timed(0.5, 100), Timed(1.0, 100)]}
    assert figures({"plain": [[1]], "d": [[1]]}, crossed)["variants"]["d"]["ratios"] == [0.5, 4.0, 4.0]


def test_without_prefill_the_first_pieces_do_not_count() -> None:
    plain, drafts, whole = Timed(3.0, 21, 1.0, 1), Timed(2.5, 21, 1.5, 1), Timed(2.0, 21, 2.0, 21)
    rows = figures({n: [[1]] for n in "abc"} | {"plain": [[1]]}, {"plain": [plain], "a": [drafts], "b": [whole]})
    assert rows["variants"]["a"]["ratio_without_prefill"] == 2.0
    assert rows["variants"]["a"]["ratio_to_plain"] == 1.2
    assert rows["variants"]["b"]["ratio_without_prefill"] is None


def test_variants_of_another_length_are_compared_by_rate_and_named() -> None:
    timed = {"plain": [Timed(1.0, 100)], "d": [Timed(1.0, 50)]}
    row = figures({"plain": [[1, 2]], "d": [[1]]}, timed)["variants"]["d"]
    assert row["ratio_to_plain"] == 0.5 and row["same_text"] is False


@pytest.mark.parametrize("asked", [["--tokens", "0"], ["--repeats", "0"], ["--depths", "3", "0"]])
def test_nothing_to_time_is_refused(asked: list[str]) -> None:
    with pytest.raises(ConfigError, match="must be at least 1"):
        main(asked)


def test_a_pair_is_timed_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = make_pair(tmp_path / "tiny")
    words = ["--target", str(pair.target), "--head", str(pair.head), "--limit", "2", "--tokens", "9", "--depths", "2"]
    words += ["--repeats", "2", "--no-transformers", "--threads", "1", "--json", str(tmp_path / "out.json")]
    assert main(words) == 0
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["prompts"] == 2 and 2 <= report["tokens"] <= 18
    assert set(report["variants"]) == {"plain", "chain 2"}
    assert report["variants"]["chain 2"]["same_text"] is True and len(report["variants"]["plain"]["ratios"]) == 2
    assert "without prefill" in capsys.readouterr().out
