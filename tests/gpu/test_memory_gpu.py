"""Graph memory on CUDA: what two throw-away captures foretell, beside what capturing all shapes takes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graphs.memory import compare, cuda_meter, difference, estimate_graphs, peak_activation
from graphs.recorder import CudaRecorder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROWS = (256, 128, 64, 32, 16, 8, 4, 2, 1)
WIDTH, LAYERS = 2048, 12


@torch.inference_mode()
def test_the_estimate_is_close_to_what_capture_takes_or_above() -> None:
    weights = [torch.randn(WIDTH, WIDTH, device="cuda") for _ in range(LAYERS)]
    inputs = {rows: torch.randn(rows, WIDTH, device="cuda") for rows in ROWS}

    def run(rows: int) -> Tensor:
        x = inputs[rows]
        for weight in weights:
            x = torch.nn.functional.gelu(x @ weight)
        return x

    trial, final, meter = CudaRecorder(), CudaRecorder(), cuda_meter("cuda")
    for rows in ROWS:
        trial.warm(lambda rows=rows: run(rows))
        final.warm(lambda rows=rows: run(rows))
    estimate = estimate_graphs(ROWS, lambda rows: record_one(trial, run, rows), trial.close, meter)
    before = meter()
    held = [final.record(lambda rows=rows: run(rows)) for rows in ROWS]
    actual = difference(before, meter()).taken
    assert len(held) == len(ROWS) and actual > 0
    assert compare(estimate, actual) <= 1 / 0.9
    final.close()


def record_one(recorder: CudaRecorder, run: object, rows: int) -> None:
    assert callable(run)
    recorder.record(lambda: run(rows))


def test_the_peak_is_what_a_pass_needs_above_what_is_held() -> None:
    held = torch.zeros(1 << 20, device="cuda")
    peak = peak_activation(lambda: (held + 1).sum(), "cuda")
    assert 4 << 20 <= peak < 9 << 20
