"""The five rules, and for each the proof that its test can fail: a twin of the backend that breaks it is rejected."""

from __future__ import annotations

import pytest

from graphs.conformance import rules
from graphs.conformance.harness import Kit
from graphs.conformance.rules import Broken, Wrong
from graphs.conformance.twins import BREACHES, Breach
from graphs.errors import GraphError


def test_r1_states_share_nothing(kit: Kit) -> None:
    rules.states_share_nothing(kit)


def test_r1_a_pass_recorded_after_a_warm_up(kit: Kit) -> None:
    rules.recorded_after_a_run(kit)


def test_r1_a_pass_run_after_a_recording(kit: Kit) -> None:
    rules.run_after_a_recording(kit)


def test_r1_two_recordings_of_one_shape(kit: Kit) -> None:
    rules.two_recordings(kit)


def test_r2_states_keep_their_contents(kit: Kit) -> None:
    rules.states_keep_their_contents(kit)


def test_r2_passes_leave_their_inputs(kit: Kit) -> None:
    rules.passes_leave_their_inputs(kit)


def test_r3_replays_read_what_was_refreshed(kit: Kit) -> None:
    rules.replays_read_what_was_refreshed(kit)


def test_r4_host_decisions_hold(kit: Kit) -> None:
    rules.host_decisions_hold(kit)


def test_r5_eager_steps_see_each_other(kit: Kit) -> None:
    rules.eager_steps_see_each_other(kit)


def test_r5_recorded_steps_see_each_other(kit: Kit) -> None:
    rules.recorded_steps_see_each_other(kit)


def test_r5_replays_in_turn(kit: Kit) -> None:
    rules.replays_in_turn(kit)


@pytest.mark.parametrize("breach", BREACHES, ids=str)
def test_a_broken_twin_is_rejected(kit: Kit, breach: Breach) -> None:
    """If this fails, the check of that rule would pass whatever the backend does."""
    if breach.harmful and kit.device.type != "cpu":
        pytest.skip("on a device this twin reads plans that were never filled, which could end the process")
    if _rejected(kit, breach):
        return
    if breach.unseen:
        pytest.skip(breach.unseen)
    raise Wrong(f"{breach.check.__name__} accepts the twin {breach.twin}: with this backend the check cannot fail")


def _rejected(kit: Kit, breach: Breach) -> bool:
    twin = Kit(lambda: breach.twin(kit.backend()), kit.backend, kit.recorder, kit.device)
    try:
        breach.check(twin)
    except (Broken, GraphError):
        return True
    return False
