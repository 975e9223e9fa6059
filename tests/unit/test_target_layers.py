"""Norm, rope and weight layout on their own, where parity of whole models would not tell."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from target.config import RopeConfig
from target.layers import RMSNorm, lay_out_for_cpu
from target.rope import Rope, rotate, rotate_pairs


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def norm(size: int, eps: float = 1e-5) -> RMSNorm:
    made = RMSNorm(size, eps)
    made.weight.data = torch.rand(size) + 0.5
    return made


@pytest.mark.parametrize("scale", [0.0, 1e-8, 1e-3, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_norm_and_its_gradient(dtype: torch.dtype, scale: float) -> None:
    """The float32 short cut is rms_norm, also where eps decides and at zero."""
    made = norm(24).to(dtype)
    x = (scale * torch.randn(3, 5, 24)).to(dtype).requires_grad_()
    y = x.detach().clone().requires_grad_()
    got, expected = made(x), F.rms_norm(y, (24,), made.weight, 1e-5)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    towards = torch.randn(got.shape).to(dtype)
    (dx,), (dy,) = (torch.autograd.grad(out, at, towards) for out, at in ((got, x), (expected, y)))
    torch.testing.assert_close(dx, dy, rtol=1e-4, atol=1e-5 * (1 + float(dy.abs().max())))


def test_float32_weights_norm_half_precision_as_weights_of_its_type() -> None:
    """As under autocast; torch warns of mixed types, which it composes, and the tests take warnings for errors."""
    made, x = norm(24), torch.randn(3, 24).bfloat16()
    got = made(x)
    assert torch.equal(got, F.rms_norm(x, (24,), made.weight.bfloat16(), 1e-5))
    got.float().sum().backward()
    assert made.weight.grad is not None and made.weight.grad.dtype == torch.float32 and made.weight.grad.any()


def test_norm_survives_being_built_on_meta() -> None:
    with torch.device("meta"):
        made = RMSNorm(4, 1e-5)
    made = made.to_empty(device="cpu")
    made.weight.data.fill_(1.0)
    torch.testing.assert_close(made(torch.full((1, 4), 2.0)), torch.ones(1, 4))


def test_rotate_turns_pairs_of_the_two_halves() -> None:
    rope, x = Rope(RopeConfig(theta=100.0), 6), torch.randn(1, 4, 2, 6)
    positions = torch.tensor([[0, 1, 5, 900]])
    turned = rotate(x, *rope(positions, torch.float32))
    for t, position in enumerate(positions[0].tolist()):
        for i in range(3):
            turn = torch.polar(torch.ones(2), torch.full((2,), position * 100.0 ** (-2 * i / 6)))
            expected = torch.complex(x[0, t, :, i], x[0, t, :, i + 3]) * turn
            got = torch.complex(turned[0, t, :, i], turned[0, t, :, i + 3])
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_rotate_pairs_turns_neighbours() -> None:
    """The same rotations as of halves, of dimensions in another order."""
    halves, pairs = Rope(RopeConfig(theta=100.0), 6), Rope(RopeConfig(theta=100.0), 6, interleaved=True)
    x, positions = torch.randn(1, 4, 2, 6), torch.tensor([[0, 1, 5, 900]])
    order = torch.tensor([0, 3, 1, 4, 2, 5])
    expected = rotate(x, *halves(positions, torch.float32))[..., order]
    torch.testing.assert_close(rotate_pairs(x[..., order], *pairs(positions, torch.float32)), expected)


def test_rotate_leaves_the_end_of_a_longer_head_alone() -> None:
    rope, x = Rope(RopeConfig(theta=100.0), 6), torch.randn(1, 4, 2, 10)
    tables = rope(torch.arange(4)[None], torch.float32)
    turned = rotate(x, *tables)
    assert torch.equal(turned[..., 6:], x[..., 6:])
    assert torch.equal(turned[..., :6], rotate(x[..., :6], *tables))


KINDS = [
    RopeConfig(),
    RopeConfig(kind="dynamic", scaling={"factor": 2.0}, max_position=16),
    RopeConfig(kind="yarn", scaling={"factor": 4.0}, max_position=64),
]


@pytest.mark.parametrize("config", KINDS, ids=lambda c: c.kind)
def test_frequencies_stay_float32_when_the_module_is_cast(config: RopeConfig) -> None:
    """Rounded to bfloat16 they would be off by whole turns at position 4000."""
    exact, positions = Rope(config, 8), torch.tensor([4000])
    with torch.device("meta"):
        empty = nn.Sequential(Rope(config, 8))
    cast = (copy.deepcopy(exact).to(torch.bfloat16), empty.to(torch.bfloat16).to_empty(device="cpu")[0])
    for rope in cast:
        for got, expected in zip(rope(positions, torch.float32), exact(positions, torch.float32), strict=True):
            assert torch.equal(got, expected)


def test_yarn_scales_cos_and_sin() -> None:
    cos, _ = Rope(KINDS[2], 8)(torch.tensor([0]), torch.float32)
    torch.testing.assert_close(cos, torch.full((1, 1, 8), 0.1 * math.log(4.0) + 1.0))


def test_yarn_takes_its_factor_from_the_lengths_where_none_is_given() -> None:
    scaling = {"original_max_position_embeddings": 16, "factor": None}
    derived = Rope(RopeConfig(kind="yarn", scaling=scaling, max_position=64), 8)
    given = Rope(RopeConfig(kind="yarn", scaling={**scaling, "factor": 4.0}, max_position=64), 8)
    assert torch.equal(derived.inverse, given.inverse) and derived.amplitude == given.amplitude


@pytest.mark.parametrize("bias", [False, True])
def test_layout_changes_no_value(bias: bool) -> None:
    module = nn.Sequential(nn.Linear(24, 40, bias=bias), nn.Linear(40, 8, bias=bias).to(torch.bfloat16))
    before, x = copy.deepcopy(module), torch.randn(2, 3, 24)
    lay_out_for_cpu(module)
    assert module[0].weight.stride() == (1, 40) and module[1].weight.stride() == (40, 1)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), before.parameters(), strict=True))
    torch.testing.assert_close(module[0](x), before[0](x), rtol=1e-5, atol=1e-5)
