"""Products with packed weights: exact where they are taken, refused where they would not be."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from graphs.tape import TapeRecorder
from speculator.arithmetic import choose_arithmetic
from speculator.config import load
from target import packed
from target.decoder import Decoder
from target.packed import PackedProduct, kernels_here, pack
from target.products import library
from tests.unit.engines import tiny_head, tiny_target

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not kernels_here(), reason="this torch or this processor has no FBGEMM float16 kernels")


@pytest.fixture(autouse=True)
def one_thread() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def weights(n: int, k: int, scale: float = 1.0) -> Tensor:
    """As a bfloat16 file holds them."""
    return (torch.randn(n, k, generator=torch.Generator().manual_seed(n * k)) * scale).bfloat16().float()


def rounded(model: Decoder) -> Decoder:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return model


@pytest.mark.parametrize("scale", [1e-6, 0.02, 1.0, 3e4, 1e30])
@pytest.mark.parametrize("bias", [False, True])
def test_products_are_those_of_the_weights_as_they_are(scale: float, bias: bool) -> None:
    weight, x = weights(40, 72, scale), torch.randn(2, 3, 72)
    b = torch.randn(40) * scale if bias else None
    product = PackedProduct()
    assert product.take(weight)
    exact = F.linear(x.double(), weight.double(), None if b is None else b.double())
    assert (product(x, weight, b) - exact).abs().max() <= 4e-6 * scale * 72**0.5


def test_no_small_weight_is_lost_beside_a_large_one() -> None:
    weight = torch.zeros(16, 16)
    weight[0, 0], weight[1, 1] = 3.0, 2.0**-21 * 1.9921875  # a subnormal float16 as it stands, with eight bits
    product = PackedProduct()
    assert product.take(weight)
    assert torch.equal(product(torch.eye(16), weight, None), weight.t())


@pytest.mark.parametrize("wrong", [1.0 + 2.0**-12, 2.0**-40, float("nan"), float("inf")])
def test_weights_that_would_change_are_not_packed(wrong: float) -> None:
    weight = torch.ones(16, 16)
    weight[3, 5] = wrong
    assert pack(weight) is None


@pytest.mark.parametrize("other", [torch.ones(4, 4, dtype=torch.bfloat16), torch.ones(4), torch.ones(0, 4)])
def test_other_tensors_are_not_packed(other: Tensor) -> None:
    assert pack(other) is None


def test_weights_of_zeros_and_transposed_ones_are_packed() -> None:
    product, zeros, turned = PackedProduct(), torch.zeros(8, 8), weights(24, 40).t()
    assert product.take(zeros) and product.take(turned)
    assert not product(torch.ones(1, 8), zeros, None).any()
    torch.testing.assert_close(product(torch.ones(1, 24), turned, None), turned.sum(1)[None])


def test_other_views_of_packed_weights_are_multiplied_as_they_are() -> None:
    weight, x, product = weights(24, 24), torch.randn(3, 24), PackedProduct()
    assert product.take(weight)
    for view in (weight[:16], weight.t()):
        torch.testing.assert_close(product(x, view, None), F.linear(x, view))


def test_a_row_has_the_same_bits_in_any_company() -> None:
    weight, x, product = weights(200, 96), torch.randn(40, 96), PackedProduct()
    assert product.take(weight)
    together = product(x, weight, None)
    for rows in (1, 2, 5, 6, 14, 15):
        assert torch.equal(product(x[3 : 3 + rows], weight, None), together[3 : 3 + rows])


def test_an_engine_takes_them_for_all_products_of_target_and_head() -> None:
    target = rounded(tiny_target())
    head = tiny_head(target, "eagle3")
    rounded(head)  # type: ignore[arg-type]
    tokens = torch.arange(5)[None]

    def logits() -> Tensor:
        return target.logits(target(tokens, tokens, lambda layer, q, k, v, window: q).final)

    before = logits()
    choose_arithmetic(load(None, []), target, head, CPU, "off")
    calls: list[Tensor] = []
    real = PackedProduct.__call__

    def noted(self: PackedProduct, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        assert weight.data_ptr() in self._packed
        calls.append(weight)
        return real(self, x, weight, bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PackedProduct, "__call__", noted)
        torch.testing.assert_close(logits(), before, rtol=1e-4, atol=1e-5)
        count = len(calls)
        hidden = head.fuse(torch.randn(1, 5, head.record.feature_size))
        head.logits(head(hidden, tokens, tokens, lambda layer, q, k, v, window: q))
    assert count == 4 * len(target.layers) + 1 and len(calls) == count + 6


def test_torch_multiplies_where_that_is_asked() -> None:
    target = rounded(tiny_target())
    choose_arithmetic(load(None, ["engine.products=torch"]), target, None, CPU, "off")
    assert target.product in (library, F.linear)


@pytest.mark.parametrize("bias", [None, torch.ones(40)])
@torch.inference_mode()
def test_a_recorded_product_is_computed_at_each_replay(bias: Tensor | None) -> None:
    weight, x, product, tape = weights(40, 72), torch.randn(2, 3, 72), PackedProduct(), TapeRecorder(True)
    assert product.take(weight)
    out, recording = tape.record(lambda: product(x, weight, bias) + 1)
    assert out.isnan().all()
    for _ in range(2):
        x.normal_()
        recording.replay()
        assert torch.equal(out, product(x, weight, bias) + 1)


@pytest.mark.parametrize("missing", ["threads", "kernels"])
def test_nothing_is_packed_for_many_threads_or_without_kernels(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing == "threads":
        torch.set_num_threads(packed.THREADS + 1)
    else:
        monkeypatch.setattr(packed, "kernels_here", lambda: False)
    target = rounded(tiny_target())
    assert packed.pack_products(target, target.head_weight) == 0 and target.product is F.linear


def test_a_torch_without_the_functions_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "fbgemm_pack_gemm_matrix_fp16")
    assert kernels_here.__wrapped__() is False
