"""Servers whose ranks have sessions of their own, as processes: concurrent sessions get the text of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from speculator.bench.ranks_trials import LIMIT, Fault, serve_command, trial
from speculator.bundled import Pair
from speculator.client import Client, Sampling, Stopping
from speculator.config import load
from speculator.errors import ServerFullError
from speculator.load import load_engine
from speculator.local import generate
from speculator.types import DraftShape, SamplingParams
from tests.e2e.test_ranks import address_of, running, sizes
from tests.e2e.tiny_pair import make_mtp_pair

PROMPTS = [tuple((7 * i + j * j) % 200 + 3 for j in range(5 + 6 * i)) for i in range(6)]
PARAMS = [SamplingParams(0.8, seed=i) if i % 2 else SamplingParams() for i in range(6)]
TOKENS = 24


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_mtp_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def alone(pair: Pair) -> list[list[int]]:
    """What one process generates."""
    engine = load_engine(load(None, [f"model.target={pair.target}", f"model.head={pair.head}", "model.device=cpu"]))
    ends = frozenset(engine.info.eos_token_ids)
    found = []
    for prompt, params in zip(PROMPTS, PARAMS, strict=True):
        steps = generate(engine, prompt, TOKENS, params, DraftShape(2), ends)
        found.append([token for step in steps for token in step][:TOKENS])
    return found


def command(pair: Pair, ranks: int = 2) -> list[str]:
    return [*serve_command(pair.target, Path("mtp"), ranks), "--attention-data-parallel"]


@pytest.fixture(scope="module")
def server(pair: Pair) -> Iterator[str]:
    with running([(command(pair), {})]) as [process]:
        yield address_of(process)
        process.terminate()
        assert process.wait(LIMIT) == 0
        assert process.stderr is not None and "speculator: " not in process.stderr.read()


def ask(address: str, i: int) -> list[int]:
    sampling = Sampling(PARAMS[i].temperature, seed=PARAMS[i].seed)
    stopping = Stopping(max_new_tokens=TOKENS)
    with Client(address) as client:
        chunks = client.generate(list(PROMPTS[i]), sampling=sampling, stopping=stopping)
        return [token for chunk in chunks for token in chunk.tokens]


@pytest.mark.parametrize("at_once", [1, 2, 4])
def test_sessions_come_and_go(at_once: int, server: str, alone: list[list[int]]) -> None:
    """One at a time leaves the other rank idle; four fill the rows of both."""
    with ThreadPoolExecutor(at_once) as callers:
        assert list(callers.map(lambda i: ask(server, i), range(len(PROMPTS)))) == alone


def test_what_a_server_says_of_itself(server: str) -> None:
    """The head lies in the target's folder, so that both have one revision."""
    assert sizes(server) == (2, 1)
    with Client(server) as client:
        info = client.server_info()
    assert info.draft_method == "mtp" and info.draft_revision == info.target_revision != ""


def test_capacity_adds_up_and_ends(server: str) -> None:
    """Two ranks of two sessions each; a fifth is refused as on one process."""
    with Client(server, patience=0.0) as client:
        sessions = [client.create(list(PROMPTS[i])) for i in range(4)]
        with pytest.raises(ServerFullError, match="all 4 sessions are taken"):
            client.create(list(PROMPTS[4]))
        for created in sessions:
            client.delete(created.session.session_id)


@pytest.mark.parametrize("fault", [Fault(1, "serving", 5, "kill"), Fault(1, "load", 7, "stop")], ids=lambda f: f.text)
def test_a_lost_rank_ends_all_with_one_sentence(fault: Fault, pair: Pair) -> None:
    ending = trial(command(pair), fault)
    assert ending.wrong == "" and ending.code != 0, ending
    assert fault.when != "serving" or ending.status == "UNAVAILABLE"


def test_wrong_input_is_a_sentence_before_any_rank_starts(pair: Pair) -> None:
    models = ["--target", str(pair.target), "--head", str(pair.head), "--attention-data-parallel"]
    environ = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    serve = [sys.executable, "-m", "speculator", "serve", *models, "--tensor-parallel", "3"]
    done = subprocess.run(serve, env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "3 ranks do not divide 4 experts" in done.stderr and done.stderr.count("\n") == 1, done.stderr
