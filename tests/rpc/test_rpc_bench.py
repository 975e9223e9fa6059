"""The benchmark of the wire measures what it says: every step commits, every echo comes back."""

from speculator.bench.rpc import measure


def test_it_measures_steps_beside_echoes() -> None:
    found = measure(exchanges=100, repeats=1)
    for which in ("step", "relay", "echo"):
        assert 0 < found[f"{which}_p50_us"] <= found[f"{which}_p99_us"]
        assert found[f"{which}_p50_us"] < found[f"{which}_whole_p50_us"]
    assert found["ratio_p50"] == round(found["step_p50_us"] / found["echo_p50_us"], 3)
