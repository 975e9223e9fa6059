"""The engine beyond its headline promise: warm heads, kept distributions, bad numbers, rows that change hands."""

from __future__ import annotations

import pytest
import torch
from engines import VOCAB, Driver, tiny_engine, tiny_head, tiny_target

from speculator.engine import Engine
from speculator.errors import DraftNotFoundError, EngineFailedError, InvalidTreeError, NumericalError
from speculator.heads.exact import ExactPlan, exact_pair
from speculator.passes import EagerPasses, eager_passes
from speculator.types import Draft, DraftShape, EngineInfo, Feed, Rule, SamplingParams, Step
from target.attention.base import bind
from target.attention.dense import attend_causal
from target.batch import Batch, causal_positions
from target.cache import PagedCache

PROMPT = [5, 9, 33, 2, 8, 40, 11]
CHAIN = DraftShape(depth=4)


@pytest.fixture(scope="module")
def target():
    torch.set_num_threads(1)
    return tiny_target()


def started(engine: Engine, params: SamplingParams | None = None, shape: DraftShape | None = CHAIN):
    driver = Driver(engine)
    (session,) = driver.start([PROMPT], [params or SamplingParams()], shape)
    return driver, session


def engine_around(target, head) -> Engine:
    info = EngineInfo("t", "h", head.record.kind, target.config.vocab_size, (), 512, 4, 16, 200, 160, 64)
    cache = PagedCache([target.cache_layers, head.cache_layers], 200, 16, torch.float32)
    return Engine(info, target, head, cache)


@pytest.mark.parametrize("shape", [DraftShape(5), DraftShape(5, 59, 4), DraftShape(3, parents=(-1, -1, 0, 2))])
@pytest.mark.parametrize(
    "plan",
    [ExactPlan(kind=kind, needs=needs) for kind in ("eagle", "eagle3") for needs in ("token", "feature")]
    + [ExactPlan(kind="eagle3", needs="feature", draft_vocab=True)],
    ids=str,
)
def test_heads_exact_by_construction_are_always_accepted(plan: ExactPlan, shape: DraftShape) -> None:
    """Off-by-one features, taps, d2t or positions anywhere on the way would break this."""
    pair = exact_pair(plan)
    driver = Driver(engine_around(pair.target, pair.head))
    sessions = driver.start([[3, 7, 1, 12], [2, 2, 9]], [SamplingParams()] * 2, shape)
    driver.rounds(sessions, 40, [shape] * 2)
    deepest = 3 if shape.parents else 5
    assert {accepted for s in sessions for accepted in s.accepted} == {deepest}


def test_depth_0_keeps_the_head_warm(target) -> None:
    head = tiny_head(target, "eagle3")
    drafts, length = [], 0
    for shape in (CHAIN, DraftShape(0)):
        driver, session = started(tiny_engine(target, head), shape=shape)
        driver.rounds([session], length or 12, [shape])
        length = len(session.produced)  # the second session, one token a round, stops at the same place
        drafts.append(driver.engine.step([Step(0, session.cached, session.pages, propose=CHAIN)])[0].draft)
    assert drafts[0].tokens == drafts[1].tokens
    assert drafts[0].logprobs == pytest.approx(drafts[1].logprobs, abs=1e-4)


def test_proposing_again_changes_nothing(target) -> None:
    driver, session = started(tiny_engine(target, tiny_head(target, "eagle")))
    asked = [driver.engine.step([Step(0, session.cached, session.pages, propose=CHAIN)])[0].draft for _ in range(3)]
    assert len({draft.tokens for draft in asked}) == 1
    assert len({draft.draft_id for draft in asked}) == 3


def test_a_drawn_draft_without_its_distribution_is_refused(target) -> None:
    params = SamplingParams(temperature=1.0, rule=Rule.REJECTION)
    driver, session = started(tiny_engine(target, tiny_head(target, "eagle")), params)
    stale = session.draft
    driver.engine.step([Step(0, session.cached, session.pages, propose=CHAIN)])
    with pytest.raises(DraftNotFoundError):
        driver.engine.step([Step(0, session.cached, session.pages, root=session.tokens[-1], draft=stale)])


def test_block_verification_refuses_trees(target) -> None:
    driver, session = started(tiny_engine(target, None), SamplingParams(rule=Rule.BLOCK), None)
    tree = Draft((1, 2), (-1, -1))
    with pytest.raises(InvalidTreeError):
        driver.engine.step([Step(0, session.cached, session.pages, root=session.tokens[-1], draft=tree)])


def test_bad_numbers_are_an_error_and_the_next_step_is_fine() -> None:
    target = tiny_target()
    engine = tiny_engine(target, tiny_head(target, "eagle3"))
    driver, session = started(engine)
    good = target.norm.weight.clone()
    target.norm.weight.fill_(float("nan"))
    with pytest.raises(NumericalError):
        driver.rounds([session], len(session.produced) + 1, [CHAIN])
    target.norm.weight.copy_(good)
    before = list(session.tokens)
    driver.rounds([session], 30, [CHAIN])
    assert session.tokens[: len(before)] == before
    reference, clean = started(tiny_engine(target, None), shape=None)
    reference.rounds([clean], 30, [None])
    assert session.produced[:30] == clean.produced[:30]


def test_a_page_table_that_is_too_short_is_an_error_not_a_wrong_token(target) -> None:
    engine = tiny_engine(target, None)
    engine.open(0, SamplingParams(), False)
    with pytest.raises(EngineFailedError):
        engine.step([Step(0, 0, [1], feed=Feed(PROMPT, None))])


def test_a_row_carries_nothing_over(target) -> None:
    engine = tiny_engine(target, tiny_head(target, "eagle3"))
    params = SamplingParams(repetition_penalty=1.5)
    first, session = started(engine, params)
    first.rounds([session], 20, [CHAIN])
    engine.close(0)
    again, second = started(engine, params)
    again.rounds([second], 20, [CHAIN])
    assert second.produced[:20] == session.produced[:20]


def test_log_probabilities_are_the_targets(target) -> None:
    engine = tiny_engine(target, tiny_head(target, "eagle3"))
    driver, session = started(engine)
    root, base = session.tokens[-1], list(session.tokens)
    result = engine.step([Step(0, session.cached, session.pages, root=root, draft=session.draft)])[0]
    ids = torch.tensor([base + list(result.tokens)])
    hidden = target(ids, torch.arange(ids.shape[1])[None], attend_causal)
    logp = target.logits(hidden.final).log_softmax(-1)[0]
    expected = [float(logp[len(base) - 1 + i, t]) for i, t in enumerate(result.tokens)]
    assert result.logprobs == pytest.approx(expected, abs=1e-4)
    assert all(0 <= t < VOCAB for t in result.tokens)


@pytest.mark.parametrize("kept", [(1,), (3,), (6,), (2, 4)])
def test_catching_up_runs_as_many_rows_as_were_kept_and_gives_what_all_would(target, kept: tuple[int, ...]) -> None:
    head = tiny_head(target, "eagle3")
    engine = tiny_engine(target, head)
    passes = eager_passes(target, head, engine.cache)
    assert isinstance(passes, EagerPasses)
    rows, counts = len(kept), torch.tensor(kept)
    tokens, context = torch.randint(VOCAB, (rows, 6)), torch.full((rows,), 5)
    pages = 1 + torch.arange(3 * rows).view(rows, 3)
    batch = Batch(tokens, causal_positions(context, 6), context, counts, pages, longest=11)
    features = torch.randn(rows, 6, head.record.feature_size)
    whole = passes.catch_up_on(batch, features, tokens, bind(passes.head_attention, batch))
    widths: list[int] = []
    with head.register_forward_pre_hook(lambda _, args: widths.append(args[1].shape[1])):
        found = passes.catch_up(batch, features, tokens)
    assert widths == [max(kept)]
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)
