"""Programmatic dependent launch: the switch, and what kernels do before they wait, in code compiled for Hopper."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from target import pdl
from target.attention.base import bind
from target.batch import Batch
from target.cache import PagedCache
from target.config import parse_config
from target.decoder import Decoder, cache_layer_shape
from target.errors import PlanError
from target.fused import FUSED, FUSED_PDL, fuse, fuse_where_possible
from target.layers import RMSNorm
from target.products import (
    Behind,
    Config,
    Entry,
    FastProduct,
    FixedProduct,
    Table,
    choose_products,
    fixed_product,
    launched,
)
from target.readout import Asked

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
OURS = Config(32, 256, stages=4, pdl=True, ahead=32)


# ---- the switch ----


def test_the_switch_is_on_or_off_and_needs_a_device_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(pdl.OVERRIDE, raising=False)
    assert pdl.pdl_wanted()
    for word, wanted in (("on", True), ("off", False), ("", True)):
        monkeypatch.setenv(pdl.OVERRIDE, word)
        assert pdl.pdl_wanted() == wanted and not pdl.pdl_on(CPU)
    monkeypatch.setenv(pdl.OVERRIDE, "yes")
    with pytest.raises(PlanError, match="unknown SPECULATOR_PDL 'yes': on or off"):
        pdl.pdl_on(CPU)


@pytest.mark.parametrize(("capability", "possible"), [((8, 9), False), ((9, 0), True), ((10, 0), True)])
def test_which_devices_have_it(
    capability: tuple[int, int], possible: bool, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    pdl.pdl_possible.cache_clear()
    try:
        assert pdl.pdl_possible(CUDA) == possible and not pdl.pdl_possible(CPU)
    finally:
        pdl.pdl_possible.cache_clear()


@pytest.fixture
def able(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that can, as far as choices go."""
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "a device")
    for module in ("target.products", "target.fused"):
        monkeypatch.setattr(f"{module}.kernels_need", lambda device: "")
    monkeypatch.setattr(pdl, "pdl_possible", lambda device: True)
    monkeypatch.setattr("target.products._none_arrived", lambda device: None)


@pytest.mark.parametrize("word", ["on", "off"])
def test_a_table_is_launched_as_the_switch_says(word: str, able: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured to be faster without stays without; what was not measured follows the switch."""
    monkeypatch.setenv(pdl.OVERRIDE, word)
    plain = Config(64, 128)
    entries = {(96, 64): Entry(plain, {16: OURS, 32: plain, 64: None}), (64, 96): Entry(OURS, {})}
    product = fixed_product(CUDA, Table("a device", entries))
    assert isinstance(product, FixedProduct)
    found = product.table.fast(96, 64, 1)
    assert found == OURS._replace(pdl=word == "on") and found.order == OURS.order
    assert product.table.fast(96, 64, 32) == plain and product.table.fast(96, 64, 64) is None
    assert product.table.fixed(96, 64) == plain
    assert product.table.fixed(64, 96) == OURS._replace(pdl=word == "on")
    assert product.table.fixed(5000, 64).pdl == (word == "on")
    other = fixed_product(CUDA, Table("another device", entries))
    assert isinstance(other, FixedProduct) and other.table.fast(96, 64, 1) is None


@pytest.mark.parametrize(("word", "pieces"), [("on", FUSED_PDL), ("off", FUSED)])
def test_fused_pieces_follow_the_switch(word: str, pieces: object, able: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECULATOR_FUSED", "on")
    monkeypatch.setenv(pdl.OVERRIDE, word)
    norm = RMSNorm(8, 1e-5)
    assert fuse_where_possible(CUDA, norm) == 1 and norm.pieces is pieces


def test_without_the_switch_a_configuration_is_the_same_but_for_the_launch() -> None:
    assert launched(OURS, True) is OURS and launched(OURS, False) == OURS._replace(pdl=False)


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
def test_how_far_weights_are_asked_for() -> None:
    from target.kernels.dependent import asking, columns_ahead

    assert columns_ahead(64, 32, 2) == 1024 and columns_ahead(64, 16, 2) == 2048 and columns_ahead(63, 32, 2) == 512
    assert columns_ahead(0, 32, 2) == 0 and columns_ahead(1, 32, 2) == 0 and columns_ahead(2, 32, 2) == 32
    on_a_cpu = asking(OURS, 32, 1, torch.zeros(1), Behind(torch.zeros(64, 64), 1, 1 << 20))
    assert (on_a_cpu["AHEAD"], on_a_cpu["PDL"], on_a_cpu["NEXT_BYTES"]) == (0, False, 0)


# ---- what is launched, compiled ----

pytest_compiles = [
    pytest.mark.skipif(find_spec("triton") is None, reason="needs triton"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
]


def compiles(test: Any) -> Any:
    for mark in pytest_compiles:
        test = mark(test)
    return test


class Launch(NamedTuple):
    """A kernel as it was launched, without having run."""

    kernel: Any
    values: dict[str, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Every launch from here on, on tensors of a CPU that passes for a device that can."""
    from triton.runtime.jit import JITFunction

    seen: list[Launch] = []

    def recorded(kernel: Any, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            names = set(kernel.arg_names)
            values = dict(zip(kernel.arg_names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
            seen.append(Launch(kernel, values, {k: v for k, v in kwargs.items() if k not in names}))

        return launch

    monkeypatch.setattr(JITFunction, "__getitem__", recorded)
    monkeypatch.setattr("target.kernels.dependent.pdl_possible", lambda device: True)
    return seen


def type_of(value: Any) -> str:
    from triton.tools.tensor_descriptor import TensorDescriptor

    reals = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    names = reals | {torch.int64: "i64", torch.int32: "i32", torch.bool: "i1"}
    if isinstance(value, Tensor):
        return f"*{names[value.dtype]}"
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{names[value.base.dtype]}{list(value.block_shape)}>"
    return "fp32" if isinstance(value, float) else "i32"


def ptx(launch: Launch) -> str:
    """Its code for Hopper."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, names = launch.kernel, launch.kernel.arg_names
    constant = {p.name for p in kernel.params if p.is_constexpr}
    assert set(launch.values) == set(names)
    source = ASTSource(
        fn=kernel,
        signature={n: "constexpr" if n in constant else type_of(launch.values[n]) for n in names},
        constexprs={(names.index(n),): launch.values[n] for n in constant},
        attrs={(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if isinstance(launch.values[n], Tensor)},
    )
    return str(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch.options).asm["ptx"])


TOUCHES = re.compile(r"^\s*(?:@!?%p\d+ )?((?:ld|st|atom|red|cp)\.[\w.:]*(?:global|bulk|async)[\w.:]*)", re.MULTILINE)
LOADS_WEIGHTS = ("norm_kernel", "turn_kernel")  # and nothing else of what they read is constant
ASKS = ("product_kernel", "gated_kernel", "read_kernel")


def check(launch: Launch) -> None:
    """It waits, before it touches anything but weights, and lets the next launch begin after that."""
    assert launch.options["launch_pdl"] is True and launch.values["PDL"] is True, launch.name
    before, waits, after = ptx(launch).partition("griddepcontrol.wait;")
    assert waits and "griddepcontrol.launch_dependents" in after, launch.name
    assert "griddepcontrol.launch_dependents" not in before, launch.name
    touched = TOUCHES.findall(before)
    assert all(each.startswith("ld.") for each in touched) if launch.name in LOADS_WEIGHTS else not touched, launch.name
    assert ("prefetch.global.L2" in before) == (launch.name in ASKS), launch.name
    assert TOUCHES.search(after) and "prefetch.global" not in after, launch.name
    assert not re.search(r"\bret;", before), launch.name


def a_layer(queries: int, product: Any, pieces: Any) -> None:
    """Launch what a layer of a small Llama with per-head norms launches."""
    from target.attention.triton import TritonAttention

    config = parse_config(dict(
        architectures=["Qwen3ForCausalLM"], vocab_size=64, hidden_size=256, intermediate_size=512, head_dim=64,
        num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5, rope_theta=1e4,
        max_position_embeddings=4096,
    ))  # fmt: skip
    model = Decoder(config).to(torch.bfloat16).requires_grad_(False)
    choose_products(model, product)
    assert fuse(model, pdl=pieces) > 0
    cache = PagedCache([[cache_layer_shape(config)]], 33, 64, torch.bfloat16)
    positions = torch.arange(queries)[None]
    one = torch.ones(1, dtype=torch.int64)
    batch = Batch(positions, positions, one, one * queries, torch.arange(1, 33)[None], longest=2048, static=True)
    attend = bind(TritonAttention(cache, pdl=pieces), batch)
    x = torch.zeros(1, queries, 256, dtype=torch.bfloat16)
    model.layers[0].advance(x, x, *model.rope(positions, x.dtype), attend)


@compiles
@pytest.mark.parametrize("queries", [1, 16, 70])
def test_every_kernel_of_a_layer_waits_before_it_touches_anything(queries: int, launches: list[Launch]) -> None:
    a_layer(queries, FixedProduct(Table("", {}, pdl=True)), True)
    joined = {1: [], 16: ["combine_kernel"], 70: []}[queries]
    attention = ["rope_write_kernel"] * (queries > 64) + ["split_kernel", *joined]
    mlp = ["product_kernel", "silu_mul_kernel", "product_kernel"]  # a fixed order keeps the product by itself
    wanted = ["turn_kernel", "norm_kernel", "product_kernel", *attention, "product_kernel", "norm_kernel", *mlp]
    assert [launch.name for launch in launches] == wanted
    for launch in {launch.name: launch for launch in launches}.values():
        check(launch)


@compiles
@pytest.mark.parametrize("tma", [True, False])
def test_so_do_products_in_parts_with_silu_and_of_the_vocabulary(tma: bool, launches: list[Launch]) -> None:
    from target.kernels.lm_head import launch_read
    from target.kernels.silu import launch_gated
    from target.kernels.skinny import multiply

    x, weight = torch.zeros(8, 512, dtype=torch.bfloat16), torch.zeros(1024, 512, dtype=torch.bfloat16)
    in_parts, arrived = Config(64, 128, split=2, tma=tma, pdl=True), torch.zeros(64, dtype=torch.int32)
    multiply(x, weight, weight[:, 0].contiguous(), in_parts)
    multiply(x, weight, weight[:, 0].contiguous(), in_parts._replace(joined=True), arrived)
    launch_gated(x, weight, None, OURS._replace(tma=tma, block_k=64))
    launch_read(x, weight, Asked(best=2), OURS._replace(tma=tma))
    assert [launch.name for launch in launches] == [
        "product_kernel", "sum_kernel", "product_kernel", "gated_kernel", "read_kernel", "merge_kernel"
    ]  # fmt: skip
    for launch in launches:
        check(launch)


@compiles
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_so_do_those_that_read_written_logits(dtype: torch.dtype, launches: list[Launch]) -> None:
    """Filters and noise, a vocabulary of its own, rows of any distance and one row alone."""
    from speculator.kernels.floor import launch_floor
    from target.kernels.lm_head import launch_written

    for rows, width in ((6, 131072), (1, 1024)):
        logits, each = torch.zeros(rows, width, dtype=dtype)[:, :1003], rows // 2 or 1
        warm, keys, few = torch.ones(rows), torch.ones(rows, dtype=torch.int64), torch.ones(rows // each)
        least = launch_floor(logits, warm, few.long(), few / 2, few, each, pdl=True)
        asked = Asked(10, warm, keys, torch.arange(1003), ranked=True)
        launch_written(logits, asked, least, pdl=True)
        launch_written(logits, Asked(), pdl=True)
    assert [launch.name for launch in launches] == [
        "floor_kernel", "written_kernel", "merge_kernel", "written_kernel", "merge_kernel"
    ] * 2  # fmt: skip
    for launch in launches:
        check(launch)


@compiles
def test_and_what_is_launched_between_layers(launches: list[Launch]) -> None:
    from target.kernels.gqa import launch_store
    from target.kernels.norm import launch_beside

    x, weight = torch.zeros(2, 3, 64, dtype=torch.bfloat16), torch.zeros(64, dtype=torch.bfloat16)
    ids, one = torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, dtype=torch.int64)
    launch_beside(ids, torch.zeros(9, 64, dtype=torch.bfloat16), weight, 0.1, x, weight, 0.1, True)
    heads = torch.zeros(2, 3, 2, 64, dtype=torch.bfloat16)
    batch = Batch(ids, ids, one, one, torch.ones(2, 4, dtype=torch.int64), longest=9)
    launch_store(batch, heads, heads, torch.zeros(99, 2, 2, 64, dtype=torch.bfloat16), 4, True)
    for launch in launches:
        check(launch)
    assert [launch.name for launch in launches] == ["beside_kernel", "store_kernel"]


@compiles
def test_off_no_kernel_is_launched_so(launches: list[Launch]) -> None:
    a_layer(1, FastProduct(Table("", {(768, 256): Entry(OURS, {})})), False)
    a_layer(1, FixedProduct(Table.none()), False)
    assert len(launches) > 10
    for launch in launches:
        assert launch.values["PDL"] is False and "launch_pdl" not in launch.options
    assert "griddepcontrol" not in ptx(launches[-1])
