"""Fused pieces of layers beside torch's, on the interpreter: kernels, attention from a qkv product, models, counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from targets import Rig, Twins, some_tokens, twins
from test_gqa import SCENES, WINDOWS, Scene, close, interpreted, on_the_interpreter, oracle, scene  # noqa: F401
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from target.attention.base import Turn, bind, fused_form
from target.attention.dense import attend_causal
from target.attention.sdpa import SdpaAttention
from target.batch import Batch, causal_positions
from target.cache import LayerShape, PagedCache
from target.config import RopeConfig
from target.deltanet import HybridAttend
from target.errors import PlanError
from target.fused import FUSED, GATED, GATED_MANY, fuse, fuse_where_possible, gated_config
from target.gated import GatedAttention
from target.layers import TORCH, GatedMLP, RMSNorm, SelfAttention, ZeroCentredNorm
from target.products import Config, Entry, FastProduct, FixedProduct, Linear, Table, library
from target.rope import Rope, rotate, rotate_pairs

CPU = torch.device("cpu")
# operators that only look at memory in another way
NO_KERNELS = {"_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "empty", "expand", "new_empty",
              "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unsqueeze",
              "view"}  # fmt: skip


def ulps(got: Tensor, expected: Tensor) -> int:
    """How many values of their type lie between two tensors, at most."""
    integer = torch.int16 if got.element_size() == 2 else torch.int32
    least = torch.iinfo(integer).min

    def ordered(x: Tensor) -> Tensor:
        bits = x.contiguous().view(integer).long()
        return torch.where(bits < 0, least - bits, bits)

    return int((ordered(got) - ordered(expected)).abs().max()) if got.numel() else 0


def noise(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device = CPU, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


# ---- norms ----

NORMED = [(1, 1, 48), (3, 5, 64), (2, 1, 1000), (0, 4, 32), (7, 16), (2, 2560)]


def check_norms(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
    """With and without a residual add, of both kinds, also of slices of wider rows."""
    for kind in (RMSNorm, ZeroCentredNorm):
        norm = kind(shape[-1], 1e-5)
        norm.weight.data.add_(noise(shape[-1], seed=3) * 0.3)
        norm = norm.to(device, dtype).requires_grad_(False)
        wide = noise(*shape[:-1], 3 * shape[-1], dtype=dtype, device=device)
        x, more, _ = wide.chunk(3, dim=-1)
        total, got = FUSED.add_norm(norm, x, more)
        assert torch.equal(total, x + more)
        assert torch.equal(got, FUSED.norm(norm, total))
        bound = 1 if dtype != torch.float32 else 8
        assert ulps(got, _normed(norm, x + more)) <= bound
        assert ulps(FUSED.norm(norm, x), _normed(norm, x)) <= bound


def _normed(norm: RMSNorm, x: Tensor) -> Tensor:
    weight = norm.weight.float() + isinstance(norm, ZeroCentredNorm)
    return F.rms_norm(x.float(), weight.shape, weight, norm.eps).to(x.dtype)


@on_the_interpreter
@pytest.mark.parametrize("shape", NORMED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_norms_round_as_torch_does(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_norms(shape, dtype, CPU)


@on_the_interpreter
def test_programs_of_norms_have_as_many_warps_as_triton_takes() -> None:
    """Of the hidden sizes of models; the interpreter itself takes any."""
    from target.kernels.norm import warps

    sizes = (48, 1024, 2048, 2560, 3072, 3584, 4096, 5120, 7168, 8192, 16384)
    assert [warps(size) for size in sizes] == [1, 2, 4, 8, 8, 8, 8, 16, 16, 16, 16]


@on_the_interpreter
def test_what_is_not_added_yet_is_added_once() -> None:
    norm = RMSNorm(16, 1e-5).requires_grad_(False)
    fuse(norm)
    x, more = noise(2, 3, 16), noise(2, 3, 16, seed=1)
    assert norm.after(x, None)[0] is x
    total, normed = norm.after(x, more)
    assert torch.equal(total, x + more) and torch.equal(normed, norm(total))


def check_beside(count: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
    """With and without a norm of the embedding; x is a slice of wider rows."""
    table = noise(11, size, dtype=dtype, device=device, seed=4)
    tokens = torch.randint(0, 11, (count, 2), generator=torch.Generator().manual_seed(5)).to(device)
    x = noise(count, 2, 3 * size, dtype=dtype, device=device).chunk(3, dim=-1)[1]
    norm, other = (RMSNorm(size, eps).requires_grad_(False) for eps in (1e-5, 1e-3))
    for n, seed in ((norm, 6), (other, 7)):
        n.weight.data.add_(noise(size, seed=seed) * 0.3)
    norm, other = norm.to(device, dtype), other.to(device, dtype)
    for beside in (None, other):
        got, expected = (pieces.beside(norm, x, beside, table, tokens) for pieces in (FUSED, TORCH))
        assert got.shape == expected.shape == (count, 2, 2 * size)
        assert ulps(got, expected) <= (1 if dtype != torch.float32 else 8)


@on_the_interpreter
@pytest.mark.parametrize(("count", "size"), [(1, 48), (3, 64), (0, 32), (5, 1000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_embedding_and_a_hidden_state_are_normed_side_by_side(count: int, size: int, dtype: torch.dtype) -> None:
    check_beside(count, size, dtype, CPU)


# ---- rotary tables ----

ROPES = [
    RopeConfig(500000.0),
    RopeConfig(10000.0, "yarn", {"factor": 4.0, "original_max_position_embeddings": 1024}, 4096),
]


def check_tables(config: RopeConfig, dim: int, interleaved: bool, device: torch.device) -> None:
    """Positions far out, in any shape; the twin is torch in float32."""
    rope = Rope(config, dim, interleaved).to(device)
    positions = torch.tensor([[0, 1, 63, 4095], [7, 100_000, 131_071, 2]], device=device)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        rope.tables = None
        expected = rope(positions, dtype)
        fuse(rope)
        assert rope.tables is not None
        rounding = 2 * torch.finfo(dtype).eps
        for got, table in zip(rope(positions, dtype), expected, strict=True):
            assert got.dtype == dtype and got.is_contiguous()
            torch.testing.assert_close(got, table, rtol=rounding, atol=rounding)
    assert rope(positions[:0], torch.float32)[0].shape == (0, 4, 1, dim)


@on_the_interpreter
@pytest.mark.parametrize("config", ROPES, ids=lambda config: config.kind)
@pytest.mark.parametrize(("dim", "interleaved"), [(64, False), (48, False), (64, True)])
def test_rotary_tables(config: RopeConfig, dim: int, interleaved: bool) -> None:
    check_tables(config, dim, interleaved, CPU)


@on_the_interpreter
def test_tables_that_depend_on_the_length_stay_with_torch() -> None:
    rope = Rope(RopeConfig(10000.0, "dynamic", {"factor": 2.0}, 64), 32)
    positions = torch.arange(200)
    expected = rope(positions, torch.float32)
    fuse(rope)
    assert all(torch.equal(a, b) for a, b in zip(rope(positions, torch.float32), expected, strict=True))


# ---- SiLU-mul ----

GATES = [(1, 8, 16), (5, 56, 48), (17, 72, 40), (64, 130, 64), (70, 64, 33), (0, 64, 32)]  # rows, inner, size


def check_silu_mul(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
    from target.kernels.silu import launch_silu_mul

    both = 3 * noise(*shape, dtype=dtype, device=device)
    gate, up = both.chunk(2, dim=-1)
    assert ulps(launch_silu_mul(both), F.silu(gate) * up) <= (2 if dtype != torch.float32 else 16)
    assert torch.equal(launch_silu_mul(both[..., ::1].flatten(0, -2)), launch_silu_mul(both).flatten(0, -2))


@on_the_interpreter
@pytest.mark.parametrize("shape", [(3, 2, 96), (1, 3000), (0, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_silu_mul(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_silu_mul(shape, dtype, CPU)


def check_gated(
    rows: int, inner: int, size: int, bias: bool, config: Config, dtype: torch.dtype, device: torch.device
) -> None:
    """Beside the product in float32, rounded as torch rounds it; rows of x lie apart, and beside them lies NaN."""
    from target.kernels.silu import launch_gated

    x = torch.full((rows, 2 * size), math.nan, dtype=dtype, device=device)[:, :size]
    x.copy_(noise(rows, size))
    weight = noise(2 * inner, size, dtype=dtype, device=device, seed=1) * size**-0.5
    shift = noise(2 * inner, dtype=dtype, device=device, seed=2) if bias else None
    product = F.linear(x.float(), weight.float(), None if shift is None else shift.float()).to(dtype)
    gate, up = product.chunk(2, dim=-1)
    close(launch_gated(x, weight, shift, config), (F.silu(gate) * up).float())


@on_the_interpreter
@pytest.mark.parametrize(("rows", "inner", "size"), GATES)
@pytest.mark.parametrize("config", [Config(32, 32, tma=False), Config(64, 16, stages=2)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_that_ends_in_silu(rows: int, inner: int, size: int, config: Config, bias: bool) -> None:
    check_gated(rows, inner, size, bias, config, torch.float16, CPU)
    check_gated(rows, inner, size, bias, config, torch.float32, CPU)


def test_when_a_product_ends_in_silu() -> None:
    linear = Linear(64, 256).to(torch.bfloat16)
    assert gated_config(linear, 1) == gated_config(linear, 16) == GATED
    assert gated_config(linear, 17) == gated_config(linear, 64) == GATED_MANY
    assert gated_config(linear, 65) is None
    fast, split = Config(32, 64, stages=2), Config(32, 64, split=2)
    for tuned, taken in ((fast, fast), (split, GATED), (None, GATED)):
        linear.product = FastProduct(Table("a", {(256, 64): Entry(fast, {16: tuned})}))
        assert gated_config(linear, 3) == taken
    for product in (FixedProduct(Table.none()), library):
        linear.product = product
        assert gated_config(linear, 3) is None
    assert gated_config(Linear(64, 256), 3) is None


# ---- from a qkv product to attention ----

CHUNKS = ("a prompt chunk", "a long chunk of wide groups")
CHUNK: dict[str, Any] = dict(contexts=[10, 0], counts=[66, 3])  # too long to be turned inside attention
TURNS: dict[str, dict[str, Any]] = {
    "rotated": {},
    "rotated in part": dict(share=0.5),
    "in neighbouring pairs": dict(pairs=True),
    "normed first": dict(normed=True),
    "normed and in part": dict(normed=True, share=0.5),
}


def turn_of(s: Scene, share: float = 1.0, pairs: bool = False, normed: bool = False) -> Turn:
    dim, dtype, device = s.q.shape[-1], s.q.dtype, s.q.device
    rotary = int(dim * share) // 2 * 2
    config = RopeConfig(theta=100.0)
    cos, sin = Rope(config, rotary, pairs).to(device)(s.batch.positions, dtype)
    if not normed:
        return Turn(cos, sin, pairs=pairs)
    weights = (1 + 0.3 * noise(dim, dtype=dtype, device=device, seed=k) for k in (5, 6))
    return Turn(cos, sin, *weights, 1e-5, pairs)


def turned_by_torch(s: Scene, turn: Turn) -> Scene:
    """Norms and rotation as `Pieces.attend` does them."""

    def of(x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is not None:
            x = F.rms_norm(x.float(), weight.shape, weight.float(), turn.eps).to(x.dtype)
        dim = turn.cos.shape[-1]
        if not turn.pairs:
            return rotate(x, turn.cos, turn.sin)
        return torch.cat((rotate_pairs(x[..., :dim], turn.cos, turn.sin), x[..., dim:]), -1)

    return s._replace(q=of(s.q, turn.q_weight), k=of(s.k, turn.k_weight))


def run_fused(s: Scene, turn: Turn, window: int | None = None, **changes: Any) -> Tensor:
    from target.attention.triton import TritonAttention
    from target.kernels.gqa import pick

    shape = s.q.shape[1], s.q.shape[2], s.k.shape[2], s.q.shape[3]
    config = pick(*shape, s.q.dtype, s.q.device)._replace(**changes) if changes else None
    attention = TritonAttention(s.cache, config)
    valid = torch.arange(s.q.shape[1], device=s.q.device) < s.batch.counts[:, None]
    # what is padding is neither read nor stored
    qkv = torch.cat((s.q, s.k, s.v), dim=2).masked_fill(~valid[..., None, None], math.inf)
    out = attention.run_fused(attention.plan(s.batch), 1, qkv, turn, window)
    assert not attention._arrived.any()
    return out


def check_turned(s: Scene, turn: Turn, window: int | None) -> None:
    """Results and what is stored, beside torch and SDPA; padding gives zeros and is stored nowhere."""
    expected_scene = turned_by_torch(s, turn)
    expected = oracle(expected_scene, window)
    before = s.cache.layers[1].clone()
    got = run_fused(s, turn, window)
    close(got, expected)
    changed = torch.zeros(before.shape[0], dtype=torch.bool, device=before.device)
    slots = s.batch.slots(s.cache.page_size, s.cache.pad_slot)
    for r, count in enumerate(s.batch.counts.tolist()):
        stored = s.cache.layers[1][slots[r, :count]]
        keys = expected_scene.k[r, :count]
        rounding = 1e-5 if s.q.dtype == torch.float32 else 2 * torch.finfo(s.q.dtype).eps
        torch.testing.assert_close(stored[:, 0], keys, rtol=rounding, atol=rounding)  # sums that nearly cancel
        assert torch.equal(stored[:, 1], s.v[r, :count])
        changed[slots[r, :count]] = True
    same = s.cache.layers[1].nan_to_num(9.0) == before.nan_to_num(9.0)
    assert same[~changed].all()


@on_the_interpreter
@pytest.mark.parametrize("name", [name for name in SCENES if name not in ("many splits", *CHUNKS)])
def test_attention_takes_a_qkv_product(name: str) -> None:
    s = scene(**SCENES[name])
    check_turned(s, turn_of(s, normed=True, share=0.5), None)


@on_the_interpreter
@pytest.mark.parametrize("kind", TURNS)
@pytest.mark.parametrize("shape", [dict(contexts=[0, 129, 7], counts=[4, 2, 0], tree=True), CHUNK])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_turn(shape: dict[str, Any], kind: str, dtype: torch.dtype) -> None:
    s = scene(**shape, dtype=dtype)
    check_turned(s, turn_of(s, **TURNS[kind]), None)


@on_the_interpreter
@pytest.mark.parametrize("name", ["ragged rows", "a chain above the context", "a tree", "a level of a tree"])
@pytest.mark.parametrize("window", [w for w in WINDOWS if w])
def test_windows(name: str, window: int) -> None:
    s = scene(**SCENES[name])
    check_turned(s, turn_of(s, normed=True), window)


@on_the_interpreter
@pytest.mark.parametrize("tree", [False, True])
def test_a_row_of_a_qkv_product_has_the_same_bits_whoever_else_is_there(tree: bool) -> None:
    s = scene([420, 3, 290, 64], [3, 1, 2, 3], tree=tree, room=2000)
    turn = turn_of(s, normed=True)
    together = run_fused(s, turn)
    for r in range(4):
        one, b = slice(r, r + 1), s.batch
        masks = b.ancestors[one] if b.ancestors is not None else None
        alone = Batch(
            b.tokens[one], b.positions[one], b.context[one], b.counts[one], b.pages[one], masks,
            longest=int(b.context[r]) + 3, static=True,
        )  # fmt: skip
        row = Scene(s.cache, alone, s.q[one], s.k[one], s.v[one])
        assert torch.equal(run_fused(row, turn._replace(cos=turn.cos[one], sin=turn.sin[one]))[0], together[r])


def nothing(*_: object) -> Tensor:
    raise AssertionError("a layer with attention has no state")


@on_the_interpreter
@pytest.mark.parametrize("queries", [1, 3])
def test_gated_attention(queries: int) -> None:
    """A hybrid's: zero-centred norms, rotation in part, a gate beside the queries; results and what is stored."""
    from target.attention.triton import TritonAttention

    made, sizes = GatedAttention(0, 24, 4, 2, 16, 1e-6).requires_grad_(False), (2, queries)
    for norm in (made.q_norm, made.k_norm):
        norm.weight.data = 0.3 * noise(16, seed=queries)
    context, x = torch.tensor([5, 0]), noise(*sizes, 24)
    batch = Batch(
        torch.zeros(sizes, dtype=torch.int64), causal_positions(context, queries), context,
        torch.full((2,), queries), torch.tensor([[1], [2]]), longest=16, static=True,
    )  # fmt: skip
    cos, sin = Rope(RopeConfig(theta=100.0), 8)(batch.positions, x.dtype)
    found, stores = [], []
    for kind, pieces in ((SdpaAttention, TORCH), (TritonAttention, FUSED)):
        cache = PagedCache([[LayerShape(2, 16)]], 3, 16, torch.float32)
        cache.layers[0][16:] = noise(*cache.layers[0][16:].shape, seed=9)
        made.pieces = made.q_norm.pieces = made.k_norm.pieces = pieces
        found.append(made(x, cos, sin, HybridAttend(bind(kind(cache), batch), nothing)))
        stores.append(cache.layers[0])
    close(*found)
    close(*(store[16:] for store in stores))


@on_the_interpreter
def test_many_tiles_are_joined_by_a_second_kernel() -> None:
    from target.attention import triton as backend

    s = scene([300, 100], [2, 1])
    turn = turn_of(s)
    expected = run_fused(s, turn)
    before, backend.MOST_TILES = backend.MOST_TILES, 3
    try:
        close(run_fused(s, turn), expected)
    finally:
        backend.MOST_TILES = before
    close(run_fused(s, turn, joined=0), expected)


@on_the_interpreter
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda qkv: qkv[:, :, :4], "cannot serve 0 query heads of 16 over 2"),
        (lambda qkv: qkv[:, :, :7], "cannot serve 3 query heads"),
        (lambda qkv: qkv.half(), "in torch.float16"),
        (lambda qkv: qkv[..., :8], "cannot serve 4 query heads of 8"),
    ],
)
def test_a_product_of_another_shape_is_one_sentence(change, words: str) -> None:  # type: ignore[no-untyped-def]
    from target.attention.triton import TritonAttention

    s = scene([9], [1])
    attention = TritonAttention(s.cache)
    with pytest.raises(PlanError, match=words):
        attention.run_fused(s.batch, 1, change(torch.cat((s.q, s.k, s.v), 2)), turn_of(s), None)


def test_only_a_pass_bound_to_a_fused_backend_has_a_fused_form() -> None:
    cache = PagedCache([[LayerShape(2, 16)]], 4, 4, torch.float32)
    batch = Batch(*(torch.zeros(1, 1, dtype=torch.int64),) * 2, *(torch.ones(1, dtype=torch.int64),) * 2,
                  torch.ones(1, 1, dtype=torch.int64), longest=2)  # fmt: skip
    assert fused_form(bind(SdpaAttention(cache), batch)) is None
    assert fused_form(attend_causal) is None


# ---- whole models ----

FAMILIES = [
    "llama",
    "llama-biases",
    "llama-dynamic",
    "mistral-window",
    "qwen2-window",
    "qwen3-biases",
    "glm4_moe-rotary",
]


def parity(pair: Twins, dtype: torch.dtype, device: str) -> None:
    """Prompt, chain and tree of a model with fused pieces on our kernels beside the same with torch's on SDPA."""
    from target.attention.triton import TritonAttention
    from target.load import load_target

    plain, fused = Rig(pair.ours), Rig(load_target(pair.folder, dtype, device))
    assert fuse(fused.model) > 0
    if pair.ours.config.mla is None:
        fused.attention = TritonAttention(fused.cache)
    taps = tuple(range(pair.ours.config.num_layers + 1))
    for rig in (plain, fused):
        for layer in rig.cache.layers:
            layer[1:] = math.nan
    tokens, rows = some_tokens(14), []
    for rig in (plain, fused):
        tables = [rig.table(24), rig.table(24)]
        prompt = rig.run(rig.batch([tokens[:9], tokens[:4]], [0, 0], tables), taps)
        chain = rig.run(rig.batch([tokens[9:12], tokens[4:5]], [9, 4], tables), taps)
        tree = [[1, 3, 5, 9]] * 2
        nodes = rig.run(rig.batch([tokens[10:14]] * 2, [12, 5], tables, tree, [[0, 1, 1, 2]] * 2), taps)
        rows.append([(prompt, (9, 4)), (chain, (3, 1)), (nodes, (4, 4))])
    for (expected, counts), (got, _) in zip(*rows, strict=True):
        for r, count in enumerate(counts):
            for a, b in zip((got.final, *got.taps), (expected.final, *expected.taps), strict=True):
                close(a[r, :count], b[r, :count].float())


@on_the_interpreter
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_computes_the_same(family: str, tmp_path: Path) -> None:
    parity(twins(tmp_path, family), torch.float32, "cpu")


@on_the_interpreter
def test_latent_attention_keeps_torchs_pieces_between_fused_norms(tmp_path: Path) -> None:
    parity(twins(tmp_path, "deepseek_v3"), torch.float32, "cpu")


def test_training_and_loading_leave_torchs_pieces(tmp_path: Path) -> None:
    model = twins(tmp_path, "qwen3").ours
    pieces = {module.pieces for module in model.modules() if isinstance(module, RMSNorm | SelfAttention | GatedMLP)}
    assert pieces == {TORCH}


# ---- how many kernels ----


class Launches(TorchDispatchMode):
    """Names of what would be a kernel on a GPU: torch operators that compute, and our own by their functions."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.names: list[str] = []
        self._inside = False
        from triton.runtime.interpreter import GridExecutor

        original = GridExecutor.__call__

        def counted(executor: Any, *args: Any, **kwargs: Any) -> Any:
            self.names.append(executor.fn.__name__)
            self._inside = True
            try:
                return original(executor, *args, **kwargs)
            finally:
                self._inside = False

        monkeypatch.setattr(GridExecutor, "__call__", counted)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not self._inside and name not in NO_KERNELS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@on_the_interpreter
@pytest.mark.parametrize("family", ["llama", "qwen3", "llama-biases"])
def test_a_layer_is_seven_kernels(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from target.attention.triton import TritonAttention

    rig = Rig(twins(tmp_path, family, torch.float16).ours)
    rig.attention = TritonAttention(rig.cache)
    fuse(rig.model)
    batch = rig.batch([[3, 4], [5]], [6, 0], [rig.table(12), rig.table(12)])
    for layer in rig.cache.layers:
        layer[1:] = 0
    with torch.no_grad(), Launches(monkeypatch) as launches:
        attend = bind(rig.attention, batch)
        x = rig.model.embed(batch.tokens)
        cos, sin = rig.model.rope(batch.positions, x.dtype)
        launches.names.clear()
        rig.model.layers[1].advance(x, x, cos, sin, attend)
    product = "addmm" if family == "llama-biases" else "mm"
    ours = [name for name in launches.names if name not in ("mm", "addmm")]
    assert ours == ["norm_kernel", "split_kernel", "norm_kernel", "gated_kernel"]
    assert launches.names.count(product) == 3 and len(launches.names) == 7


# ---- the choice ----


def test_where_nothing_can_be_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = RMSNorm(8, 1e-5)
    monkeypatch.delenv("SPECULATOR_FUSED", raising=False)
    assert fuse_where_possible(CPU, norm, None) == 0 and norm.pieces is TORCH
    monkeypatch.setenv("SPECULATOR_FUSED", "no")
    with pytest.raises(PlanError, match="unknown SPECULATOR_FUSED 'no': on or off"):
        fuse_where_possible(CPU, norm)


def test_a_row_that_no_program_can_hold_keeps_torchs_norm() -> None:
    assert fuse(RMSNorm(1 << 15, 1e-5), RMSNorm(1 << 14, 1e-5), None) == 1
