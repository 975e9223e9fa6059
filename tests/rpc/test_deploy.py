"""What deploy/ relies on: files that the image copies, targets that compose names, and the container's health check.

Owns: nothing that needs a container runtime. Must never build an image.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from speculator.train.recipe import recipe_names

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
STATUS = health_pb2.HealthCheckResponse
SERVICE = "speculator.v1.DrafterService"


@pytest.fixture
def served() -> Iterator[tuple[health.HealthServicer, str]]:
    """A server that answers health checks only, and its address."""
    server, servicer = grpc.server(futures.ThreadPoolExecutor(1)), health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield servicer, f"127.0.0.1:{port}"
    server.stop(None).wait()


def checked(address: str, **more: str) -> int:
    """Exit status of the health check; what is wrong it says in one line."""
    environment = {**os.environ, "SPECULATOR_ADDRESS": address, **more}
    done = subprocess.run([sys.executable, DEPLOY / "health.py"], env=environment, capture_output=True, text=True)
    assert len(done.stderr.splitlines()) <= 1
    return done.returncode


def test_health_follows_the_service(served: tuple[health.HealthServicer, str]) -> None:
    servicer, address = served
    assert checked(address) == 1  # the service is not known yet
    servicer.set(SERVICE, STATUS.SERVING)
    assert checked(address) == 0
    servicer.set(SERVICE, STATUS.NOT_SERVING)
    assert checked(address) == 1


def test_health_of_nobody() -> None:
    assert checked("127.0.0.1:1") == 1
    assert checked("127.0.0.1:1", SPECULATOR_CA="/nowhere/ca.pem") == 1


def test_image_copies_files_that_exist_and_are_not_ignored() -> None:
    copies = re.findall(r"^COPY (?!--from)(.+) \S+$", (DEPLOY / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    sources = {source for line in copies for source in line.split()}
    kept = re.findall(r"^!(\S+)$", (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8"), re.MULTILINE)
    assert {"speculator", "target", "graphs", "pyproject.toml"} <= sources == set(kept)
    assert [source for source in sources if not (DEPLOY.parent / source).exists()] == []


def test_every_recipe_of_a_pair_is_trained() -> None:
    script = (DEPLOY / "models" / "train.sh").read_text(encoding="utf-8")
    (default,) = re.findall(r"set -- (.+)", script)
    assert sorted(default.split()) == [name for name in recipe_names() if name.startswith("nano-")]
    (named,) = re.findall(r"PAIR is (.+);", script)
    assert re.findall(r"[\w-]+", named.replace(" or ", ", ")) == default.split()
    assert "$run pilot " in script and "pilot" in recipe_names()


def test_compose_names_stages_of_the_image() -> None:
    stages = re.findall(r"^FROM \S+ AS (\S+)$", (DEPLOY / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    named = re.findall(r"target: (\w+)", (DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    assert named == ["cpu", "cuda"]
    assert set(named) <= set(stages)
