"""Hybrid targets: parity with transformers however a sequence is cut, states that only commits move, files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3_5MoeTextConfig, Qwen3_5TextConfig, Qwen3NextConfig

from graphs.errors import CaptureError
from graphs.tape import TapeRecorder
from target.attention.base import Attend, bind
from target.attention.dense import attend_causal
from target.batch import Batch
from target.config import parse_config
from target.decoder import Decoder, DecoderLayer
from target.deltanet import HybridAttend
from target.deltanet_chunks import whole_sequences
from target.errors import CheckpointError, PlanError
from target.gated import GatedSharedMoE
from target.layers import ZeroCentredNorm
from target.load import load_target
from target.model import Hidden
from target.names import decoder_slots, mtp_names
from target.save import save_target
from target.states import StateCache, StatePass, bind_hybrid
from tests.unit.targets import SIZES, Rig, reference_hidden, some_tokens

LAYERS, LENGTH = 4, 37
ALL = tuple(range(LAYERS + 1))
CUTS = {"whole": [LENGTH], "chunks": [5, 1, 16, 2, 13], "one by one": [1] * LENGTH}
DELTA: dict[str, Any] = dict(
    head_dim=16, linear_key_head_dim=8, linear_value_head_dim=12, linear_num_key_heads=2, linear_num_value_heads=4
)
MOE: dict[str, Any] = dict(
    num_experts=8, num_experts_per_tok=3, moe_intermediate_size=24, shared_expert_intermediate_size=32
)
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "next": (Qwen3NextConfig, MOE),
    "next-dense-layer": (Qwen3NextConfig, {**MOE, "mlp_only_layers": [1], "norm_topk_prob": False}),
    "dense": (Qwen3_5TextConfig, {}),
    "dense-tied": (
        Qwen3_5TextConfig,
        {"tie_word_embeddings": True, "layer_types": ["full_attention", *["linear_attention"] * 3]},
    ),
    "dense-wide": (Qwen3_5TextConfig, {"linear_conv_kernel_dim": 3, "linear_num_key_heads": 4, "attention_bias": True}),
    "moe": (Qwen3_5MoeTextConfig, MOE),
}
SIZED = {key: value for key, value in SIZES.items() if key != "intermediate_size"}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Twins(NamedTuple):
    theirs: PreTrainedModel
    ours: Decoder
    folder: Path


def reference(folder: Path, family: str, **changes: object) -> PreTrainedModel:
    """A random transformers model whose every weight matters, saved to `folder`."""
    kind, own = FAMILIES[family]
    inner = {} if kind is Qwen3_5MoeTextConfig else {"intermediate_size": 56}
    rope = {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.25}
    config = kind(**{**SIZED, **inner, **DELTA, "rope_parameters": rope, **own, **changes})
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        noise = 0.2 * torch.randn(parameter.shape, generator=generator)
        plain = name.endswith("linear_attn.norm.weight")
        parameter.data = noise + float(plain)
    model.save_pretrained(folder)
    return model.requires_grad_(False)


def twins(folder: Path, family: str, **changes: object) -> Twins:
    theirs = reference(folder, family, **changes)
    return Twins(theirs, load_target(folder, torch.float32), folder)


@pytest.fixture(scope="module", params=list(FAMILIES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Twins:
    return twins(tmp_path_factory.mktemp("model"), request.param)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Twins:
    return twins(tmp_path_factory.mktemp("model"), "dense")


class HybridRig(Rig):
    """Rows of states beside the pages; `run` commits every valid token unless told otherwise."""

    def __init__(self, model: Decoder, slots: int = 9, **options: Any) -> None:
        super().__init__(model, **options)
        self.states = StateCache(model.state_layers, slots, model.embed.weight.dtype)

    def run(self, batch: Batch, taps: tuple[int, ...] = (), slots: list[int] | None = None) -> Hidden:
        states = StatePass(self.states, self._slots(batch, slots), batch.counts)
        out = self._forward(batch, states, taps)
        states.commit()
        return out

    def verify(self, batch: Batch, slots: list[int] | Tensor | None = None) -> tuple[Hidden, StatePass]:
        states = StatePass(self.states, self._slots(batch, slots))
        return self._forward(batch, states, ()), states

    @torch.inference_mode()
    def _forward(self, batch: Batch, states: StatePass, taps: tuple[int, ...]) -> Hidden:
        return self.model(batch.tokens, batch.positions, self.attend(batch, states), taps)  # type: ignore[no-any-return]

    def attend(self, batch: Batch, states: StatePass) -> HybridAttend:
        return bind_hybrid(self.attention, batch, states)

    def _slots(self, batch: Batch, slots: list[int] | Tensor | None) -> Tensor:
        if isinstance(slots, Tensor):
            return slots
        return self._ints(slots or range(1, 1 + len(batch.tokens)))


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def same(got: Hidden, expected: Hidden) -> None:
    assert len(got.taps) == len(expected.taps)
    for mine, other in zip((got.final, *got.taps), (expected.final, *expected.taps), strict=True):
        close(mine, other)


# parity


@pytest.mark.parametrize("cut", CUTS)
def test_one_row(pair: Twins, cut: str) -> None:
    tokens, rig = some_tokens(LENGTH), HybridRig(pair.ours)
    got = rig.feed(tokens, rig.table(LENGTH), CUTS[cut], ALL)
    same(got, reference_hidden(pair.theirs, torch.tensor([tokens])))
    close(pair.ours.logits(got.final), pair.theirs(torch.tensor([tokens])).logits)


def test_rows_of_different_lengths_in_one_batch(pair: Twins) -> None:
    """Padding inside a row, and a padded row, reach no state; slots lie in any order."""
    lengths, rig, slots = (11, 2, 29, 18), HybridRig(pair.ours), [5, 2, 8, 3]
    prompts = [some_tokens(n, seed) for seed, n in enumerate(lengths)]
    tables = [rig.table(LENGTH) for _ in prompts]
    expected = [reference_hidden(pair.theirs, torch.tensor([p])) for p in prompts]
    first, rest = [p[: len(p) // 2] for p in prompts], [p[len(p) // 2 :] for p in prompts]
    for part, contexts in ((first, [0] * 4), (rest, [n // 2 for n in lengths])):
        batch = rig.batch([*part, []], [*contexts, 0], [*tables, []])
        got = rig.run(batch, ALL, [*slots, 0])
        for row, (tokens, start) in enumerate(zip(part, contexts, strict=True)):
            end = start + len(tokens)
            same(
                Hidden(got.final[row, : len(tokens)], tuple(t[row, : len(tokens)] for t in got.taps)),
                Hidden(expected[row].final[0, start:end], tuple(t[0, start:end] for t in expected[row].taps)),
            )
    assert not rig.states.matrices[:, 0].any() and not rig.states.windows[:, 0].any()
    assert not rig.states.matrices[:, [1, 4, 6, 7]].any()


def test_without_a_cache(pair: Twins) -> None:
    tokens = torch.tensor([some_tokens(LENGTH), some_tokens(LENGTH, 1)])
    got = pair.ours(tokens, torch.arange(LENGTH).expand(2, -1), whole_sequences(attend_causal), ALL)
    same(got, reference_hidden(pair.theirs, tokens))


def test_bfloat16_errs_no_more_than_transformers(tmp_path: Path) -> None:
    """Root-mean-square distance of F from float32, at most 1.25 times that of transformers, over 8 sequences."""
    exact = reference(tmp_path, "dense")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="eager").eval()
    ours = load_target(tmp_path, torch.bfloat16)
    assert ours.layers[0].attention.a_log.dtype == torch.float32
    mine, other = [], []
    for seed in range(8):
        tokens = some_tokens(LENGTH, seed)
        rig, ids = HybridRig(ours), torch.tensor([tokens])
        got = rig.feed(tokens, rig.table(LENGTH), [LENGTH], ()).final
        assert got.dtype == torch.bfloat16
        with torch.inference_mode():
            truth = reference_hidden(exact, ids).final
            mine.append((got.float() - truth).square().mean(-1).sqrt())
            other.append((reference_hidden(theirs, ids).final.float() - truth).square().mean(-1).sqrt())
    assert torch.cat(mine).median() < 1.25 * torch.cat(other).median()


# files


def test_saved_models_are_read_back(pair: Twins, tmp_path: Path) -> None:
    """By us and by transformers, under the names that are published."""
    save_target(pair.ours, tmp_path, torch.float32)
    tokens = torch.tensor([some_tokens(9)])
    expected = pair.theirs(tokens).logits
    close(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(tokens).logits, expected)
    again = load_target(tmp_path, torch.float32)
    got = again(tokens, torch.arange(9)[None], whole_sequences(attend_causal)).final
    assert torch.equal(got, pair.ours(tokens, torch.arange(9)[None], whole_sequences(attend_causal)).final)
    names = set(load_file(tmp_path / "model.safetensors"))
    theirs = set(load_file(pair.folder / "model.safetensors"))
    experts = {name for name in names | theirs if ".mlp.experts." in name}
    assert names - experts == theirs - experts


def wrapped(folder: Path, source: Path, **changes: object) -> None:
    """A multimodal folder around a text model: other prefixes, a vision model, and an MTP module."""
    raw = json.loads((source / "config.json").read_text())
    text = {**{k: v for k, v in raw.items() if k not in ("architectures", "eos_token_id")}, **changes}
    outer = {"architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5", "text_config": text}
    (folder / "config.json").write_text(json.dumps({**outer, "eos_token_id": 7}))
    tensors = load_file(source / "model.safetensors")
    moved = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in tensors.items()}
    moved |= {"model.visual.patch_embed.proj.weight": torch.ones(2), "mtp.fc.weight": torch.ones(48, 96)}
    moved["mtp.layers.0.self_attn.q_proj.weight"] = torch.ones(128, 48)
    save_file(moved, folder / "model.safetensors")


def test_the_text_model_inside_a_multimodal_one(small: Twins, tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.25, "mrope_interleaved": True}
    wrapped(tmp_path, small.folder, rope_parameters={**rope, "mrope_section": [1, 1, 0]})
    ours, tokens = load_target(tmp_path, torch.float32), torch.tensor([some_tokens(9)])
    got = ours(tokens, torch.arange(9)[None], whole_sequences(attend_causal)).final
    close(got, reference_hidden(small.theirs, tokens).final)
    assert ours.config.eos_token_ids == (7,) and ours.config.architecture == "Qwen3_5ForCausalLM"


def test_an_unknown_tensor_beside_the_text_model_is_named(small: Twins, tmp_path: Path) -> None:
    wrapped(tmp_path, small.folder)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "mtp.layers.0.self_attn.extra": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 unknown tensors: mtp\.layers\.0\.self_attn\.extra"):
        load_target(tmp_path, torch.float32)


def test_mtp_names(small: Twins) -> None:
    config = small.ours.config
    own = {f"mtp.{n}.weight" for n in ("fc", "norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")}
    layer = {f"mtp.layers.0.{n}.weight" for n in ("self_attn.q_proj", "input_layernorm", "mlp.down_proj")}
    foreign = {"mtp.layers.0.linear_attn.out_proj.weight", "mtp.fc.bias", "model.layers.4.self_attn.q_proj.weight"}
    assert mtp_names(config, own | layer | foreign | set(decoder_slots(config))) == own | layer


def test_layers_beyond_the_target_attend(small: Twins) -> None:
    """The layer of an MTP module is none of the recurrent ones, and is told its place in the cache."""
    layer = DecoderLayer(small.ours.config, LAYERS, cache_layer=1)
    assert not isinstance(layer.attention, type(small.ours.layers[0].attention))
    assert layer.attention.layer == 1
    assert [layer.attention.layer for layer in small.ours.layers] == [0, 1, 2, 0]  # by kind


def test_what_a_hybrid_keeps(small: Twins) -> None:
    assert len(small.ours.cache_layers) == 1
    shapes = small.ours.state_layers
    assert len(shapes) == 3 and shapes[0] == (4, 80, 4, 8, 12)
    states = StateCache(shapes, 5, torch.float32)
    assert states.bytes == 5 * sum(shape.bytes(torch.float32) for shape in shapes)


RAW: dict[str, Any] = dict(
    architectures=["Qwen3_5ForCausalLM"], vocab_size=53, hidden_size=48, intermediate_size=56, num_hidden_layers=8,
    num_attention_heads=4, num_key_value_heads=2, **DELTA,
)  # fmt: skip


def test_which_layers_are_recurrent() -> None:
    def layers(**changes: object) -> set[int]:
        delta = parse_config({**RAW, **changes}).delta
        assert delta is not None
        return set(delta.layers)

    assert layers() == {0, 1, 2, 4, 5, 6}
    assert layers(full_attention_interval=2) == {0, 2, 4, 6}
    kinds = ["full_attention", *["linear_attention"] * 7]
    assert layers(layer_types=kinds, full_attention_interval=2) == set(range(1, 8))
    assert not parse_config(RAW).is_recurrent(8)


def test_the_published_config_of_qwen3_6() -> None:
    """Text keys of the 27B model, in a multimodal config."""
    text = dict(
        hidden_size=5120, intermediate_size=17408, num_hidden_layers=64, num_attention_heads=24, num_key_value_heads=4,
        head_dim=256, full_attention_interval=4, attn_output_gate=True, linear_conv_kernel_dim=4,
        linear_key_head_dim=128, linear_value_head_dim=128, linear_num_key_heads=16, linear_num_value_heads=48,
        mamba_ssm_dtype="float32", mtp_num_hidden_layers=1, partial_rotary_factor=0.25, output_gate_type="swish",
        rope_parameters={"rope_type": "default", "rope_theta": 10000000, "partial_rotary_factor": 0.25,
                         "mrope_interleaved": True, "mrope_section": [11, 11, 10]},
        rms_norm_eps=1e-06, vocab_size=248320, hidden_act="silu", dtype="bfloat16",
    )  # fmt: skip
    config = parse_config({"architectures": ["Qwen3_5ForConditionalGeneration"], "text_config": text})
    assert config.rotary_dim == 64 and config.rope.theta == 1e7 and not config.tied
    with torch.device("meta"):
        model = Decoder(config)
    assert len(model.cache_layers) == 16 and len(model.state_layers) == 48
    assert model.state_layers[0].bytes(torch.bfloat16) == 48 * 128 * 128 * 4 + 3 * 10240 * 2
    assert round(sum(p.numel() for p in model.parameters()) / 1e9) == 27


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"layer_types": ["linear_attention"] * 8}, "a hybrid needs layers of both kinds"),
        ({"layer_types": ["full_attention"] * 7}, "for each of the 8 layers"),
        ({"layer_types": ["sliding_attention"] * 8}, "linear_attention or full_attention"),
        ({"linear_num_value_heads": 5}, "linear_num_value_heads 5 is no multiple of linear_num_key_heads 2"),
        ({"attn_output_gate": False}, "attn_output_gate False is not supported"),
        ({"linear_conv_kernel_dim": 1}, "linear_conv_kernel_dim must be an integer of 2 or more"),
        ({"architectures": ["Qwen3_5ForConditionalGeneration"]}, "must have a text_config object, got None"),
    ],
)
def test_unusable_keys_are_named(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        parse_config({**RAW, **changes})


# refusals


def test_decoding_without_states_is_refused(small: Twins) -> None:
    rig = HybridRig(small.ours)
    batch = rig.batch([[3, 4]], [0], [rig.table(2)])
    with pytest.raises(PlanError, match="a hybrid target cannot run without recurrent states"):
        small.ours(batch.tokens, batch.positions, bind(rig.attention, batch))


def test_trees_are_refused(small: Twins) -> None:
    rig = HybridRig(small.ours)
    batch = rig.batch([[3, 4]], [0], [rig.table(2)], ancestors=[[1, 2]])
    with pytest.raises(PlanError, match=r"verifies chains, not trees: a recurrent state holds one past, and every"):
        rig.verify(batch)
    with pytest.raises(PlanError, match="its offset is 0"):
        rig.verify(rig.batch([[3]], [0], [rig.table(2)], offset=1))
    with pytest.raises(PlanError, match="1 rows need as many state slots, got 2"):
        rig.verify(rig.batch([[3]], [0], [rig.table(2)]), [1, 2])


def test_commits_are_due_once_and_say_what_they_need(small: Twins) -> None:
    rig = HybridRig(small.ours)
    batch, one = rig.batch([[3, 4]], [0], [rig.table(4)]), torch.ones(1, dtype=torch.int64)
    with pytest.raises(PlanError, match="0 of 3 recurrent layers ran"):
        StatePass(rig.states, one).commit(one)
    _, states = rig.verify(batch)
    with pytest.raises(PlanError, match=r"commits what was accepted: commit\(accepted\)"):
        states.commit()
    states.commit(one)
    with pytest.raises(PlanError, match="commits once"):
        states.commit(one)
    known = StatePass(rig.states, one, batch.counts)
    rig._forward(batch, known, ())
    with pytest.raises(PlanError, match=r"made with: commit\(\)"):
        known.commit(one)


@pytest.mark.parametrize(("layers", "slots", "text"), [(3, 1, "2 slots or more"), (0, 4, "must have one shape")])
def test_a_state_cache_of_nothing_is_refused(small: Twins, layers: int, slots: int, text: str) -> None:
    with pytest.raises(PlanError, match=text):
        StateCache(small.ours.state_layers[:layers], slots, torch.float32)


# commits


def by_token(forward: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """A forward over x [R, T, ...] as T of one token each: a matmul of T rows rounds unlike T matmuls of one."""
    return lambda module, x: torch.cat([forward(module, token) for token in alone(x)], dim=1)


def by_row(forward: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """A forward over x [R, T, ...] as R of one row each: which tokens share an expert's matmul depends on all rows."""
    return lambda module, x: torch.cat([forward(module, row) for row in x.split(1)])


def alone(x: Tensor) -> list[Tensor]:
    """[R, T, ...] as T times [R, 1, ...], laid out as if it had come alone."""
    return [token.clone(memory_format=torch.contiguous_format) for token in x.split(1, dim=1)]


class ByTokenRig(HybridRig):
    """Attention too runs token by token, over a length that never changes."""

    def attend(self, batch: Batch, states: StatePass) -> HybridAttend:
        steps = [self._attend_one(batch, t) for t in range(batch.tokens.shape[1])]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
            parts = zip(*(alone(x) for x in (q, k, v)), strict=True)
            return torch.cat([step(layer, *part, window) for step, part in zip(steps, parts, strict=True)], dim=1)

        return HybridAttend(attend, states.recur)

    def _attend_one(self, batch: Batch, t: int) -> Attend:
        one = torch.ones_like(batch.counts)
        part = batch._replace(tokens=batch.tokens[:, t : t + 1], positions=batch.positions[:, t : t + 1],
                              context=batch.context + t, counts=one, longest=SONG + 8)  # fmt: skip
        return bind(self.attention, part)


SONG, ROWS, ROUNDS = 48, 8, {"dense": 2400, "next": 800}


@pytest.mark.parametrize("family", ["dense", "next"])
def test_what_is_committed_is_plain_decoding_bit_for_bit(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thousands of rounds with random accept lengths over a whole model, wrong drafts among them.

    Arithmetic that does not depend on how many tokens share a pass comes from running each module token by token;
    what is tested is the rest: the recurrence, its replay, the convolution, slots. Layer 0 attends, so that states
    read what attention made of a cache that held rejected tokens.
    """
    kinds = ["full_attention", "linear_attention", "linear_attention", "full_attention"]
    rope = {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.5}
    model = twins(tmp_path, family, layer_types=kinds, rope_parameters=rope).ours
    for kind in (nn.Linear, ZeroCentredNorm):
        monkeypatch.setattr(kind, "forward", by_token(kind.forward))
    monkeypatch.setattr(GatedSharedMoE, "forward", by_row(by_token(GatedSharedMoE.forward)))
    songs = [some_tokens(SONG + 8, seed) for seed in range(ROWS)]
    plain = decoded(model, songs)
    rig, generator = ByTokenRig(model, pages=400), torch.Generator().manual_seed(5)
    tables = [rig.table(SONG + 8) for _ in songs]
    slots = torch.randperm(ROWS, generator=generator) + 1
    at, rounds = torch.zeros(ROWS, dtype=torch.int64), 0
    while rounds < ROUNDS[family]:
        width = int(torch.randint(2, 6, (), generator=generator))
        accepted = torch.randint(0, width + 1, (ROWS,), generator=generator)
        drafts = [drafted(song, int(n), int(k), width) for song, n, k in zip(songs, at, accepted, strict=True)]
        _, states = rig.verify(rig.batch(drafts, at.tolist(), tables), slots.tolist())
        states.commit(accepted)
        at += accepted
        for row, slot in enumerate(slots):
            for store, expected in zip((rig.states.windows, rig.states.matrices), plain[int(at[row])], strict=True):
                assert torch.equal(store[:, slot], expected[:, row + 1]), (rounds, row)
        done = at >= SONG - 5
        rig.states.clear(slots[done])
        at, rounds = at.masked_fill(done, 0), rounds + ROWS


def decoded(model: Decoder, songs: list[list[int]]) -> list[tuple[Tensor, Tensor]]:
    """The committed states after each token of plain decoding, before the first one too."""
    rig = ByTokenRig(model, pages=400)
    tables, held = [rig.table(SONG + 8) for _ in songs], []
    for t in range(SONG):
        held.append((rig.states.windows.clone(), rig.states.matrices.clone()))
        rig.run(rig.batch([song[t : t + 1] for song in songs], [t] * ROWS, tables))
    return held


def drafted(song: list[int], at: int, accepted: int, width: int) -> list[int]:
    """What a draft holds of which `accepted` tokens are right."""
    right = song[at : at + accepted]
    return right + [(token + 1) % 53 for token in song[at + accepted : at + width]]


def test_a_pass_reads_its_states_and_never_writes_them(small: Twins) -> None:
    rig, tokens = HybridRig(small.ours), some_tokens(12)
    table = rig.table(20)
    rig.run(rig.batch([tokens[:5]], [0], [table]))
    before = rig.states.matrices.clone(), rig.states.windows.clone()
    batch = rig.batch([tokens[5:9]], [5], [table])
    first, states = rig.verify(batch)
    assert torch.equal(rig.states.matrices, before[0]) and torch.equal(rig.states.windows, before[1])
    assert torch.equal(rig.verify(batch)[0].final, first.final)
    states.commit(torch.tensor([3]))
    assert not torch.equal(rig.states.matrices, before[0])
    after = rig.run(rig.batch([tokens[8:]], [8], [table])).final
    whole = small.ours(torch.tensor([tokens]), torch.arange(12)[None], whole_sequences(attend_causal)).final
    close(after, whole[:, 8:])


# recording


def static(batch: Batch) -> Batch:
    return batch._replace(static=True, longest=16)


def verify_and_commit(rig: HybridRig, batch: Batch, slots: Tensor, accepted: Tensor) -> Tensor:
    out, states = rig.verify(batch, slots)
    states.commit(accepted)
    return out.final


@pytest.mark.parametrize("apart", [False, True], ids=["together", "apart"])
def test_a_pass_and_its_commit_are_recorded(small: Twins, apart: bool) -> None:
    """With CUDA's rules on a tape: no host reads, no shapes that depend on values; new lengths at each replay."""
    tokens, accepts = [some_tokens(16, seed) for seed in range(2)], ([2, 0], [4, 3], [1, 4])
    rigs = [HybridRig(small.ours) for _ in range(2)]
    tables = [[rig.table(16) for _ in tokens] for rig in rigs]
    slots, accepted, at = torch.tensor([4, 2]), torch.zeros(2, dtype=torch.int64), [0, 0]
    held = static(rigs[0].batch([song[:4] for song in tokens], at, tables[0]))
    recorder = TapeRecorder(poison_between_replays=True)
    with torch.inference_mode():
        if apart:
            (out, states, _), first = recorder.record(lambda: kept_pass(rigs[0], held, slots))
            recordings = [first, recorder.record(lambda: states.commit(accepted))[1]]
        else:
            out, recording = recorder.record(lambda: verify_and_commit(rigs[0], held, slots, accepted))
            recordings = [recording]
        assert not rigs[0].states.matrices.any()
        for round_ in accepts:
            rows = [song[n : n + 4] for song, n in zip(tokens, at, strict=True)]
            fresh = rigs[1].batch(rows, at, tables[1])
            for name in ("tokens", "positions", "context", "counts"):
                getattr(held, name).copy_(getattr(fresh, name))
            accepted.copy_(torch.tensor(round_))
            for recording in recordings:
                recorder.poison().replay()
                recording.replay()
            assert torch.equal(out, verify_and_commit(rigs[1], static(fresh), slots, accepted))
            assert torch.equal(rigs[0].states.matrices, rigs[1].states.matrices)
            assert torch.equal(rigs[0].states.windows, rigs[1].states.windows)
            at = [n + k for n, k in zip(at, round_, strict=True)]
    assert rigs[0].states.matrices[:, slots].any()


def kept_pass(rig: HybridRig, batch: Batch, slots: Tensor) -> tuple[Tensor, StatePass, Any]:
    out, states = rig.verify(batch, slots)
    return out.final, states, states.kept


def test_the_tape_refuses_slots_that_come_from_the_host(small: Twins) -> None:
    rig = HybridRig(small.ours)
    batch = static(rig.batch([[1, 2]], [0], [rig.table(8)]))

    with torch.inference_mode(), pytest.raises(CaptureError, match="host data"):
        TapeRecorder().record(lambda: rig.verify(batch, [1]))
