"""Heads that are exact by construction reach acceptance 1; each planted bug of the field shows as less."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from speculator.heads.base import DraftHead
from speculator.heads.exact import ExactPlan, exact_pair
from speculator.heads.probe import Acceptance, DenseProbe, greedy_text
from target.attention.dense import attend_causal
from target.layers import RMSNorm
from target.model import Hidden
from target.rope import Rope

DEPTH = 5


@cache
def prompts(vocab: int) -> tuple[tuple[int, ...], ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(tuple(torch.randint(0, vocab, (12,), generator=generator).tolist()) for _ in range(3))


@cache
def probe(plan: ExactPlan) -> DenseProbe:
    return DenseProbe(exact_pair(plan).target, prompts(plan.vocab), new_tokens=24, depth=DEPTH)


def acceptance(plan: ExactPlan, head: DraftHead) -> Acceptance:
    return probe(plan)(head)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


EXACT = [
    ExactPlan("eagle", "token"),
    ExactPlan("eagle", "feature"),
    ExactPlan("eagle", "both"),
    ExactPlan("eagle", own_embed=True),
    ExactPlan("eagle3", "token"),
    ExactPlan("eagle3", "feature"),
    ExactPlan("eagle3", "both"),
    ExactPlan(draft_vocab=False),
    ExactPlan(boundaries=(2, 3, 6)),
    ExactPlan(boundaries=(1, 2, 3, 4, 5)),
    ExactPlan(lag=3),
    ExactPlan(lag=7, head_theta=500.0),
    ExactPlan(norm_before_residual=True),
    ExactPlan(norm_output=True),
    ExactPlan(norm_output=True, norm_before_residual=True, own_embed=True, lag=2, vocab=30, layers=5),
]


@pytest.mark.parametrize("plan", EXACT, ids=str)
def test_exact_heads_are_always_right(plan: ExactPlan) -> None:
    measured = acceptance(plan, exact_pair(plan).head)
    assert measured.rates == (1.0,) * DEPTH
    assert len(measured.lengths) == 3 * (24 - DEPTH)


def test_the_target_says_what_the_plan_says() -> None:
    """The next token follows from the last one, from the one before it, or from both; the text never sticks."""
    for needs, depends_on in (("token", (True, False)), ("feature", (False, True)), ("both", (True, True))):
        target = exact_pair(ExactPlan(needs=needs)).target
        last = torch.randint(0, 24, (200, 2), generator=torch.Generator().manual_seed(1))
        before = torch.zeros(200, 6, dtype=torch.long)
        tokens = torch.cat((before, last), 1)

        def said(tokens: Tensor, target: torch.nn.Module = target) -> Tensor:
            positions = torch.arange(8).expand_as(tokens)
            return target.logits(target(tokens, positions, attend_causal).final[:, -1]).argmax(-1)  # type: ignore[operator,no-any-return]

        for place, matters in zip((-1, -2), depends_on, strict=True):
            other = tokens.clone()
            other[:, place] = (other[:, place] + 5) % 24
            assert bool((said(other) != said(tokens)).any()) is matters
        text = greedy_text(target, (3, 1, 4, 1, 5), 30).tokens[0, 5:]
        assert text.unique().numel() > 8
        assert not (text % 3 == 1).any()


Bug = Callable[[DraftHead], None]


def patched(head: DraftHead, name: str, function: object) -> None:
    """Replace a method of one head."""
    object.__setattr__(head, name, function)


def late_features(head: DraftHead) -> None:
    features = head.features
    patched(head, "features", lambda hidden: features(hidden).roll(1, dims=1))


def early_features(head: DraftHead) -> None:
    features = head.features
    patched(head, "features", lambda hidden: features(hidden).roll(-1, dims=1))


def own_token(head: DraftHead) -> None:
    """Pair feature t with token t instead of token t + 1."""
    forward = head.forward
    previous: list[Tensor] = []

    def shifted(hidden: Tensor, tokens: Tensor, positions: Tensor, attend: object) -> Tensor:
        fed = previous[-1] if previous else tokens.roll(1, dims=1)
        previous.append(tokens)
        return forward(hidden, fed, positions, attend)  # type: ignore[arg-type]

    patched(head, "forward", shifted)


def recycles_zeros(head: DraftHead) -> None:
    patched(head, "recycle", torch.zeros_like)


def swapped_fc(head: DraftHead) -> None:
    weight = head.get_parameter("fc.weight").data
    weight.copy_(weight.roll(weight.shape[1] // 2, dims=1))


COMMON: dict[str, Bug] = {
    "late features": late_features,
    "early features": early_features,
    "own token": own_token,
    "swapped fc": swapped_fc,
}


def change(**fields: object) -> Bug:
    def apply(head: DraftHead) -> None:
        head.record = replace(head.record, **fields)  # type: ignore[arg-type]

    return apply


@pytest.mark.parametrize("name", [*COMMON, "recycles zeros", "B(n) instead of F"])
def test_bugs_that_an_exact_eagle_head_shows(name: str) -> None:
    plan = ExactPlan("eagle")
    head = exact_pair(plan).head
    {**COMMON, "recycles zeros": recycles_zeros, "B(n) instead of F": change(boundaries=(6,))}[name](head)
    measured = acceptance(plan, head)
    assert measured.rates[1] < 0.9
    if name != "recycles zeros":
        assert measured.rates[0] < 0.9


def shifted_d2t(head: DraftHead) -> None:
    assert head.target_ids is not None
    head.target_ids = (head.target_ids + 1) % 24


def no_d2t(head: DraftHead) -> None:
    head.target_ids = None


def absolute_d2t(head: DraftHead) -> None:
    assert head.target_ids is not None
    head.target_ids = (head.target_ids + torch.arange(len(head.target_ids))) % 24


def layer_change(**fields: object) -> Bug:
    def apply(head: DraftHead) -> None:
        for name, value in fields.items():
            setattr(head.layers[0], name, value)  # type: ignore[index]

    return apply


def no_final_norm(head: DraftHead) -> None:
    head.norm = None  # type: ignore[assignment]


class Unnormed(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return x


def no_hidden_norm(head: DraftHead) -> None:
    head.layers[0].hidden_norm = Unnormed(1, 0.0)  # type: ignore[index,union-attr]


def hidden_first(head: DraftHead) -> None:
    weight = head.get_parameter("layers.0.attention.qkv.weight").data
    weight.copy_(weight.roll(weight.shape[1] // 2, dims=1))


def taps_reversed(head: DraftHead) -> None:
    patched(head, "features", lambda hidden: torch.cat(hidden.taps[::-1], dim=-1))


def final_state_as_last_tap(head: DraftHead) -> None:
    def features(hidden: Hidden) -> Tensor:
        return torch.cat((*hidden.taps[:-1], hidden.final), dim=-1)

    patched(head, "features", features)


def forgets_the_past(head: DraftHead) -> None:
    """fc applied to features of the newest row only, as if the catch-up had been skipped."""
    fuse = head.fuse
    patched(head, "fuse", lambda features: fuse(features).roll(2, dims=1))


EAGLE3: dict[str, Bug] = {
    **COMMON,
    "taps one up": change(boundaries=(2, 4, 5)),
    "taps one down": change(boundaries=(0, 2, 3)),
    "first tap off": change(boundaries=(2, 3, 4)),
    "last tap off": change(boundaries=(1, 3, 5)),
    "taps reversed": taps_reversed,
    "F as last tap": final_state_as_last_tap,
    "shifted d2t": shifted_d2t,
    "no d2t": no_d2t,
    "absolute d2t": absolute_d2t,
    "norm_before_residual": layer_change(norm_before_residual=True),
    "no final norm": no_final_norm,
    "no hidden norm": no_hidden_norm,
    "hidden first": hidden_first,
    "forgets the past": forgets_the_past,
}


@pytest.mark.parametrize("name", EAGLE3)
def test_bugs_that_an_exact_eagle3_head_shows_at_once(name: str) -> None:
    head = exact_pair(ExactPlan()).head
    EAGLE3[name](head)
    assert acceptance(ExactPlan(), head).rates[0] < 0.9


@pytest.mark.parametrize(("truth", "wrong"), [(False, True), (True, False)])
def test_wrong_recycling_shows_from_the_second_position(truth: bool, wrong: bool) -> None:
    plan = ExactPlan(norm_output=truth)
    head = exact_pair(plan).head
    change(norm_output=wrong)(head)
    rates = acceptance(plan, head).rates
    assert rates[0] == 1.0 and rates[-1] < 0.5


def test_a_past_fetched_by_attention_needs_true_features_in_earlier_rows() -> None:
    plan = ExactPlan(lag=3)
    head = exact_pair(plan).head
    fuse = head.fuse

    def newest_only(features: Tensor) -> Tensor:
        fused = fuse(features)
        return torch.where(torch.arange(fused.shape[1])[:, None] % 4 == 0, fused.roll(1, dims=1), fused)

    patched(head, "fuse", newest_only)
    assert acceptance(plan, head).rates[0] < 0.9


def test_a_wrong_rope_theta_shows_where_the_head_looks_back() -> None:
    plan = ExactPlan(lag=7)
    head = exact_pair(plan).head
    head.rope = Rope(replace(head.record.rope, theta=1e6), head.record.head_dim)
    assert acceptance(plan, head).rates[0] < 0.9


def test_the_targets_embedding_instead_of_the_heads_own() -> None:
    plan = ExactPlan(own_embed=True)
    head = exact_pair(plan).head
    head.embed = None
    assert acceptance(plan, head).rates[0] < 0.9


def test_plans_that_cannot_be_built() -> None:
    for wrong in ({"needs": "luck"}, {"kind": "mtp"}, {"vocab": 23}, {"kind": "eagle", "lag": 2}):
        with pytest.raises(ValueError):
            ExactPlan(**wrong)
