"""Servers over stages, as processes: the text of one process over gRPC, several sessions at once, and clean ends."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from speculator.bench.ranks_trials import LIMIT, Fault, serve_command, trial
from speculator.bundled import Pair
from speculator.client import Client, Sampling, Stopping
from speculator.config import load
from speculator.heads.save import save_head
from speculator.load import load_engine
from speculator.local import generate
from speculator.types import DraftShape, SamplingParams
from tests.e2e.test_ranks import address_of, running, sizes
from tests.e2e.tiny_pair import make_pair
from tests.unit.engines import tiny_head, tiny_target

PROMPTS, TOKENS = ((5, 9, 2, 40, 3, 8, 52), (7, 1), (30, 31, 32)), 30
SAMPLING = SamplingParams(temperature=0.8, seed=11)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def alone(pair: Pair) -> list[list[int]]:
    """What one process generates."""
    engine = load_engine(load(None, [f"model.target={pair.target}", f"model.head={pair.head}", "model.device=cpu"]))
    ends = frozenset(engine.info.eos_token_ids)
    found = [generate(engine, prompt, TOKENS, SAMPLING, DraftShape(2), ends) for prompt in PROMPTS]
    return [[token for step in steps for token in step][:TOKENS] for steps in found]


def text(address: str, prompt: tuple[int, ...]) -> list[int]:
    with Client(address) as client:
        sampling = Sampling(SAMPLING.temperature, seed=SAMPLING.seed)
        chunks = client.generate(list(prompt), sampling=sampling, stopping=Stopping(max_new_tokens=TOKENS))
        return [token for chunk in chunks for token in chunk.tokens]


def test_sessions_on_stages_get_the_text_of_one_process(pair: Pair, alone: list[list[int]]) -> None:
    """Three sessions at once on two stages: groups of them are under way together."""
    command = [*serve_command(pair.target, pair.head, 1, stages=2), "--set", "engine.max_sessions=3"]
    with running([(command, {})]) as [server]:
        address = address_of(server)
        assert sizes(address) == (1, 2)
        with ThreadPoolExecutor(3) as pool:
            assert list(pool.map(lambda prompt: text(address, prompt), PROMPTS)) == alone
        server.terminate()
        assert server.wait(LIMIT) == 0
        assert server.stderr is not None and "speculator: " not in server.stderr.read()


@pytest.mark.parametrize(
    "fault",
    [Fault(1, "serving", 5, "kill"), Fault(0, "load", 3, "kill"), Fault(1, "capture", 2, "memory")],
    ids=lambda fault: fault.text,
)
def test_a_lost_stage_ends_all_with_one_sentence(fault: Fault, pair: Pair) -> None:
    ending = trial(serve_command(pair.target, pair.head, 1, stages=2), fault)
    assert ending.wrong == "" and ending.code != 0, ending
    assert fault.when != "serving" or ending.status == "UNAVAILABLE"


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--pipeline-parallel", "7"], "7 stages need a layer each, and LlamaForCausalLM has 6"),
        (["--pipeline-parallel", "2", "--tensor-parallel", "3"], "3 ranks do not divide 4 attention heads"),
        (["--pipeline-parallel", "2", "--graphs", "round"], "graphs.mode round records what no stage"),
        (["--pipeline-parallel", "0"], "parallel.pipeline must be between 1 and 1024"),
    ],
)
def test_wrong_input_is_a_sentence_before_any_stage_starts(flags: list[str], text: str, pair: Pair) -> None:
    models = ["--target", str(pair.target), "--head", str(pair.head)]
    command = [sys.executable, "-m", "speculator", "serve", *models, *flags]
    environ = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert text in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_head_of_another_target_is_refused_before_any_stage_starts(pair: Pair, tmp_path: Path) -> None:
    save_head(tiny_head(tiny_target(3), "eagle3", target_hidden_size=24), tmp_path)
    command = serve_command(pair.target, tmp_path, 1, stages=2)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "it was made for another target" in done.stderr


def test_other_many_ranks_than_stages_are_refused(pair: Pair) -> None:
    environ = {**os.environ, "RANK": "0", "WORLD_SIZE": "3"}
    command = serve_command(pair.target, pair.head, 1, stages=2)
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "3 ranks were started" in done.stderr
