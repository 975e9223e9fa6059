"""Servers over several ranks, as processes: the text of one rank over gRPC, and clean ends when a rank is lost."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import grpc
import pytest

from speculator.bench.ranks_trials import LIMIT, READY, Fault, random_faults, serve_command, trial
from speculator.bundled import Pair
from speculator.client import Client, Sampling, Stopping
from speculator.config import load
from speculator.load import load_engine
from speculator.local import generate
from speculator.types import DraftShape, SamplingParams
from speculator.v1 import admin_pb2, admin_pb2_grpc
from tests.e2e.tiny_pair import make_pair

PROMPT, TOKENS = (5, 9, 2, 40, 3, 8, 52), 40
SAMPLINGS = (SamplingParams(), SamplingParams(temperature=0.8, seed=11))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def alone(pair: Pair) -> list[list[int]]:
    """What one rank generates."""
    engine = load_engine(load(None, [f"model.target={pair.target}", f"model.head={pair.head}", "model.device=cpu"]))
    ends = frozenset(engine.info.eos_token_ids)
    found = [generate(engine, PROMPT, TOKENS, sampling, DraftShape(2), ends) for sampling in SAMPLINGS]
    return [[token for step in steps for token in step][:TOKENS] for steps in found]


def texts(address: str) -> list[list[int]]:
    found = []
    with Client(address) as client:
        for s in SAMPLINGS:
            sampling = Sampling(s.temperature, seed=s.seed)
            chunks = client.generate(list(PROMPT), sampling=sampling, stopping=Stopping(max_new_tokens=TOKENS))
            found.append([token for chunk in chunks for token in chunk.tokens])
    return found


def address_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return next(line.split(READY)[1].strip() for line in process.stdout if READY in line)


def sizes(address: str) -> tuple[int, int]:
    """Ranks that share a layer, and that share the layers, as the server says."""
    with grpc.insecure_channel(address) as channel:
        found = admin_pb2_grpc.AdminServiceStub(channel).GetServerInfo(admin_pb2.GetServerInfoRequest())
    return found.tensor_parallel_size, found.pipeline_parallel_size


@contextmanager
def running(commands: Sequence[tuple[list[str], dict[str, str]]]) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes; at the end none of them is left."""
    found = [
        subprocess.Popen(command, env={**os.environ, **more}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for command, more in commands
    ]
    try:
        yield found
    finally:
        for process in found:
            process.kill()
            process.communicate()


def test_a_server_over_ranks_gives_the_text_of_one(pair: Pair, alone: list[list[int]]) -> None:
    with running([(serve_command(pair.target, pair.head, 2), {})]) as [server]:
        address = address_of(server)
        assert texts(address) == alone and sizes(address) == (2, 1)
        server.terminate()
        assert server.wait(LIMIT) == 0
        assert server.stderr is not None and "speculator: " not in server.stderr.read()


def test_ranks_that_others_started_meet_by_env(pair: Pair, alone: list[list[int]]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    command = serve_command(pair.target, pair.head, 2)
    ranks = [(command, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in (0, 1)]
    with running(ranks) as [lead, other]:
        assert texts(address_of(lead)) == alone
        lead.terminate()
        assert [lead.wait(LIMIT), other.wait(LIMIT)] == [0, 0]


def test_ranks_of_other_settings_end_before_they_load(pair: Pair) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    command = serve_command(pair.target, pair.head, 2)
    ranks = [([*command, "--depth", str(2 + rank)], {**shared, "RANK": str(rank)}) for rank in (0, 1)]
    with running(ranks) as [lead, other]:
        assert lead.wait(LIMIT) == 2 and other.wait(LIMIT) != 0
        assert lead.stderr is not None
        assert lead.stderr.read().splitlines()[-1] == (
            "speculator: rank 1 has draft.depth = 3 where rank 0 has 2: give all ranks the same"
        )


@pytest.mark.parametrize(
    "fault",
    [
        Fault(1, "serving", 5, "kill"),
        Fault(0, "load", 3, "kill"),
        Fault(1, "capture", 2, "memory"),
        Fault(1, "load", 7, "stop"),
        Fault(0, "warm-up", 2, "kill"),
        Fault(1, "serving", 5, "hang"),
        Fault(0, "capture", 2, "hang"),
    ],
    ids=lambda fault: fault.text,
)
def test_a_lost_rank_ends_all_with_one_sentence(fault: Fault, pair: Pair) -> None:
    patient = ["--set", "parallel.starting_s=60"] if fault.when == "serving" else []  # what must not count then
    ending = trial([*serve_command(pair.target, pair.head, 2), *patient], fault)
    assert ending.wrong == "" and ending.code != 0, ending
    assert fault.when != "serving" or ending.status == "UNAVAILABLE"
    assert (fault.kind in ("hang", "stop")) == (f"rank {fault.rank} of 2 stalled in" in ending.said)


def test_a_gang_that_is_left_alone_starts_and_ends_in_order(pair: Pair) -> None:
    ending = trial(serve_command(pair.target, pair.head, 2, graphs="round"), None)
    assert (ending.wrong, ending.code, ending.status, ending.said) == ("", 0, "OK", ""), ending


def test_faults_of_a_run_are_of_every_kind() -> None:
    faults = list(random_faults(50, 4, seed=1))
    assert len({(f.when, f.kind) for f in faults}) == 20
    assert {f.rank for f in faults} == {0, 1, 2, 3}
    assert faults == list(random_faults(50, 4, seed=1))


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--tensor-parallel", "3"], "3 ranks do not divide 4 attention heads"),
        (["--tensor-parallel", "2", "--device", "cuda:0"], "is one device, and 2 ranks need one each"),
        (["--tensor-parallel", "2", "--device", "cuda"], "2 ranks need 2 CUDA devices"),
        (["--tensor-parallel", "2", "--invariant"], "sums of one order"),
        (["--tensor-parallel", "0"], "parallel.tensor must be between 1 and 1024"),
    ],
)
def test_wrong_input_is_a_sentence_before_any_rank_starts(flags: list[str], text: str, pair: Pair) -> None:
    models = ["--target", str(pair.target), "--head", str(pair.head)]
    command = [sys.executable, "-m", "speculator", "serve", *models, *flags]
    environ = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert text in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_taken_port_is_known_before_any_rank_starts(pair: Pair) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [*serve_command(pair.target, pair.head, 2), "--port", str(port)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    text = f"speculator: cannot listen on 127.0.0.1:{port} (server.port): Address already in use\n"
    assert (done.returncode, done.stderr) == (2, text)


@pytest.mark.parametrize("wanted", [1, 2])
def test_other_many_ranks_than_configured_are_refused(wanted: int, pair: Pair) -> None:
    command = serve_command(pair.target, pair.head, wanted)
    environ = {**os.environ, "RANK": "0", "WORLD_SIZE": "4"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "4 ranks were started" in done.stderr
