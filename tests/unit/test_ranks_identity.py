"""What ranks compare before they meet: which facts there are, and the sentence about the first that differs."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from speculator.config import Config, load
from speculator.errors import ConfigError
from speculator.ranks.identity import check_same, exchanged, identity
from speculator.ranks.launch import Place
from tests.e2e.tiny_pair import make_pair

CPU, SECOND = torch.device("cpu"), torch.device("cuda", 1)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    pair = make_pair(tmp_path_factory.mktemp("pair"))
    return load(None, [f"model.target={pair.target}", f"model.head={pair.head}", "draft.depth=3"])


@pytest.mark.parametrize("switch", ["SPECULATOR_FUSED", "SPECULATOR_PDL", "SPECULATOR_ATTENTION"])
def test_switches_of_kernels_are_compared(switch: str, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(switch, raising=False)
    here, default = identity(config, CPU), "auto" if switch.endswith("ATTENTION") else "on"
    monkeypatch.setenv(switch, default)
    check_same([here, identity(config, CPU)])
    monkeypatch.setenv(switch, "torch" if default == "auto" else "off")
    with pytest.raises(ConfigError, match=f"rank 1 has {switch} = (torch|off) where rank 0 has {default}: give all"):
        check_same([here, identity(config, CPU)])


def test_devices_are_compared_by_model_and_capability(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each rank's own device, not of the first one."""
    names = {SECOND: "NVIDIA H100", torch.device("cuda", 0): "NVIDIA H200"}
    monkeypatch.setattr(torch.cuda, "get_device_name", names.__getitem__)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(ConfigError) as raised:
        check_same([identity(config, device) for device in (torch.device("cuda", 0), SECOND)])
    assert "rank 1 has device = NVIDIA H100 (9.0) where rank 0 has NVIDIA H200 (9.0)" in str(raised.value)


def test_models_are_compared_wherever_they_lie(config: Config, tmp_path: Path) -> None:
    copy = make_pair(tmp_path)
    moved = load(None, [f"model.target={copy.target}", f"model.head={copy.head}", "draft.depth=3"])
    check_same([identity(config, CPU), identity(moved, CPU)])
    (copy.target / "config.json").write_text((copy.target / "config.json").read_text() + "\n")
    with pytest.raises(ConfigError, match=r"rank 1 has the target's revision = \w+ where rank 0 has \w+: give all"):
        check_same([identity(config, CPU), identity(moved, CPU)])


def test_a_head_on_one_rank_only_is_named(config: Config) -> None:
    alone = load(None, [f"model.target={config.model.target}", "draft.depth=3"])
    with pytest.raises(ConfigError, match=r"rank 1 has the draft head's revision = nothing where rank 0 has \w+:"):
        check_same([identity(config, CPU), identity(alone, CPU)])


def test_all_ranks_hear_of_all() -> None:
    store, found = dist.HashStore(), dict[int, object]()

    def rank(number: int) -> None:
        found[number] = exchanged(store, Place(number, 3, number), {"torch": str(number)})

    ranks = [threading.Thread(target=rank, args=(number,)) for number in range(3)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join(10)
    assert found == {number: [{"torch": "0"}, {"torch": "1"}, {"torch": "2"}] for number in range(3)}
