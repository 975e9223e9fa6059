"""What start-up chooses on a GPU that lacks something: triton, a compiler for it, a newer card, a measured table."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_gqa import interpreted, on_the_interpreter  # noqa: F401

from speculator import tree
from speculator.arithmetic import choose_arithmetic
from speculator.config import load
from speculator.errors import ConfigError
from speculator.load import _fuse
from target import products
from target.attention.choose import grouped_attention
from target.attention.mla import MlaAttention, TorchSplits
from target.attention.sdpa import SdpaAttention
from target.errors import PlanError
from target.layers import TORCH
from target.products import FixedProduct, Table, fast_product, fixed_product, kernels_need
from target.states import TorchRule, rule_for
from tests.unit.engines import tiny_head, tiny_target

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
NO_TRITON, OLDER, BROKEN = "the package triton", "compute capability 8.0", "which says: no compiler"


@pytest.fixture(params=[NO_TRITON, OLDER, BROKEN])
def lacking(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A GPU, as far as choices go, and what its kernels need."""
    for name in ("SPECULATOR_FUSED", "SPECULATOR_PDL", "SPECULATOR_ATTENTION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(products, "find_spec", lambda name: None if request.param == NO_TRITON else object())
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (7, 5) if request.param == OLDER else (9, 0))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: Table.read().device)
    monkeypatch.setattr(products, "_refusal", lambda device: "no compiler" if request.param == BROKEN else "")
    tree._able.cache_clear()
    yield request.param
    tree._able.cache_clear()


def cache(parts: int = 2) -> Any:
    layer = SimpleNamespace(device=CUDA, is_cuda=True, dtype=torch.bfloat16, shape=(64, parts, parts, 64))
    return SimpleNamespace(layers=[layer], page_size=16)


def test_torch_serves_in_place_of_kernels_and_the_log_says_why(lacking: str, caplog: pytest.LogCaptureFixture) -> None:
    target = tiny_target()
    head = tiny_head(target, "eagle3")
    with caplog.at_level(logging.WARNING):
        _fuse(CUDA, target, head)
    assert caplog.messages == [
        f"torch's own operations serve in place of kernels, slower: the kernels need {_all(lacking)}"
    ]
    assert target.norm.pieces is TORCH and target.reader is None and head.reader is None
    assert fast_product(CUDA) is F.linear
    assert not tree.in_kernels(CUDA) and isinstance(rule_for(CUDA), TorchRule)
    assert isinstance(grouped_attention(cache()), SdpaAttention)
    assert isinstance(MlaAttention(cache(1), 32, processors=4).backend, TorchSplits)


def _all(lacking: str) -> str:
    return f"a triton that works here, {lacking}" if lacking == BROKEN else lacking


def test_what_only_kernels_can_do_is_refused_in_a_sentence(lacking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PlanError, match=f"products of fixed order need .*{lacking}"):
        fixed_product(CUDA)
    monkeypatch.setenv("SPECULATOR_ATTENTION", "triton")
    with pytest.raises(PlanError, match=f"the triton backend needs .*{lacking}: use torch"):
        grouped_attention(cache())
    with pytest.raises(ConfigError, match=f"products of fixed order need .*{lacking}"):
        choose_arithmetic(load(None, ["engine.invariant=true"]), tiny_target(), None, CUDA, "round")


@pytest.fixture
def able(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "find_spec", lambda name: object())
    monkeypatch.setattr(products, "_refusal", lambda device: "")
    monkeypatch.setattr(products, "_none_arrived", lambda device: None)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "another device")


def test_a_table_of_another_device_is_told_and_never_asked(able: None, caplog: pytest.LogCaptureFixture) -> None:
    """Fast products are torch's there, those of fixed order take what suits their shape."""
    assert kernels_need(CUDA) == "" and fast_product(CUDA) is F.linear
    with caplog.at_level(logging.INFO):
        choose_arithmetic(load(None, ["engine.invariant=true"]), target := tiny_target(), None, CUDA, "round")
    product, table = target.product, Table.read()
    assert isinstance(product, FixedProduct) and product.table.entries == {}
    assert [m for m in caplog.messages if f"measured on {table.device} in the table" in m and "another device" in m]
    caplog.clear()
    with caplog.at_level(logging.INFO):
        choose_arithmetic(load(None, ["engine.products=torch"]), tiny_target(), None, CUDA, "round")
    assert caplog.messages == []


@on_the_interpreter
def test_a_kernel_that_runs_and_one_that_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    from target.kernels import trial

    assert trial.refusal(CPU) == ""

    def fails(out: object) -> None:
        raise RuntimeError("Failed to find C compiler.\nmore")

    monkeypatch.setattr(trial, "trial_kernel", {(1,): fails})
    assert trial.refusal(CPU) == "Failed to find C compiler."
    monkeypatch.setattr(trial, "trial_kernel", {(1,): lambda out: None})
    assert trial.refusal(CPU) == "a kernel that stored nothing"
