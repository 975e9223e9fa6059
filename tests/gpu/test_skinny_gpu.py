"""Products of few rows on a CUDA device: numbers, bits of a row, recorded launches, the table's choices."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from target.products import (
    MOST_BLOCKS,
    TILES,
    Config,
    FastProduct,
    FixedProduct,
    Table,
    default_config,
    fast_product,
    fixed_product,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(find_spec("triton") is None, reason="needs triton"),
]
CUDA = torch.device("cuda")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CONFIGS = [
    Config(16, 256),
    Config(32, 256, stages=6),
    Config(64, 128, split=2),
    Config(64, 64, split=4, stages=6, tma=False),
    Config(128, 128, split=3, warps=8),
    Config(64, 128, split=2, pdl=True),
    Config(32, 128, pdl=True),
]
SHAPES = [(4096, 4096), (6144, 4096), (2048, 8192), (1000, 1032)]
ROWS = [1, 2, 7, 8, 16, 17, 33, 64, 65, 200]


@pytest.fixture(autouse=True, scope="module")
def full_float32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def inputs(rows: int, n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and bias; whatever lies between the rows of x is NaN."""
    generator = torch.Generator("cuda").manual_seed(rows + n)
    wide = torch.full((rows, k + 64), float("nan"), device="cuda")
    wide[:, :k] = torch.randn(rows, k, generator=generator, device="cuda")
    weight = torch.randn(n, k, generator=generator, device="cuda") * 0.05
    return wide.to(dtype)[:, :k], weight.to(dtype), torch.randn(n, generator=generator, device="cuda").to(dtype)


def close(got: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    tolerance = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}[got.dtype]
    torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers(config: Config, dtype: torch.dtype) -> None:
    from target.kernels.skinny import multiply

    for rows in (1, 8, 17, 64, 130):
        x, weight, bias = inputs(rows, 1000, 1032, dtype)
        close(multiply(x, weight, None, config), x, weight, None)
        close(multiply(x, weight, bias, config), x, weight, bias)


@pytest.mark.parametrize("shape", SHAPES)
def test_numbers_of_large_shapes(shape: tuple[int, int]) -> None:
    from target.kernels.skinny import multiply

    for config in (default_config(*shape), *CONFIGS):
        x, weight, _ = inputs(8, *shape, torch.bfloat16)
        close(multiply(x, weight, None, config), x, weight, None)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_any_company(config: Config, dtype: torch.dtype) -> None:
    from target.kernels.skinny import multiply

    x, weight, bias = inputs(200, 1536, 2048, dtype)
    whole = multiply(x, weight, bias, config)
    for rows in ROWS:
        for begin in (0, 200 - rows, (200 - rows) // 3):
            part = multiply(x[begin : begin + rows], weight, bias, config)
            assert torch.equal(part, whole[begin : begin + rows]), (rows, begin)


@pytest.mark.parametrize(
    "config", [Config(64, 128, split=4), Config(16, 256, split=8), Config(32, 64, split=2, tma=False)]
)
@pytest.mark.parametrize("rows", [1, 8, 64, 130])
def test_the_run_that_arrives_last_adds_them_as_a_second_launch_would(config: Config, rows: int) -> None:
    from target.kernels.skinny import multiply

    x, weight, bias = inputs(rows, 4096, 4096, torch.bfloat16)
    arrived = torch.zeros(MOST_BLOCKS, dtype=torch.int32, device="cuda")
    for shift in (None, bias):
        expected = multiply(x, weight, shift, config)
        for _ in range(50):
            assert torch.equal(multiply(x, weight, shift, config._replace(joined=True), arrived), expected)
    assert not arrived.any()


@pytest.mark.parametrize("block_n", [32, 64])
def test_configurations_of_one_order_give_equal_bits(block_n: int) -> None:
    """What stages, warps, TMA and the length of a block are is free to follow the number of rows."""
    from target.kernels.skinny import multiply

    x, weight, _ = inputs(33, 1536, 2048, torch.bfloat16)
    first = Config(block_n, 128, split=2)
    others = [
        first._replace(block_k=64, stages=3),
        first._replace(warps=8, tma=False),
        first._replace(block_n=128 if block_n == 64 else 16, pdl=True),
    ]
    expected = multiply(x, weight, None, first)
    for other in others:
        assert other.order == first.order and torch.equal(multiply(x, weight, None, other), expected), other


def test_the_fixed_product_of_every_shape_in_the_table_keeps_its_bits() -> None:
    table = Table.read()
    product = fixed_product(CUDA, table)
    shapes = [shape for shape in table.entries if shape[0] < 40_000] or SHAPES[:2]
    for n, k in shapes:
        x, weight, _ = inputs(70, n, k, torch.bfloat16)
        whole = product(x, weight, None)
        for rows in (1, 8, 64):
            assert torch.equal(product(x[3 : 3 + rows], weight, None), whole[3 : 3 + rows]), (n, k, rows)


def test_the_fast_product_of_every_shape_in_the_table_is_right() -> None:
    table = Table.read()
    for (n, k), entry in table.entries.items():
        if n > 40_000 or set(entry.tiles) != set(TILES):
            continue
        for rows in (1, 20, 64, 65):
            x, weight, _ = inputs(rows, n, k, torch.bfloat16)
            close(FastProduct(table)(x, weight, None), x, weight, None)


@pytest.mark.parametrize("pdl", [False, True])
def test_recorded_launches_replay_new_values(pdl: bool) -> None:
    """A chain of products, each of which reads what the launch before it wrote."""
    product = FixedProduct(Table("", {}))
    x, weight, _ = inputs(8, 1024, 1024, torch.bfloat16)
    x = x.contiguous()
    from target.kernels.skinny import multiply

    config = Config(64, 128, split=2, pdl=pdl)

    def chain() -> Tensor:
        y = x
        for _ in range(6):
            y = multiply(y, weight, None, config)
        return y

    chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain()
    for seed in range(5):
        x.copy_(torch.randn(x.shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda"))
        graph.replay()
        torch.cuda.synchronize()
        replayed = out.clone()
        assert torch.equal(replayed, chain()) and replayed.isfinite().all()
    assert product(x, weight, None).shape == (8, 1024)


def test_another_device_than_the_tables_is_served_by_torch() -> None:
    assert fast_product(CUDA, Table("another device", {})) is torch.nn.functional.linear
    assert isinstance(fast_product(CUDA, Table(torch.cuda.get_device_name(), {})), FastProduct)
