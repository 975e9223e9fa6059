"""Products with weights: the kernels on the interpreter, the table, the choice for each shape, and the seam."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from target.decoder import Decoder
from target.errors import PlanError
from target.products import (
    Config,
    FastProduct,
    FixedProduct,
    Linear,
    Table,
    choose_products,
    default_config,
    fast_product,
    fixed_product,
    row_by_row,
)
from tests.unit.engines import tiny_target

CPU = torch.device("cpu")
CONFIGS = [
    Config(16, 32),
    Config(32, 16, split=2),
    Config(64, 64, split=3, tma=False),
    Config(128, 128, stages=2, warps=8),
    Config(16, 256, split=4),
]


@pytest.fixture
def interpreted() -> None:
    if find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs triton and TRITON_INTERPRET=1 from the start")
    numpy = pytest.importorskip("numpy")
    if tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4):
        pytest.skip("triton's interpreter converts arrays in a way numpy 2.4 forbids")


def on_the_interpreter(test):  # type: ignore[no-untyped-def]
    numpy_grumbles = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
    return numpy_grumbles(pytest.mark.usefixtures("interpreted")(test))


def inputs(
    rows: int, n: int, k: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and bias; whatever lies between the rows of x is NaN."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.full((rows, k + 16), float("nan"))
    wide[:, :k] = torch.randn(rows, k, generator=generator)
    weight, bias = torch.randn(n, k, generator=generator), torch.randn(n, generator=generator)
    return wide.to(dtype)[:, :k], weight.to(dtype), bias.to(dtype)


def close(got: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3}[got.dtype]
    torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=tolerance * x.shape[-1] ** 0.5)


# ---- the kernels, interpreted ----


@on_the_interpreter
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 48, 64), (5, 33, 72), (17, 16, 520), (70, 130, 1032), (3, 8, 2048)])
def test_the_kernels_multiply(config: Config, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    from target.kernels.skinny import multiply

    x, weight, bias = inputs(*shape, dtype)
    close(multiply(x, weight, None, config), x, weight, None)
    close(multiply(x, weight, bias, config), x, weight, bias)


@on_the_interpreter
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 140), n=st.integers(1, 150), k=st.integers(1, 80).map(lambda i: 8 * i),
    block_n=st.sampled_from([16, 32, 64, 128]), block_k=st.sampled_from([16, 64, 256]), split=st.integers(1, 9),
    tma=st.booleans(), biased=st.booleans(),
)  # fmt: skip
def test_any_shape(rows: int, n: int, k: int, block_n: int, block_k: int, split: int, tma: bool, biased: bool) -> None:
    from target.kernels.skinny import multiply

    x, weight, bias = inputs(rows, n, k)
    given_bias = bias if biased else None
    got = multiply(x, weight, given_bias, Config(block_n, block_k, split, tma=tma))
    assert got.shape == (rows, n)
    close(got, x, weight, given_bias)


@on_the_interpreter
def test_runs_are_added_first_to_last_in_float32() -> None:
    """1e8 + 1 - 1e8 is 0 in this order and 1 in another."""
    from target.kernels.skinny import multiply

    weight = torch.zeros(16, 768)
    weight[0, 0], weight[0, 256], weight[0, 512] = 1e8, 1.0, -1e8
    weight[1, 0], weight[1, 256], weight[1, 512] = 1e8, -1e8, 1.0
    out = multiply(torch.ones(2, 768), weight, None, Config(16, 64, split=3))
    assert out[:, :2].tolist() == [[0.0, 1.0]] * 2


@on_the_interpreter
def test_runs_end_at_the_same_place_whatever_the_blocks() -> None:
    """Where they end decides the bits, so it may follow from `split` alone."""
    from target.kernels.skinny import multiply

    x, weight, _ = inputs(2, 16, 1024 + 256 * 3)
    weight[0].fill_(0)
    weight[0, 0], weight[0, 900], weight[0, 1100] = 1.0, 1e8, -1e8  # the first two lie in the run of 1024
    x = torch.ones_like(x)
    for block_k in (16, 64, 256):
        assert multiply(x, weight, None, Config(16, block_k, split=2))[0, 0] == 0.0


@on_the_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("rows", "n", "k"), [(3, 70, 1032), (130, 33, 2048), (1, 16, 512), (0, 8, 1024)])
def test_the_run_that_arrives_last_adds_them_as_a_second_launch_would(
    rows: int, n: int, k: int, dtype: torch.dtype
) -> None:  # fmt: skip
    from target.kernels.skinny import multiply

    x, weight, bias = inputs(rows, n, k, dtype)
    arrived = torch.zeros(8, dtype=torch.int32)
    too_few = torch.tensor([0, 7, 7, 7, 7, 7, 7, 7], dtype=torch.int32)[:1]
    for config in (Config(32, 64, split=3), Config(16, 256, split=4, tma=False), Config(64, 64, joined=True)):
        for shift in (None, bias):
            expected = multiply(x, weight, shift, config)
            for counters in (arrived, too_few, None):  # where they are too few, a second launch
                assert torch.equal(multiply(x, weight, shift, config._replace(joined=True), counters), expected)
                assert not arrived.any()


@on_the_interpreter
@pytest.mark.parametrize("tile", [16, 32, 64, 128])
@pytest.mark.parametrize("config", CONFIGS)
def test_what_memory_is_short_of_leaves_the_order(config: Config, tile: int) -> None:
    from target.kernels.skinny import fitted, shared_bytes

    for room in (100 << 10, 40 << 10):
        found = fitted(config._replace(stages=9), tile, 2, room)
        assert shared_bytes(found, tile, 2) <= room and found.order == config.order and found.stages >= 1


@on_the_interpreter
def test_one_order_for_any_number_of_rows() -> None:
    from target.kernels.skinny import multiply

    table = Table("", {})
    product = FixedProduct(table)
    x, weight, bias = inputs(64, 96, 512)
    whole = product(x, weight, bias)
    for rows in (1, 2, 8, 33):
        part = product(x[:rows], weight, bias)
        torch.testing.assert_close(part, whole[:rows], rtol=1e-6, atol=1e-5)
    assert product(x.view(4, 16, 512), weight, bias).shape == (4, 16, 96)
    assert multiply(x[:0], weight, None, Config(16, 16)).shape == (0, 96)


# ---- the instruction, compiled without a device ----


def instructions(config: Config, tile: int) -> set[str]:
    """The matrix instructions of a product's machine code for Hopper, without what depends on the tile."""
    import re

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from target.kernels.skinny import product_kernel

    blocks = f"tensordesc<bf16[{config.block_n}, {config.block_k}]>"
    types = dict(
        x_ptr="*bf16",
        w_ptr="*bf16",
        w_blocks=blocks,
        bias_ptr="*bf16",
        out_ptr="*bf16",
        partial_ptr="*fp32",
        arrived_ptr="*i32",
        rows="i32",
        x_row="i32",
    )
    constants = dict(
        N=512, K=2048, BLOCK_N=config.block_n, BLOCK_K=config.block_k, TILE=tile, SPLIT=config.split,
        STAGES=config.stages, BIAS=False, TMA=True, JOINED=False, AHEAD=0, PDL=config.pdl,
    )  # fmt: skip
    names = product_kernel.arg_names
    source = ASTSource(
        fn=product_kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name.endswith("_ptr") or name == "x_row"
        },
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": config.warps})
    return set(
        re.findall(
            r"wgmma\.mma_async\.sync\.aligned\.m64n\d+(k\d+)|mma\.sync\.aligned\.(m\d+n8k\d+)", compiled.asm["ptx"]
        )
    )  # type: ignore[return-value]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
@pytest.mark.parametrize(("block_n", "wanted"), [(32, ("", "m16n8k16")), (64, ("k16", ""))])
def test_every_tile_gets_the_same_instruction(block_n: int, wanted: tuple[str, str]) -> None:
    """Numbers of different instructions need not round alike; along K both go 16 at a time."""
    for tile, warps in ((16, 4), (128, 8)):
        assert instructions(Config(block_n, 64, warps=warps), tile) == {wanted}


# ---- the table ----


def written(path: Path, shapes: list[dict[str, Any]], device: str = "a device") -> Path:
    path.write_text(json.dumps({"device": device, "shapes": shapes}), encoding="utf-8")
    return path


SHAPE = {
    "n": 96, "k": 64, "fixed": {"block_n": 64, "block_k": 64, "split": 2},
    "tiles": {"16": {"block_n": 16, "block_k": 64}, "32": "library", "64": {"block_n": 32, "block_k": 32}},
}  # fmt: skip


def test_a_table_says_which_product_a_shape_gets(tmp_path: Path) -> None:
    table = Table.read(written(tmp_path / "t.json", [SHAPE]))
    assert table.fast(96, 64, 1) == table.fast(96, 64, 16) == Config(16, 64)
    assert table.fast(96, 64, 17) is None and table.fast(96, 64, 64) == Config(32, 32)
    assert table.fast(96, 64, 65) is None and table.fast(64, 96, 1) is None
    assert table.fixed(96, 64) == Config(64, 64, 2)
    assert table.fixed(5000, 64) == default_config(5000, 64)


def test_the_table_that_comes_along_can_be_read() -> None:
    table = Table.read()
    for entry in table.entries.values():
        assert entry.fixed.warps in (4, 8)
    assert bool(table.entries) == bool(table.device)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fixed": {"block_n": 48, "block_k": 64}}, "block_n=48.*cannot be compiled"),
        ({"fixed": {"block_n": 64}}, "missing 1 required positional argument"),
        ({"tiles": {"20": "library"}}, "tiles of .16, 32, 64., not .20."),
        ({"tiles": {"16": "cublas"}}, "no table of products"),
    ],
)
def test_a_wrong_table_is_one_sentence(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        Table.read(written(tmp_path / "t.json", [{**SHAPE, **change}]))
    with pytest.raises(PlanError, match="nowhere.json is no table of products: FileNotFoundError"):
        Table.read(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    ("n", "k"), [(4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336), (128256, 4096), (64, 64)]
)
def test_the_default_fills_a_device_with_runs_that_are_long_enough(n: int, k: int) -> None:
    config = default_config(n, k)
    assert config.split == 1 or k // config.split >= 512
    assert -(-n // 64) * config.split >= 120 or config.split == 8 or k // (2 * config.split) < 512


# ---- the choice and the seam ----


def test_where_no_kernel_can_run_torch_multiplies() -> None:
    assert fast_product(CPU) is F.linear
    assert fast_product(CPU, Table("a device", {})) is F.linear


def test_a_shape_that_was_not_measured_is_torchs_to_the_bit() -> None:
    x, weight, bias = inputs(5, 24, 40)
    assert torch.equal(FastProduct(Table.none())(x, weight, bias), F.linear(x, weight, bias))


def test_types_that_were_not_measured_are_torchs_to_the_bit(tmp_path: Path) -> None:
    table = Table.read(written(tmp_path / "t.json", [SHAPE]))
    x, weight, bias = inputs(5, 96, 64)
    assert torch.equal(FastProduct(table)(x, weight, bias), F.linear(x, weight, bias))


@on_the_interpreter
def test_a_measured_shape_is_multiplied_by_its_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from target.kernels import skinny

    used: list[Config] = []
    plain = skinny.multiply
    monkeypatch.setattr(skinny, "multiply", lambda *inputs: used.append(inputs[3]) or plain(*inputs))
    product = FastProduct(Table.read(written(tmp_path / "t.json", [SHAPE])))
    for rows in (1, 20, 40):
        x, weight, bias = inputs(rows, 96, 64, torch.float16)
        close(product(x, weight, bias), x, weight, bias)
    assert used == [Config(16, 64), Config(32, 32)]


def test_on_a_cpu_the_fixed_order_is_one_row_at_a_time() -> None:
    product = fixed_product(CPU)
    assert product is row_by_row
    x, weight, bias = inputs(37, 61, 40)
    whole = product(x.unflatten(0, (1, 37)), weight, bias)
    close(whole[0], x, weight, bias)
    for row in range(37):
        assert torch.equal(product(x[row : row + 1], weight, bias)[0], whole[0, row])
    assert product(x[:0], weight, bias).shape == (0, 61)


def test_every_product_of_a_decoder_goes_through_the_seam() -> None:
    model = tiny_target()
    seen: list[tuple[int, ...]] = []

    def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        seen.append(tuple(weight.shape))
        return F.linear(x, weight, bias)

    choose_products(model, product)
    logits = run(model)
    assert torch.equal(logits, run(tiny_target()))
    layer = [(64, 32), (32, 32), (96, 32), (32, 48)]
    assert seen == layer * 6 + [(61, 32)]


def run(model: Decoder) -> Tensor:
    tokens = torch.arange(5)[None]
    return model.logits(model(tokens, tokens, lambda layer, q, k, v, window: q).final)


def test_a_linear_of_the_seam_is_nn_linear_otherwise() -> None:
    torch.manual_seed(0)
    ours = Linear(8, 4)
    torch.manual_seed(0)
    torchs = nn.Linear(8, 4)
    x = torch.randn(3, 8)
    assert torch.equal(ours(x), torchs(x)) and ours.state_dict().keys() == torchs.state_dict().keys()
