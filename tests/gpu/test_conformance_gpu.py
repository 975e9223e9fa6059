"""The conformance kit on CUDA: real graphs, our kernels, the builds of others, and a lazily planned backend."""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.unit.kit_runs import run_kit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
THEIRS, OURS = "lazyattention.backend:", "tests.unit.kit_backends:"
flash_mla = pytest.mark.skipif(
    not (os.environ.get("SPECULATOR_FLASHMLA") or find_spec("flash_mla")), reason="no build of FlashMLA"
)
flash3 = pytest.mark.skipif(not os.environ.get("SPECULATOR_FLASH3"), reason="no build of FlashAttention-3")


@pytest.mark.parametrize(
    "backend",
    [
        THEIRS + "Heads",
        THEIRS + "Latent",
        THEIRS + "Planless",
        THEIRS + "Eager",
        THEIRS + "OnTheHost",
        THEIRS + "Declared",
        OURS + "Sdpa",
        OURS + "Mla",
        OURS + "MlaTriton",
        pytest.param(OURS + "RealFlashMla", marks=flash_mla),
        pytest.param(OURS + "RealFlash3", marks=flash3),
    ],
)
def test_right_backends_pass(backend: str, tmp_path: Path) -> None:
    run = run_kit(tmp_path, "--backend", backend, "--device", "cuda", limit=280)
    assert run.status == 0, run.text
    assert run.count("passed") > 35, run.text


@pytest.mark.parametrize(
    ("variant", "test", "told"),
    [
        ("SharesMetadata", "test_r1_states_share_nothing", "R1 is broken"),
        ("SharesMetadata", "test_r1_a_pass_recorded_after_a_warm_up", "R1 is broken"),
        ("BorrowsBuffers", "test_r2_states_keep_their_contents", "R2 is broken"),
        ("CountsInPlace", "test_r2_passes_leave_their_inputs", "R2 is broken"),
        ("CopiesLengths", "test_r3_replays_read_what_was_refreshed", "R3 is broken"),
        ("NarrowsTheTable", "test_r4_host_decisions_hold", "R4 is broken"),
        ("ForgetsToRefresh", "test_r5_recorded_steps_see_each_other", "R5 is broken"),
        ("ReadsTheHost", "test_r5_replays_in_turn", "CaptureError"),
    ],
)
def test_each_mistake_fails_the_test_that_is_about_it(variant: str, test: str, told: str, tmp_path: Path) -> None:
    run = run_kit(tmp_path, "--backend", THEIRS + variant, "--device", "cuda", "-k", test)
    assert run.named("failed") == {test}, run.text
    assert re.search(told, run.text), run.text
