"""Votes between ranks, over real processes."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from graphs.agreement import Agreement, Alone, Ballot, DisagreementError, Group, LostRankError, Question
from tests.unit.ranks import Ending, run_ranks

ENOUGH, NEEDED = 2048, 512
TIMEOUT = 2.0


class Fixed:
    """Voters whose other ranks' ballots are known."""

    rank = 0

    def __init__(self, *others: Ballot) -> None:
        self.others, self.size = others, 1 + len(others)

    def gather(self, ballot: Ballot, about: str) -> list[Ballot]:
        return [ballot, *(other._replace(subject=other.subject or ballot.subject) for other in self.others)]


def capture(rank: int, rooms: list[int], vote: bool = True) -> list[str]:
    """What start-up does: each shape's pass contains a collective, and ranks without room have no batch for it."""
    agreement = Agreement(Group.apart(TIMEOUT)) if vote else None
    done = []
    for shape, needed in (("32x8", NEEDED), ("1x8", 16)):
        has = rooms[rank] >= needed
        if agreement is None and not has:
            continue
        if agreement is not None and not agreement.has_batch(shape, has, rooms[rank], needed):
            continue
        pass_with_collective()
        done.append(shape)
    if agreement is None:
        time.sleep(60)  # the rank serves, and waits for work that never comes
    return done


def pass_with_collective() -> None:
    dist.all_reduce(torch.ones(1))


def errors(endings: list[Ending]) -> set[tuple[str, str]]:
    return {(ending.error, ending.text) for ending in endings}


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_that_all_have_room_run_every_shape(size: int, tmp_path: Path) -> None:
    assert run_ranks(capture, size, tmp_path, [ENOUGH] * size) == [Ending(value=["32x8", "1x8"])] * size


@pytest.mark.parametrize("size", [2, 4])
def test_a_shape_that_no_rank_has_room_for_is_skipped_by_all(size: int, tmp_path: Path) -> None:
    assert run_ranks(capture, size, tmp_path, [NEEDED - 1] * size) == [Ending(value=["1x8"])] * size


@pytest.mark.parametrize("size", [2, 4])
def test_one_rank_without_room_is_the_same_error_on_every_rank(size: int, tmp_path: Path) -> None:
    endings = run_ranks(capture, size, tmp_path, [ENOUGH, 96, ENOUGH, ENOUGH][:size])
    ((error, text),) = errors(endings)
    assert error == "DisagreementError"
    assert "rank 1: no, room for 96 tokens where 512 are needed" in text
    assert f"{'rank 0' if size == 2 else 'ranks 0, 2, 3'}: yes, room for 2048 tokens" in text
    assert "(at most 96 tokens)" in text and "\n" not in text


def test_without_the_vote_start_up_hangs(tmp_path: Path) -> None:
    """The failure itself: rank 0 waits in the collective of a shape that rank 1 skipped. The vote ends it."""
    silent = run_ranks(capture, 2, tmp_path / "silent", [ENOUGH, 4], False, limit=4.0)
    assert silent == [Ending(hung=True)] * 2
    voted = run_ranks(capture, 2, tmp_path / "voted", [ENOUGH, 4], True, limit=10.0)
    assert {ending.error for ending in voted} == {"DisagreementError"}


def die(rank: int, dead: int, first: bool, size: int, folder: str) -> str:
    """Rank `dead` ends before it votes, or after a vote; the others say what they were told."""
    agreement = Agreement(Group.apart(TIMEOUT))
    if not first:
        agreement.draft_length(4)
    if rank == dead:
        wait_for([Path(folder) / f"made-{other}" for other in range(size) if other != dead])
        os._exit(1)
    (Path(folder) / f"made-{rank}").touch()
    with pytest.raises(LostRankError) as caught:
        agreement.draft_length(4)
    with pytest.raises(LostRankError) as again:
        agreement.ready(True)
    assert str(again.value) == str(caught.value)
    return str(caught.value)


def wait_for(files: list[Path]) -> None:
    while not all(file.exists() for file in files):
        time.sleep(0.01)


@pytest.mark.parametrize(("size", "dead"), [(2, 0), (4, 2)])
@pytest.mark.parametrize("first", [True, False])
def test_a_rank_that_dies_is_named_by_all_others(size: int, dead: int, first: bool, tmp_path: Path) -> None:
    endings = run_ranks(die, size, tmp_path, dead, first, size, str(tmp_path), limit=15.0)
    assert endings.pop(dead) == Ending()
    for rank, ending in zip([rank for rank in range(size) if rank != dead], endings, strict=True):
        assert not ending.hung and not ending.error, ending.text
        assert f"rank {rank} of {size} got no vote on the draft length from rank {dead}: ended" in ending.value


def leave_early(rank: int) -> None:
    if rank == 1:
        os._exit(1)
    Group.apart(TIMEOUT)


def test_a_rank_that_dies_before_the_first_vote_is_an_error_too(tmp_path: Path) -> None:
    survivor, _ = run_ranks(leave_early, 2, tmp_path, limit=15.0)
    assert survivor.error == "LostRankError" and "lost before ranks could vote" in survivor.text


def wait_elsewhere(rank: int) -> str:
    """Rank 1 is alive but stuck: out of memory in a pass, asleep in a collective."""
    agreement = Agreement(Group.apart(TIMEOUT))
    if rank == 1:
        time.sleep(60)
    with pytest.raises(LostRankError) as caught:
        agreement.ready(True)
    return str(caught.value)


def test_a_rank_that_is_stuck_elsewhere_is_noticed_after_the_timeout(tmp_path: Path) -> None:
    stuck = run_ranks(wait_elsewhere, 2, tmp_path, limit=6.0)
    assert stuck[1].hung and not stuck[0].hung
    assert "no vote on graphs for this batch from rank 1" in stuck[0].value


def drift(rank: int) -> bool:
    agreement = Agreement(Group(timeout=TIMEOUT))
    shape = "32x8" if rank else "16x8"
    return agreement.has_batch(shape, True, ENOUGH, NEEDED)


def test_ranks_at_different_shapes_notice(tmp_path: Path) -> None:
    ((error, text),) = errors(run_ranks(drift, 2, tmp_path))
    assert error == "DisagreementError" and "ranks vote on different things: rank 0 on has batch" in text


def all_questions(rank: int) -> list[object]:
    """Every question once, all agreed, then each disagreed on."""
    agreement = Agreement(Group(timeout=TIMEOUT))
    agreed = [
        agreement.draft_length(5),
        agreement.ready(False),
        agreement.enough_memory("8x4", True, 1 << 30),
        agreement.enough_memory("8x4", False, 0),
    ]
    return agreed + [
        said(lambda: agreement.draft_length(rank)),
        said(lambda: agreement.ready(rank == 0, "8x4")),
        said(lambda: agreement.enough_memory("8x4", rank != 1, rank << 20, 1 << 30)),
        agreement.draft_length(0),
    ]


def said(ask: object) -> str:
    assert callable(ask)
    with pytest.raises(DisagreementError) as caught:
        ask()
    return str(caught.value)


def test_every_question_can_be_agreed_and_disagreed_on_over_one_group(tmp_path: Path) -> None:
    first, second = run_ranks(all_questions, 2, tmp_path)
    assert first.value == second.value, (first, second)
    length, ready, memory = first.value[4:7]
    assert first.value[:4] + first.value[7:] == [5, False, True, False, 0]
    assert "rank 0: 0; rank 1: 1" in length
    assert "graphs for 8x4 are ready on some ranks only: rank 1: no; rank 0: yes" in ready
    assert "rank 1: no, 1.0 MiB free where 1024.0 are needed" in memory


def test_a_single_process_decides_alone() -> None:
    agreement = Agreement(Alone())
    assert agreement.has_batch("8x4", True, 10, 10) and not agreement.has_batch("8x4", False, 1, 10)
    assert agreement.draft_length(3) == 3
    assert agreement.ready(True) and not agreement.enough_memory("8x4", False, 0)


def test_ranks_with_the_same_answer_stand_together() -> None:
    no, yes = (Ballot(Question.HAS_BATCH, 0, answer, room, NEEDED) for answer, room in ((0, 96), (1, ENOUGH)))
    with pytest.raises(DisagreementError, match="ranks 1, 3: no, room for 96 .*; ranks 0, 2: yes, room for 2048"):
        Agreement(Fixed(no, yes, no)).has_batch("32x8", True, ENOUGH, NEEDED)


def test_ranks_at_different_questions_notice() -> None:
    with pytest.raises(DisagreementError, match="rank 0 on draft length .*rank 1 on readiness"):
        Agreement(Fixed(Ballot(Question.READINESS, 0, 3))).draft_length(3)
