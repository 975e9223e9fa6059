"""A session's rules: what is committed, when it ends, what is answered again."""

import pytest

from speculator.answers import Acceptance, Timing, Verified
from speculator.drafts import ShapeRequest
from speculator.errors import (
    DraftNotFoundError,
    PositionMismatchError,
    SessionFinishedError,
    SpeculationDisabledError,
)
from speculator.session import (
    Kept,
    Kind,
    Session,
    SessionSpec,
    check_speculation,
    commit,
    count_round,
    cut,
    extend_finish,
    kept_draft,
    offer,
    replay,
    view,
)
from speculator.types import Draft, DraftShape, FinishReason, Rule, StepResult

EOS = 0
DEEP = 1 << 30


def verdict(made: Session, draft: Draft, result: StepResult) -> tuple[int, int, int]:
    """Commits a verdict and counts it, as a scheduler would."""
    tokens, finish = cut(made, result.tokens)
    commit(made, tokens, finish)
    most = DEEP if finish is FinishReason.RUNNING else len(tokens)
    return count_round(made, draft, min(len(result.accepted), len(tokens)), most)


def chain(*tokens: int) -> Draft:
    return Draft(tokens, tuple(range(-1, len(tokens) - 1)))


def session(length: int = 4, limit: int = 20, stops: frozenset[int] = frozenset({EOS})) -> Session:
    tokens = list(range(1, length + 1))
    made = Session(SessionSpec("s", "", tuple(tokens)), tokens, stops, limit, DraftShape(4), True, 60.0)
    made.cached = length - 1
    return made


@pytest.mark.parametrize(
    ("tokens", "room", "kept", "finish"),
    [
        ((7, 8, 9), 10, (7, 8, 9), FinishReason.RUNNING),
        ((7, 8, 9), 3, (7, 8, 9), FinishReason.LENGTH),
        ((7, 8, 9), 2, (7, 8), FinishReason.LENGTH),
        ((7, EOS, 9), 10, (7, EOS), FinishReason.STOP),
        ((EOS, 8, 9), 10, (EOS,), FinishReason.STOP),
        ((7, 8, EOS), 3, (7, 8, EOS), FinishReason.STOP),
        ((7, 8, EOS), 2, (7, 8), FinishReason.LENGTH),
        ((7, EOS, EOS), 10, (7, EOS), FinishReason.STOP),
    ],
)
def test_cut_ends_at_the_first_bound(
    tokens: tuple[int, ...], room: int, kept: tuple[int, ...], finish: FinishReason
) -> None:
    assert cut(session(limit=4 + room), tokens) == (kept, finish)


def test_stop_token_inside_a_draft_drops_what_follows() -> None:
    made = session()
    result = StepResult((7, EOS, 9, 5), (-0.1,) * 4, (0, 1, 2))
    counted = verdict(made, chain(7, EOS, 9, 3), result)
    assert made.tokens == [1, 2, 3, 4, 7, EOS]
    assert made.finish is FinishReason.STOP
    assert counted == (4, 2, 2), "levels behind the stop token were never judged"
    assert made.stats.drafted_at == [1, 1]
    assert made.stats.accepted_at == [1, 1]


def test_verdict_counts_every_judged_level() -> None:
    made = session()
    verdict(made, chain(7, 8, 9, 3), StepResult((7, 8, 5), (-0.1,) * 3, (0, 1)))
    verdict(made, chain(7, 8), StepResult((2,), (-0.1,), ()))
    stats = made.stats
    assert (stats.steps, stats.draft_tokens, stats.accepted_tokens) == (2, 6, 2)
    assert stats.drafted_at == [2, 2, 1, 1]
    assert stats.accepted_at == [1, 1]
    assert made.cached == len(made.tokens) - 1


def test_depth_of_a_tree_is_judged_by_level_not_by_node() -> None:
    made = session()
    tree = Draft((7, 8, 9, 10), (-1, -1, 0, 2))
    verdict(made, tree, StepResult((7, 5), (-0.1, -0.1), (0,)))
    assert made.stats.drafted_at == [1, 1, 1]


def test_extend_stops_only_at_its_last_token() -> None:
    assert extend_finish(session(), [EOS, 5]) is FinishReason.RUNNING
    assert extend_finish(session(), [5, EOS]) is FinishReason.STOP
    assert extend_finish(session(limit=6), [5, 6]) is FinishReason.LENGTH


def test_replay_needs_the_same_base_and_kind() -> None:
    made = session()
    answer = Verified((), (5,), (), 5, FinishReason.RUNNING, Rule.COUPLED, None, Timing())
    made.kept = Kept(Kind.VERIFY, 4, answer)
    assert replay(made, Kind.VERIFY, 4) == answer._replace(replayed=True)
    for kind, base in ((Kind.VERIFY, 3), (Kind.EXTEND, 3)):
        with pytest.raises(PositionMismatchError):
            replay(made, kind, base)


def test_stale_base_says_where_the_session_is() -> None:
    with pytest.raises(PositionMismatchError) as caught:
        replay(session(), Kind.VERIFY, 3)
    assert caught.value.metadata == {"committed_length": "4"}


def test_finished_session_takes_no_step() -> None:
    made = session()
    made.finish = FinishReason.STOP
    with pytest.raises(SessionFinishedError):
        replay(made, Kind.VERIFY, 4)


def test_a_new_offer_replaces_the_old_one() -> None:
    made = session()
    first = offer(made, DraftShape(2), chain(7, 8), Timing())
    second = offer(made, DraftShape(1), chain(9), Timing())
    assert first and second and first.draft_id != second.draft_id
    assert kept_draft(made, second.draft_id) == chain(9)
    with pytest.raises(DraftNotFoundError):
        kept_draft(made, first.draft_id)


def test_a_commit_forgets_the_offer() -> None:
    made = session()
    made_offer = offer(made, DraftShape(2), chain(7, 8), Timing())
    verdict(made, chain(7, 8), StepResult((7, 8, 9), (0.0,) * 3, (0, 1)))
    assert made_offer is not None
    with pytest.raises(DraftNotFoundError):
        kept_draft(made, made_offer.draft_id)


def test_a_finished_session_is_offered_nothing() -> None:
    made = session()
    made.finish = FinishReason.LENGTH
    assert offer(made, DraftShape(2), chain(7, 8), Timing()) is None


def test_speculation_can_be_off() -> None:
    made = session()
    made.speculate = False
    with pytest.raises(SpeculationDisabledError):
        check_speculation(made)


def test_a_view_is_a_copy() -> None:
    made = session()
    seen = view(made, 0.0, with_tokens=True)
    verdict(made, chain(7), StepResult((7, 8), (0.0,) * 2, (0,)))
    assert (seen.length, seen.tokens, seen.stats.steps) == (4, (1, 2, 3, 4), 0)


def test_acceptance_identities() -> None:
    stats = Acceptance()
    for nodes, judged, accepted in [(4, 4, 2), (4, 4, 0), (3, 3, 3), (0, 0, 0)]:
        stats.record(nodes, judged, accepted)
    assert stats.steps == sum(stats.rounds) == 4
    assert stats.accepted_tokens == sum(stats.accepted_at) == 5
    assert stats.draft_tokens == sum(stats.drafted_at) == 11


def test_shape_requests_build_on_the_sessions_own() -> None:
    own = DraftShape(4)
    assert ShapeRequest().over(own) is own
    assert ShapeRequest(depth=2).over(own) == DraftShape(2)
    assert ShapeRequest(branching=3).over(own) == DraftShape(4, 0, 3)
    assert ShapeRequest(parents=(-1, 0, 0)).over(own) == DraftShape(2, 3, 1, (-1, 0, 0))
    tree = DraftShape(2, 3, 1, (-1, 0, 0))
    assert ShapeRequest(depth=1).over(tree) == DraftShape(1, 1, 1, (-1,))
    assert ShapeRequest(branching=1, depth=3).over(tree) == DraftShape(3)
