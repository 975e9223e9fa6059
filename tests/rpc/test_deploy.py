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
from typing import Any

import grpc
import pytest
import yaml
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


def parsed(file: str) -> dict[str, Any]:
    """A YAML file below deploy/."""
    found = yaml.safe_load((DEPLOY / file).read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


SERVICES = parsed("compose.yaml")["services"]
SERVERS, WATCHERS = ("cpu", "gpu"), ("prometheus", "grafana")


def mounts(service: str) -> dict[str, Path]:
    """Folders of this repository by where a container finds them."""
    pairs = (volume.removesuffix(":ro").rsplit(":", 1) for volume in SERVICES[service]["volumes"])
    return {there: DEPLOY / re.sub(r"\$\{\w+:-(.+)\}", r"\1", here) for here, there in pairs}


def test_compose_names_stages_of_the_image() -> None:
    stages = re.findall(r"^FROM \S+ AS (\S+)$", (DEPLOY / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    named = [SERVICES[name]["build"]["target"] for name in SERVERS]
    assert named == ["cpu", "cuda"]
    assert set(named) <= set(stages)


def test_compose_has_a_profile_for_each_server_and_one_to_watch_them() -> None:
    profiles = {name: service["profiles"] for name, service in SERVICES.items()}
    assert profiles == {name: [name] for name in SERVERS} | {name: ["watch"] for name in WATCHERS}
    assert [folder for name in SERVICES for folder in mounts(name).values() if not folder.is_dir()] == []
    for name, service in SERVICES.items():
        assert service["cap_drop"] == ["ALL"], name
        assert all(volume.endswith(":ro") for volume in service["volumes"]), name


def test_nothing_listens_beyond_this_machine() -> None:
    for name in SERVERS:
        assert all(port.startswith("127.0.0.1:") for port in SERVICES[name]["ports"])
    for name in WATCHERS:
        assert SERVICES[name]["network_mode"] == "host"  # so their own addresses count
    assert "--web.listen-address=127.0.0.1:9090" in SERVICES["prometheus"]["command"]
    assert SERVICES["grafana"]["environment"]["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"


def test_prometheus_scrapes_what_servers_publish_and_finds_its_rules() -> None:
    config, there = parsed("prometheus/prometheus.yml"), mounts("prometheus")
    published = {port.rpartition(":")[0] for name in SERVERS for port in SERVICES[name]["ports"]}
    (job,) = config["scrape_configs"]
    assert {target for static in job["static_configs"] for target in static["targets"]} <= published
    (started,) = [word.partition("=")[2] for word in SERVICES["prometheus"]["command"] if "config.file" in word]
    for path in (started, *config["rule_files"]):
        folder, name = path.rsplit("/", 1)
        assert (there[folder] / name).is_file(), path


def test_grafana_finds_its_dashboard_and_prometheus() -> None:
    there = mounts("grafana")
    (source,) = parsed("grafana/provisioning/datasources/prometheus.yml")["datasources"]
    (provider,) = parsed("grafana/provisioning/dashboards/speculator.yml")["providers"]
    assert there["/etc/grafana/provisioning"] == DEPLOY / "grafana" / "provisioning"
    assert (there[provider["options"]["path"]] / "speculator.json").is_file()
    given = SERVICES["grafana"]["environment"]
    assert given[source["url"].strip("${}")] == "http://127.0.0.1:9090"
