"""What a request may ask, and the sentence it gets when it may not."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speculator.drafts import (
    ShapeRequest,
    capped,
    check_prompt,
    check_rule,
    check_sampling,
    check_session_id,
    check_shape,
    check_stopping,
    depths,
    draft_depth,
    fitted,
    validate,
)
from speculator.errors import InvalidArgumentError, InvalidTreeError, PromptTooLongError
from speculator.types import Distribution, Draft, DraftShape, Rule, SamplingParams, StoppingParams
from tests.fakes import INFO, info

HALF = math.log(0.5)


def q(*rows: tuple[tuple[int, ...], tuple[float, ...]]) -> tuple[Distribution, ...]:
    return tuple(Distribution(ids, logprobs) for ids, logprobs in rows)


@pytest.mark.parametrize(
    ("draft", "words"),
    [
        (Draft((5,), (0,)), "parent of node 0 is 0"),
        (Draft((5, 6), (-1, -2)), "parent of node 1 is -2"),
        (Draft((5, 6), (-1,)), "1 entries for 2 tokens"),
        (Draft((5,) * 64, (-1,) * 64), "64 nodes, the limit is 63"),
        (Draft((5,) * 17, tuple(range(-1, 16))), "17 levels deep, the limit is 16"),
        (Draft((5,), (-1,), (-0.1, -0.2)), "logprobs has 2"),
        (Draft((5, 6), (-1, 0), (-0.1, math.nan)), "log-probability of node 1 is NaN or above 0"),
        (Draft((5,), (-1,), (1000.0,)), "log-probability of node 0 is NaN or above 0"),
        (Draft((5, 6), (-1, 0), q=q(((5,), (0.0,)))), "1 entries for 2 tokens"),
        (Draft((5,), (-1,), q=q(((5, 6), (HALF, math.log(0.3))))), "sums to 0.8"),
        (Draft((5,), (-1,), q=q(((6, 7), (HALF, HALF)))), "not in the support"),
        (Draft((5,), (-1,), q=q(((5, 6), (-math.inf, 0.0)))), "not in the support"),
        (Draft((5,), (-1,), q=q(((5, 5), (HALF, HALF)))), "lists a token twice"),
        (Draft((5,), (-1,), q=q(((5, 6), (math.nan, 0.0)))), "NaN or above 0"),
        (Draft((5,), (-1,), q=q(((5,), (1.0,)))), "NaN or above 0"),
        (Draft((5,), (-1,), q=q(((5, 6), (0.0,)))), "2 support tokens"),
    ],
)
def test_bad_trees_are_named(draft: Draft, words: str) -> None:
    with pytest.raises(InvalidTreeError, match=words) as caught:
        validate(draft, INFO)
    assert caught.value.field.startswith("tree")


@pytest.mark.parametrize("draft", [Draft((101,), (-1,)), Draft((5,), (-1,), q=q(((5, 101), (HALF, HALF))))])
def test_foreign_tokens_are_named(draft: Draft) -> None:
    with pytest.raises(InvalidArgumentError, match="token 101"):
        validate(draft, INFO)


def test_good_trees_pass() -> None:
    validate(Draft(), INFO)
    validate(Draft((5, 5, 6), (-1, -1, 1)), INFO)
    validate(Draft((5, 6, 7), (-1, 0, 1), (0.0, -0.5, -math.inf)), INFO)
    validate(Draft((5,), (-1,), q=q(((5, 6), (HALF, HALF)))), INFO)
    validate(Draft((5, 6), (-1, 0)), INFO, Rule.BLOCK)


def test_block_verification_takes_chains_only() -> None:
    with pytest.raises(InvalidTreeError, match="chains only"):
        validate(Draft((5, 6), (-1, -1)), INFO, Rule.BLOCK)
    with pytest.raises(InvalidArgumentError, match="chains only"):
        check_shape(DraftShape(2, 6, 2), Rule.BLOCK, INFO)
    check_shape(ShapeRequest(parents=(-1, 0, 1)).over(DraftShape()), Rule.BLOCK, INFO)


def test_where_no_draft_may_choose_only_the_coupled_rule_samples() -> None:
    fixed = info(invariant=True)
    for rule in Rule:
        check_rule(SamplingParams(rule=rule), fixed)  # greedy: all rules are one
        check_rule(SamplingParams(temperature=1.0, rule=rule), INFO)
    check_rule(SamplingParams(temperature=1.0), fixed)
    for rule in (Rule.REJECTION, Rule.BLOCK):
        with pytest.raises(InvalidArgumentError, match=f'"{rule.value}" lets drafts choose .* engine.invariant'):
            check_rule(SamplingParams(temperature=0.5, rule=rule), fixed)


parents = st.lists(st.integers(0, 10**6), max_size=63).map(
    lambda raw: tuple(value % (i + 1) - 1 for i, value in enumerate(raw))
)


@given(parents)
def test_depths_follow_parents(tree: tuple[int, ...]) -> None:
    levels = depths(tree)
    for i, parent in enumerate(tree):
        assert levels[i] == 1 + (levels[parent] if parent >= 0 else 0)
    assert draft_depth(Draft((1,) * len(tree), tree)) == max(levels, default=0)


@given(parents, st.integers(0, 20), st.integers(0, 63))
def test_a_cut_static_tree_is_the_top_of_the_tree(tree: tuple[int, ...], depth: int, nodes: int) -> None:
    if not tree:
        return
    cut = ShapeRequest(parents=tree, depth=depth, nodes=nodes).over(DraftShape())
    kept = [i for i, level in enumerate(depths(tree)[:nodes]) if level <= depth]
    assert cut.depth <= depth and len(cut.parents) == len(kept)
    assert depths(cut.parents) == [depths(tree)[i] for i in kept]
    check = capped(cut, 3)
    assert max(depths(check.parents), default=0) <= 3


@pytest.mark.parametrize(
    ("shape", "depth", "wanted"),
    [
        (DraftShape(4), 9, DraftShape(4)),
        (DraftShape(4), 2, DraftShape(2)),
        (DraftShape(4), 0, DraftShape(0)),
        (DraftShape(4, 30, 3), 2, DraftShape(2, 12, 3)),
        (DraftShape(4, 30, 3), 0, DraftShape(0)),
        (DraftShape(2, 3, 1, (-1, 0, 0)), 1, DraftShape(1, 1, 1, (-1,))),
        (DraftShape(2, 3, 1, (-1, 0, 0)), 0, DraftShape(0)),
    ],
)
def test_capping(shape: DraftShape, depth: int, wanted: DraftShape) -> None:
    assert capped(shape, depth) == wanted


def test_an_open_number_of_nodes_is_filled_in() -> None:
    assert fitted(DraftShape(6, 0, 10), INFO).nodes == INFO.max_nodes
    assert fitted(DraftShape(2, 0, 3), INFO).nodes == 12
    assert fitted(DraftShape(2, 100, 3), INFO).nodes == 12


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (ShapeRequest(depth=17), "17 drafted levels"),
        (ShapeRequest(depth=2, branching=17), "17 children"),
        (ShapeRequest(depth=6, branching=8, nodes=64), "64 drafted nodes"),
        (ShapeRequest(depth=11, branching=8, nodes=60), r"\(max_depth - 2\) \* branching <= 64"),
        (ShapeRequest(parents=(-1,) * 64), "64 drafted nodes"),
    ],
)
def test_shapes_beyond_the_engine_are_refused(request_: ShapeRequest, words: str) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        check_shape(request_.over(INFO.default_shape), Rule.COUPLED, INFO)


@pytest.mark.parametrize("bad", [(0,), (-1, 1), (-2,), (-1, 0, 5)])
def test_static_trees_with_bad_parents_are_refused(bad: tuple[int, ...]) -> None:
    with pytest.raises(InvalidTreeError, match="parent of node"):
        ShapeRequest(parents=bad).over(DraftShape())


@pytest.mark.parametrize(
    ("params", "field"),
    [
        (SamplingParams(temperature=-0.1), "sampling.temperature"),
        (SamplingParams(temperature=math.nan), "sampling.temperature"),
        (SamplingParams(temperature=math.inf), "sampling.temperature"),
        (SamplingParams(top_p=0.0), "sampling.top_p"),
        (SamplingParams(top_p=1.1), "sampling.top_p"),
        (SamplingParams(min_p=-0.1), "sampling.min_p"),
        (SamplingParams(min_p=1.5), "sampling.min_p"),
        (SamplingParams(top_k=-1), "sampling.top_k"),
        (SamplingParams(repetition_penalty=0.0), "sampling.repetition_penalty"),
    ],
)
def test_bad_sampling_is_named(params: SamplingParams, field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        check_sampling(params)
    assert caught.value.field == field


def test_good_sampling_passes() -> None:
    check_sampling(SamplingParams())
    check_sampling(SamplingParams(1.3, 50, 0.9, 0.1, 1.2, -(2**63), Rule.REJECTION))


def test_bad_stopping_is_named() -> None:
    with pytest.raises(InvalidArgumentError, match="at least 1"):
        check_stopping(StoppingParams(0), INFO)
    with pytest.raises(InvalidArgumentError, match="token 101"):
        check_stopping(StoppingParams(5, frozenset({3, 101})), INFO)


def test_prompts_are_checked() -> None:
    with pytest.raises(InvalidArgumentError, match="empty"):
        check_prompt((), 256, INFO)
    with pytest.raises(InvalidArgumentError, match="token 101 at index 1"):
        check_prompt((5, 101), 256, INFO)
    with pytest.raises(PromptTooLongError) as caught:
        check_prompt((5,) * 256, 256, INFO)
    assert caught.value.metadata == {"prompt_tokens": "256", "max_prompt_tokens": "255"}
    check_prompt((5,) * 255, 256, INFO)


@pytest.mark.parametrize("bad", ["", "a" * 65, "a b", "ä", "a/b", "a\n"])
def test_session_ids_are_plain(bad: str) -> None:
    with pytest.raises(InvalidArgumentError):
        check_session_id(bad)


def test_session_ids_may_be_uuids() -> None:
    check_session_id("3f1c9a52-0b1d-4c1e-8d53-7f0a1f0c9c11")
    check_session_id("A.b_c-9")


def test_changed_info_keeps_the_rest() -> None:
    assert info(max_rows=2).page_size == INFO.page_size
