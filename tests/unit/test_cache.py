"""The paged cache: storage, slots, and moving accepted nodes into place."""

from __future__ import annotations

import random

import pytest
import torch

from target.batch import Batch, causal_positions
from target.cache import LayerShape, PagedCache, bytes_per_token
from target.errors import PlanError

TARGET, HEAD = [LayerShape(2, 4)] * 3, [LayerShape(1, 8)]


def cache(pages: int = 6, page_size: int = 4) -> PagedCache:
    made = PagedCache([TARGET, HEAD], pages, page_size, torch.float32)
    for number, layer in enumerate(made.layers):
        layer.copy_(torch.arange(layer.numel()).view(layer.shape) + 1000 * number)
    return made


def test_layers_are_numbered_through_the_groups() -> None:
    made = PagedCache([TARGET, HEAD], 6, 4, torch.bfloat16)
    assert [tuple(layer.shape) for layer in made.layers] == [(24, 2, 2, 4)] * 3 + [(24, 2, 1, 8)]
    assert all((layer == 0).all() for layer in made.layers)
    made.layers[1][5] = 7
    assert (made.groups[0][1, 5] == 7).all() and made.groups[0].sum() == 7 * 16


def test_bytes() -> None:
    made = PagedCache([TARGET, HEAD], 6, 4, torch.bfloat16)
    assert bytes_per_token([TARGET, HEAD], torch.bfloat16) == 2 * 2 * (3 * 2 * 4 + 8)
    assert made.bytes == 24 * bytes_per_token([TARGET, HEAD], torch.bfloat16)


@pytest.mark.parametrize(
    ("groups", "pages", "page_size", "match"),
    [
        ([TARGET], 6, 1, "2 pages of 2 tokens or more, got 6 of 1"),
        ([TARGET], 1, 4, "2 pages of 2 tokens or more, got 1 of 4"),
        ([[*TARGET, *HEAD]], 6, 4, "must have one shape"),
        ([[]], 6, 4, "must have one shape, got none"),
    ],
)
def test_impossible_caches(groups: list[list[LayerShape]], pages: int, page_size: int, match: str) -> None:
    with pytest.raises(PlanError, match=match):
        PagedCache(groups, pages, page_size, torch.float32)


@pytest.mark.parametrize("group", [0, 1])
def test_move_reads_everything_before_it_writes(group: int) -> None:
    """Compaction: sources and destinations overlap in any order, and the other group stays as it was."""
    draw = random.Random(1)
    for _ in range(50):
        made = cache()
        before = [g.clone() for g in made.groups]
        count = draw.randint(1, 12)
        source, destination = draw.sample(range(24), count), draw.sample(range(24), count)
        made.move(torch.tensor(source), torch.tensor(destination), group)
        expected = [g.clone() for g in before]
        for s, d in zip(source, destination, strict=True):
            expected[group][:, d] = before[group][:, s]
        assert all(torch.equal(g, e) for g, e in zip(made.groups, expected, strict=True))


def test_move_shifts_an_accepted_path_next_to_its_root() -> None:
    made = cache()
    before = made.layers[0].clone()
    made.move(torch.tensor([9, 10, 11]), torch.tensor([8, 9, 10]))  # each destination is the next one's source
    assert torch.equal(made.layers[0][8:11], before[9:12])
    assert torch.equal(made.layers[0][11:], before[11:])


def test_slots_follow_the_page_table_and_padding_goes_to_the_null_page() -> None:
    context, counts = torch.tensor([6, 0, 3]), torch.tensor([3, 5, 0])
    pages = torch.tensor([[5, 2, 9], [4, 1, 0], [7, 0, 0]])
    batch = Batch(torch.zeros(3, 5, dtype=torch.int64), causal_positions(context, 5), context, counts, pages, longest=9)
    assert batch.positions.tolist() == [[6, 7, 8, 9, 10], [0, 1, 2, 3, 4], [3, 4, 5, 6, 7]]
    assert batch.slots(4, 3).tolist() == [[10, 11, 36, 3, 3], [16, 17, 18, 19, 4], [3] * 5]
    assert batch._replace(offset=2, counts=torch.tensor([1, 2, 0])).slots(4, 3).tolist() == [
        [36, 3, 3, 3, 3],
        [18, 19, 3, 3, 3],
        [3] * 5,
    ]
