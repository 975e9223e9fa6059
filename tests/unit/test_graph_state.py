"""Attention states: refresh in place, ownership of memory, and what counts as shared."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
import torch

from graphs.errors import SharedStorageError, StateError
from graphs.owners import Owners, parts_of
from graphs.shape import GraphShape
from graphs.state import AttentionState, AttentionStatePair

SHAPE = GraphShape(3, 2)


def state(make_plan=lambda buffers: None, **options):
    values = {"lengths": torch.tensor([5, 6, 7]), "pages": torch.ones(3, 4, dtype=torch.int32)}
    return AttentionState(SHAPE, values, make_plan, **options)


def test_values_are_copied_and_never_viewed():
    scratch = torch.arange(10)
    made = AttentionState(SHAPE, {"lengths": scratch[2:5]}, lambda buffers: None)
    scratch.zero_()
    assert made.buffers["lengths"].tolist() == [2, 3, 4]
    assert made.buffers["lengths"].untyped_storage().nbytes() == 3 * 8


def test_a_smaller_batch_fills_a_corner_and_the_padding_follows():
    made = state(pads={"lengths": -1})
    addresses = [buffer.data_ptr() for buffer in made.buffers.values()]
    made.refresh({"lengths": torch.tensor([9]), "pages": torch.full((1, 2), 8, dtype=torch.int32)})
    assert made.buffers["lengths"].tolist() == [9, -1, -1]
    assert made.buffers["pages"].tolist() == [[8, 8, 0, 0], [0] * 4, [0] * 4]
    assert addresses == [buffer.data_ptr() for buffer in made.buffers.values()]


def test_a_refresh_from_its_own_memory_moves_it():
    made = state()
    made.refresh({"lengths": made.buffers["lengths"][1:], "pages": made.buffers["pages"]})
    assert made.buffers["lengths"].tolist() == [6, 7, 0]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"lengths": torch.zeros(3, dtype=torch.int64)}, "missing: pages"),
        ({"lengths": torch.zeros(4, dtype=torch.int64)}, "cannot hold \\[4\\]"),
        ({"lengths": torch.zeros(3, 1, dtype=torch.int64)}, "cannot hold \\[3, 1\\]"),
        ({"lengths": torch.zeros(3)}, "holds torch.int64, got torch.float32"),
        ({"masks": torch.zeros(3)}, "no buffer 'masks', only lengths, pages"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(values, text):
    made = state()
    full = {"pages": torch.zeros(3, 4, dtype=torch.int32)} if "missing" not in text else {}
    if "masks" in values:
        full["lengths"] = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(StateError, match=text):
        made.refresh({**full, **values})
    assert made.buffers["lengths"].tolist() == [5, 6, 7]
    assert made.buffers["pages"].sum() == 12


def test_padding_of_an_unknown_buffer_is_refused():
    with pytest.raises(StateError, match="padding is given for masks"):
        state(pads={"masks": 1})


def test_reset_puts_back_what_was_built():
    made = state()
    made.refresh({"lengths": torch.zeros(3, dtype=torch.int64), "pages": torch.zeros(3, 4, dtype=torch.int32)})
    made.reset()
    assert made.buffers["lengths"].tolist() == [5, 6, 7]
    assert made.buffers["pages"].sum() == 12


def test_states_built_in_inference_mode_are_refreshed_outside():
    with torch.inference_mode():
        made = state()
    made.refresh({"lengths": torch.zeros(3, dtype=torch.int64), "pages": torch.zeros(3, 4, dtype=torch.int32)})
    assert made.buffers["lengths"].sum() == 0


def test_fresh_shares_the_buffers_and_takes_a_new_plan():
    made = state(lambda buffers: [])
    twin = made.fresh()
    assert twin.plan is not made.plan
    twin.refresh({"lengths": torch.zeros(3, dtype=torch.int64), "pages": torch.zeros(3, 4, dtype=torch.int32)})
    assert made.buffers["lengths"].sum() == 0
    assert made.fresh(lambda buffers: {"own": 1}).plan == {"own": 1}


def test_a_plan_that_was_replaced_stays_alive_and_counts():
    tensors = [torch.zeros(2), torch.zeros(2)]
    supply = iter(tensors)
    made = state(lambda buffers: [next(supply)])
    made.replan()
    assert made.plan[0] is tensors[1]
    assert {path.split("[")[0] for path in made.plan_parts().values()} == {"plan", "earlier plans"}
    assert len(made.storages()) == 4


# what counts as shared


class Plan:
    def __init__(self, inner):
        self.inner = inner


class Slotted:
    __slots__ = ("inner",)

    def __init__(self, inner):
        self.inner = inner


@dataclass(frozen=True)
class Config:
    heads: int = 4


TENSOR = torch.zeros(4)
WRAPPINGS = {
    "itself": lambda thing: thing,
    "attribute": Plan,
    "slot": Slotted,
    "list": lambda thing: [thing],
    "dict": lambda thing: {"a": (1, thing)},
    "partial": lambda thing: functools.partial(print, thing),
}


@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS)
@pytest.mark.parametrize("thing", [TENSOR, TENSOR[1:], Plan(None)], ids=["tensor", "view", "object"])
def test_what_two_plans_share_is_found_wherever_it_is(wrap, thing):
    pair = AttentionStatePair(state(lambda buffers: wrap(thing)), state(lambda buffers: wrap(thing)))
    with pytest.raises(SharedStorageError, match="plan"):
        pair.check()


def test_a_pair_that_shares_nothing_that_is_written_passes():
    config, model = Config(), torch.nn.Linear(2, 2)
    make = lambda buffers: Plan((config, model, buffers["lengths"], torch.zeros(4), print))  # noqa: E731
    AttentionStatePair(state(make), state(make)).check()


def test_two_views_of_one_scratch_are_shared_though_they_do_not_overlap():
    scratch = torch.zeros(8)
    one, other = state(lambda buffers: scratch[:4]), state(lambda buffers: scratch[4:])
    with pytest.raises(SharedStorageError, match="plan is plan"):
        AttentionStatePair(one, other).check()


class Cache:
    def __init__(self):
        self.layers = [torch.zeros(4), torch.zeros(4)]


def test_the_cache_may_be_shared_when_the_state_says_so():
    cache = Cache()
    make = lambda buffers: Plan((cache, cache.layers[1][2:]))  # noqa: E731
    with pytest.raises(SharedStorageError):
        AttentionStatePair(state(make), state(make)).check()
    AttentionStatePair(state(make, shared=[cache]), state(make, shared=[cache])).check()


def test_a_plan_that_holds_itself_is_walked_once():
    plan = Plan(None)
    plan.inner = [plan]
    assert len(parts_of({"plan": plan})) == 2


def test_owners_forget_what_was_released():
    owners = Owners()
    owners.hold("verify", parts_of({"plan": Plan(None)}))
    assert [name for name, _ in owners] == ["verify"]
    owners.drop("verify")
    owners.drop("verify")
    assert list(owners) == []
