"""The target computes what transformers computes: every family, every rope, every way of cutting a sequence up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from target.attention.dense import attend_causal, dense_attend
from target.load import load_target
from target.model import Hidden
from tests.unit.targets import FAMILIES, LAYERS, Rig, Twins, reference_hidden, save_reference, some_tokens, twins

ALL = tuple(range(LAYERS + 1))
LENGTH = 37
CUTS = {"whole": [LENGTH], "chunks": [5, 1, 16, 2, 13], "one by one": [1] * LENGTH}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=list(FAMILIES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Twins:
    return twins(tmp_path_factory.mktemp("model"), request.param)


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def same(got: Hidden, expected: Hidden) -> None:
    """F and every tap."""
    assert len(got.taps) == len(expected.taps)
    for mine, reference in zip((got.final, *got.taps), (expected.final, *expected.taps), strict=True):
        close(mine, reference)


def test_the_references_differ_where_it_matters(tmp_path: Path) -> None:
    """Parity means nothing between models whose switches change nothing."""
    tokens, outputs = torch.tensor([some_tokens(LENGTH)]), {}
    same_shapes = ("llama", "llama-linear", "llama-llama3", "llama-yarn", "llama-yarn-exact", "llama-yarn-mscale",
                   "llama-yarn-given", "mistral", "mistral-window", "qwen2", "qwen2-window", "qwen3_moe",
                   "qwen3_moe-window", "deepseek_v2", "deepseek_v2-yarn", "deepseek_v3",
                   "deepseek_v3-halves")  # fmt: skip
    for family in same_shapes:
        outputs[family] = save_reference(tmp_path / family, family)(tokens).logits
    names = list(outputs)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :] if a.split("-")[0] == b.split("-")[0]]
    assert all((outputs[a] - outputs[b]).abs().max() > 1e-2 for a, b in pairs)


@pytest.mark.parametrize("scattered", [True, False], ids=["scattered pages", "pages side by side"])
@pytest.mark.parametrize("cut", CUTS)
def test_one_row(pair: Twins, cut: str, scattered: bool) -> None:
    tokens = some_tokens(LENGTH)
    rig = Rig(pair.ours, scattered=scattered)
    got = rig.feed(tokens, rig.table(LENGTH), CUTS[cut], ALL)
    same(got, reference_hidden(pair.theirs, torch.tensor([tokens])))
    close(pair.ours.logits(got.final), pair.theirs(torch.tensor([tokens])).logits)


def test_rows_of_different_lengths_in_one_batch(pair: Twins) -> None:
    lengths, rig = (11, 1, 29, 18), Rig(pair.ours)
    prompts = [some_tokens(n, seed) for seed, n in enumerate(lengths)]
    tables = [rig.table(LENGTH) for _ in prompts]
    expected = [reference_hidden(pair.theirs, torch.tensor([p])) for p in prompts]
    first, rest = [p[: (len(p) + 1) // 2] for p in prompts], [p[(len(p) + 1) // 2 :] or p[-1:] for p in prompts]
    for part, contexts in ((first, [0] * 4), (rest, [n - len(r) for n, r in zip(lengths, rest, strict=True)])):
        got = rig.run(rig.batch(part, contexts, tables), ALL)
        for row, (tokens, start) in enumerate(zip(part, contexts, strict=True)):
            end = start + len(tokens)
            same(
                Hidden(got.final[row, : len(tokens)], tuple(t[row, : len(tokens)] for t in got.taps)),
                Hidden(expected[row].final[0, start:end], tuple(t[0, start:end] for t in expected[row].taps)),
            )


def test_without_a_cache(pair: Twins) -> None:
    if any(pair.ours.config.windows) or pair.ours.config.rope.kind == "dynamic":
        pytest.skip("dense attention has no windows, and transformers re-scales a dynamic rope by the prompt")
    tokens = torch.tensor([some_tokens(LENGTH), some_tokens(LENGTH, 1)])
    got = pair.ours(tokens, torch.arange(LENGTH).expand(2, -1), dense_attend(pair.ours.config), ALL)
    same(got, reference_hidden(pair.theirs, tokens))


def test_dense_attention_refuses_a_window_it_does_not_apply(tmp_path: Path) -> None:
    model = twins(tmp_path, "mistral-window").ours
    with pytest.raises(ValueError, match="longer than the sliding window 6"):
        model(torch.zeros(1, 7, dtype=torch.int64), torch.arange(7)[None], attend_causal)


def test_taps_come_in_the_order_asked_for(pair: Twins) -> None:
    tokens = some_tokens(5)
    rig = Rig(pair.ours)
    every = rig.feed(tokens, rig.table(5), [5], ALL)
    some = rig.feed(tokens, rig.table(5), [5], (3, 0))
    assert len(some.taps) == 2 and torch.equal(some.taps[0], every.taps[3]) and torch.equal(some.taps[1], every.taps[0])
    assert not torch.allclose(every.final, every.taps[LAYERS])  # F is normed, B(n) is not


# dynamic rope beyond the trained length


def test_dynamic_rope_decodes_like_transformers_beyond_the_trained_length(tmp_path: Path) -> None:
    pair = twins(tmp_path, "llama-dynamic", max_position_embeddings=12)
    tokens = torch.tensor([some_tokens(LENGTH)])
    past, logits = None, []
    for t in range(LENGTH):
        out = pair.theirs(tokens[:, t : t + 1], past_key_values=past, use_cache=True)
        past, logits = out.past_key_values, [*logits, out.logits]
    for cut in CUTS.values():  # ours does not depend on how the sequence was cut
        rig = Rig(pair.ours)
        got = rig.feed(tokens[0].tolist(), rig.table(LENGTH), cut, ())
        close(pair.ours.logits(got.final), torch.cat(logits, 1))
    whole = pair.theirs(tokens).logits  # transformers does: its prompt is rotated by the final length
    assert (whole - torch.cat(logits, 1)).abs().max() > 1e-2


# bfloat16


def rms(x: torch.Tensor) -> torch.Tensor:
    """Over the last dimension."""
    return x.float().pow(2).mean(-1).sqrt()


@pytest.mark.parametrize(
    "family",
    ["llama", "llama-yarn", "mistral-window", "qwen2", "qwen3", "qwen3_moe", "glm4_moe", "deepseek_v2", "deepseek_v3"],
)
def test_bfloat16_errs_no_more_than_transformers(tmp_path: Path, family: str) -> None:
    """Both round to 8 bits at every step, in different places, so only the size of the errors can be compared.

    Bound: our root-mean-square distance from float32 is at most 1.25 times that of transformers at the median of all
    positions of 8 sequences, for F and the logits, whole and token by token (measured: 0.76 to 1.05). The median,
    because where rounding sends a token to another expert, what is compared is two models.
    """
    exact = save_reference(tmp_path, family)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="eager").eval()
    ours = load_target(tmp_path, torch.bfloat16)
    ratios: list[float] = []
    for cut in (CUTS["whole"], CUTS["one by one"]):
        errors: list[torch.Tensor] = []
        for seed in range(8):
            tokens = some_tokens(LENGTH, seed)
            rig, ids = Rig(ours), torch.tensor([tokens])
            mine = rig.feed(tokens, rig.table(LENGTH), cut, ()).final
            with torch.inference_mode():
                truth, other = (m(ids, output_hidden_states=True) for m in (exact, theirs))
                pairs = [(mine, truth.hidden_states[-1]), (other.hidden_states[-1], truth.hidden_states[-1]),
                         (ours.logits(mine), truth.logits), (other.logits, truth.logits)]  # fmt: skip
            assert mine.dtype == torch.bfloat16
            errors.append(torch.stack([rms(got.float() - true)[0] for got, true in pairs]))
        size = torch.cat(errors, dim=1).median(dim=1).values
        ratios += [float(size[0] / size[1]), float(size[2] / size[3])]
    assert max(ratios) < 1.25, ratios
