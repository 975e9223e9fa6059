"""`speculator bench hybrid`: bytes of states, rounds of an MTP head, and states beside those of plain decoding.

Owns: that its figures are what they say. Must never assert a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from speculator.bench import hybrid, hybrid_states
from speculator.bench.hybrid_states import WAYS, committed_states, states_of, traffic
from speculator.bench.synthetic import HYBRIDS, hybrid_engine
from speculator.engine import Engine
from speculator.errors import ConfigError
from target.config import parse_config
from target.states import StatePass

TINY = ["--device", "cpu", "--context", "16", "--rounds", "2", "--queries", "1", "4", "--state-rounds", "6"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def nano(rows: int = 2, context: int = 400) -> Engine:
    sets: dict[str, Any] = {"graphs.mode": "off", "engine.max_context": context, "engine.kv_tokens": rows * context}
    torch.manual_seed(0)
    return hybrid_engine("hybrid-nano", "cpu", rows, sets)


def test_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("speculator.bench.round_policy.SETTLE", 9)
    monkeypatch.setattr("speculator.bench.round_policy.ROUNDS", 8)
    path = tmp_path / "hybrid.json"
    assert hybrid.main([*TINY, "--batches", "1", "2", "--depths", "1", "2", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert [(row["rows"], row["queries"]) for row in found["passes"]] == [(1, 1), (1, 4), (2, 1), (2, 4)]
    assert all(row["as_arguments"] and row["ms"] > 0 and row["commit_ms"] > 0 for row in found["passes"])
    assert [row["ratio"] for row in found["passes"]][::2] == [1.0, 1.0]
    assert [row["depth"] for row in found["rounds"]] == [1, 2] and all(row["replayed"] for row in found["rounds"])
    assert found["rounds"][0]["committed"] == 2.0  # a chain of 1 whose draft is always accepted
    assert "depth" in found["policy"][0]["drafts"] and found["policy"][0]["ratio"] > 0
    assert [row["way"] for row in found["states"]] == list(WAYS) and found["states"][0]["equal"]
    assert "synthetic" in capsys.readouterr().out and found["provenance"]["commit"]


def test_bytes_by_hand() -> None:
    """32 value heads of 128 x 128 in float32 are 2 MiB; a snapshot a token would write that for each."""
    delta = parse_config(HYBRIDS["hybrid-4b"]).delta
    assert delta is not None and delta.channels == 8192 and len(delta.layers) == 24
    moved, past = traffic(delta, 1, 4, torch.bfloat16), 3 * 8192 * 2
    assert moved.pass_reads == moved.commit_writes == 2 * 2**20 + past
    assert moved.pass_writes == past + 4 * (8192 * 2 + (2048 + 4096 + 64) * 4)
    assert hybrid_states.snapshots(delta, 1, 4) == 8 * 2**20


def test_states_after_random_rounds_are_those_of_plain_decoding() -> None:
    found = committed_states(nano(), WAYS[0], 25, 3)
    assert found["equal"] and found["rounds"] == 25
    assert len(found["accepted"]) == 4 and all(found["accepted"])
    assert found["tokens"] == sum((i + 1) * count for i, count in enumerate(found["accepted"]))


def test_a_commit_of_one_token_too_many_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = StatePass.commit

    def greedy(self: StatePass, accepted: torch.Tensor | None = None) -> None:
        commit(self, None if accepted is None else torch.where(accepted == 2, 3, accepted))

    monkeypatch.setattr(StatePass, "commit", greedy)
    found = committed_states(nano(), WAYS[0], 25, 3)
    assert not found["equal"] and "of recurrent layer 0" in found["first"] and found["accepted"][1] == 1


def test_an_engine_is_as_before() -> None:
    engine = nano()
    passes = engine.passes
    committed_states(engine, WAYS[1], 3, 2)
    assert engine.passes is passes and not states_of(engine).matrices.any()


def test_states_alone(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A difference where there must be none is an exit code."""
    assert hybrid.main([*TINY, "--parts", "states"]) == 0
    monkeypatch.setattr(hybrid_states._Pair, "difference", lambda pair: "all of it")
    assert hybrid.main([*TINY, "--parts", "states"]) == 1
    assert "all of it" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--accept", "2.5"], "between 1 and 2, the most that every depth commits"),
        (["--queries", "0"], "must be at least 1"),
        (["--state-layers", "-1"], "must not be negative"),
    ],
)
def test_wrong_settings(options: list[str], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        hybrid.main([*TINY, *options])
