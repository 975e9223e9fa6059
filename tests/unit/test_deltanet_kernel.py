"""The Triton kernel of the gated delta rule beside its torch twin, on the interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_gqa import interpreted, on_the_interpreter  # noqa: F401
from torch import Tensor

from target.config_hybrid import DeltaNetConfig
from target.deltanet import DeltaInputs, DeltaRows, GatedDeltaNet, HybridAttend, delta_rows
from target.fused import FUSED
from target.layers import TORCH
from target.states import Rule, StateCache, StatePass, StateShape, TorchRule, rule_for

SIZES = {
    "square": (2, 4, 16, 16),
    "wide values": (1, 3, 8, 40),
    "odd keys": (3, 6, 12, 20),
    "one head": (1, 1, 32, 16),
}


def sizes(name: str) -> DeltaNetConfig:
    key_heads, heads, keys, values = SIZES[name]
    return DeltaNetConfig(key_heads, heads, keys, values, kernel=4, layers=frozenset({0}), grouped=False)


def song(s: DeltaNetConfig, rows: int, length: int, seed: int = 0, device: str = "cpu") -> DeltaInputs:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(rows, length, s.channels, generator=generator)
    decay, beta = torch.rand(2, rows, length, s.value_heads, generator=generator).unbind()
    parts = (mixed, decay, beta, torch.randn(s.channels, 4, generator=generator) * 0.5)
    return DeltaInputs(*(x.to(device) for x in parts), s)


def filled(
    s: DeltaNetConfig,
    rule: Rule,
    slots: int = 6,
    seed: int = 5,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> StateCache:
    """Every slot but the null slot holds a state; what no row names must stay as it is."""
    shape = StateShape(4, s.channels, s.value_heads, s.key_dim, s.value_dim)
    states, generator = StateCache([shape], slots, dtype, device), torch.Generator().manual_seed(seed)
    for store in (states.windows, states.matrices):
        store[:, 1:] = torch.randn(store[:, 1:].shape, generator=generator).to(device)
    states.rule = rule
    return states


def kernel() -> Rule:
    from target.kernels.deltanet import TritonRule

    return TritonRule()


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@on_the_interpreter
@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("length", [1, 5])
def test_a_pass_and_its_commit_are_those_of_torch(name: str, length: int) -> None:
    s, slots = sizes(name), torch.tensor([4, 2, 0, 5])
    inputs, accepted = song(s, 4, length), torch.tensor([length, 1, 0, 0])
    found, stores = [], []
    for rule in (kernel(), TorchRule()):
        states = filled(s, rule)
        before = states.matrices.clone()
        run = StatePass(states, slots)
        found.append(run.recur(0, inputs))
        assert torch.equal(states.matrices, before)
        run.commit(accepted)
        stores.append(states)
    close(*found)
    close(stores[0].matrices, stores[1].matrices)
    assert torch.equal(stores[0].windows, stores[1].windows)
    assert torch.equal(stores[0].matrices[:, [0, 1, 3, 5]], filled(s, kernel()).matrices[:, [0, 1, 3, 5]])


@on_the_interpreter
@pytest.mark.parametrize("name", SIZES)
def test_a_prompt_of_known_counts(name: str) -> None:
    """What lies past the counts may be NaN, and its results are finite."""
    s, slots, counts = sizes(name), torch.tensor([3, 1, 0]), torch.tensor([7, 2, 0])
    inputs = song(s, 3, 7)
    for part in inputs[:3]:
        part[torch.arange(7) >= counts[:, None]] = float("nan")
    found, stores = [], []
    for rule in (kernel(), TorchRule()):
        states = filled(s, rule)
        run = StatePass(states, slots, counts)
        found.append(run.recur(0, inputs))
        run.commit()
        stores.append(states)
    assert found[0].isfinite().all()
    for row, n in enumerate(counts.tolist()):
        close(found[0][row, :n], found[1][row, :n])
    close(stores[0].matrices, stores[1].matrices)


@on_the_interpreter
def test_commits_are_decoding_bit_for_bit() -> None:
    """Rounds of any width with wrong drafts in them, against one token after the other."""
    s, generator = sizes("odd keys"), torch.Generator().manual_seed(1)
    inputs, rule = song(s, 1, 24), kernel()
    one, plain, at = torch.tensor([2]), list[Tensor](), 0
    states = filled(s, rule)
    for t in range(20):
        plain.append(states.matrices.clone())
        run = StatePass(states, one)
        run.recur(0, part(inputs, t, 1))
        run.commit(torch.ones_like(one))
    states = filled(s, rule)
    while at < 15:
        width = int(torch.randint(1, 5, (), generator=generator))
        accepted = torch.randint(0, width + 1, (1,), generator=generator)
        drafted = part(inputs, at, width)
        drafted.mixed[:, int(accepted) :] += 1
        run = StatePass(states, one)
        run.recur(0, drafted)
        run.commit(accepted)
        at += int(accepted)
        assert torch.equal(states.matrices, plain[at])


def part(inputs: DeltaInputs, at: int, width: int) -> DeltaInputs:
    return inputs._replace(**{n: getattr(inputs, n)[:, at : at + width].clone() for n in ("mixed", "decay", "beta")})


@on_the_interpreter
@pytest.mark.parametrize(
    ("name", "dtype", "length"),
    [*((name, torch.float32, 5) for name in SIZES), ("square", torch.float16, 1), ("square", torch.float32, 2)],
)
def test_rows_of_a_product(name: str, dtype: torch.dtype, length: int) -> None:
    """After inputs of the past, out of a product that has more columns, and a token alone is the same bits."""
    from target.kernels.deltanet_parts import launch_rows

    s, slots, generator = sizes(name), torch.tensor([4, 0, 2]), torch.Generator().manual_seed(3)
    windows = torch.randn(6, 3, s.channels, generator=generator).to(dtype)
    product = torch.randn(3, length, s.channels + 24, generator=generator).to(dtype)
    inputs = song(s, 3, length)._replace(mixed=product[..., : s.channels])
    inputs = inputs._replace(conv=inputs.conv.to(dtype))
    q, rows = launch_rows(inputs, windows, slots)
    wanted, expected = delta_rows(inputs, windows.index_select(0, slots))
    assert torch.equal(rows.window, expected.window) and rows.window.dtype == dtype
    for got, right in ((q, wanted), (rows.k, expected.k), (rows.v, expected.v)):
        close(got, right)
    for t in range(length):
        before = rows.window[:, t : t + 3].contiguous()
        alone, one = launch_rows(part(inputs, t, 1), before, torch.arange(3))
        assert all(map(torch.equal, (alone, one.k, one.v), (q[:, t, None], rows.k[:, t, None], rows.v[:, t, None])))


@on_the_interpreter
@pytest.mark.parametrize("heads", [1, 6, 32])
def test_gates(heads: int) -> None:
    from target.kernels.deltanet_parts import launch_gates

    both = 12 * torch.randn(2, 3, 2 * heads, generator=torch.Generator().manual_seed(1))
    both[0, 0] = torch.tensor([-80.0, 80.0]).repeat(heads)
    b, a = both.chunk(2, dim=-1)
    a_log, bias = torch.linspace(-1, 3, heads), torch.linspace(-2, 2, heads)
    for got, right in zip(launch_gates(b, a, a_log, bias), TORCH.delta_gates(b, a, a_log, bias), strict=True):
        close(got, right)


@on_the_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("size", [8, 40, 128])
def test_the_gated_norm(dtype: torch.dtype, size: int) -> None:
    from target.kernels.deltanet_parts import launch_gated_norm

    generator = torch.Generator().manual_seed(2)
    x, product = torch.randn(2, 3, 5, size, generator=generator), torch.randn(2, 3, 7 * size, generator=generator)
    gate, weight = product.to(dtype)[..., size : 6 * size].unflatten(-1, (5, size)), torch.rand(size).to(dtype)
    got, right = launch_gated_norm(x, gate, weight, 1e-6), TORCH.silu_gated_norm(x, gate, weight, 1e-6)
    assert got.dtype == dtype
    torch.testing.assert_close(got, right, rtol=2e-3 if dtype == torch.float16 else 1e-5, atol=1e-5)


@on_the_interpreter
@pytest.mark.parametrize("grouped", [False, True])
def test_a_layer_of_fused_pieces(grouped: bool) -> None:
    """The whole layer as it is served, and its commit."""
    s = replace(sizes("square"), grouped=grouped)
    made, x = GatedDeltaNet(0, 24, s, 1e-6).requires_grad_(False), torch.randn(2, 4, 24)
    found, stores = [], []
    for rule, pieces in ((TorchRule(), TORCH), (kernel(), FUSED)):
        made.pieces = made.norm.pieces = pieces
        states = filled(s, rule)
        run = StatePass(states, torch.tensor([3, 1]))
        found.append(made(x, x, x, HybridAttend(lambda *_: x, run.recur)))
        run.commit(torch.tensor([2, 4]))
        stores.append(states.matrices)
    close(*found)
    close(*stores)


@on_the_interpreter
def test_a_row_has_the_same_bits_whoever_else_is_there() -> None:
    s, inputs = sizes("wide values"), song(sizes("wide values"), 3, 4)
    states = filled(s, kernel())
    together = StatePass(states, torch.tensor([1, 5, 3])).recur(0, inputs)
    for row, slot in enumerate((1, 5, 3)):
        alone = inputs._replace(**{n: getattr(inputs, n)[row : row + 1] for n in ("mixed", "decay", "beta")})
        assert torch.equal(StatePass(states, torch.tensor([slot])).recur(0, alone), together[row : row + 1])


@on_the_interpreter
def test_values_of_any_strides() -> None:
    s = sizes("square")
    states = filled(s, kernel())
    q, rows = delta_rows(song(s, 2, 3), torch.zeros(2, 3, s.channels))
    slots = torch.tensor([1, 2])
    expected, _ = states.rule.read(states.matrices[0], slots, q, rows, None)
    spread = rows.v.transpose(2, 3).contiguous().transpose(2, 3)
    odd = DeltaRows(rows.window, rows.k, spread, rows.decay, rows.beta)
    assert torch.equal(states.rule.read(states.matrices[0], slots, q, odd, None)[0], expected)


def test_the_twin_is_used_where_no_kernel_runs() -> None:
    assert isinstance(rule_for(torch.device("cpu")), TorchRule)
