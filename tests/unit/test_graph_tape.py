"""TapeRecorder: nothing runs while it records, what CUDA forbids is refused, and a replay is the pass."""

from __future__ import annotations

import numpy
import pytest
import torch
import torch.nn.functional as F
from graph_toys import Toy

from graphs.errors import CaptureError
from graphs.shape import GraphShape
from graphs.tape import TapeRecorder

WEIGHT = torch.linspace(-1, 1, 16).view(4, 4)
MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "nested": lambda: Both()}


class Both:
    def __enter__(self):
        self.modes = [torch.inference_mode(), torch.no_grad(), torch.inference_mode()]
        for mode in self.modes:
            mode.__enter__()

    def __exit__(self, *error):
        for mode in reversed(self.modes):
            mode.__exit__(*error)


@pytest.fixture(params=MODES)
def mode(request):
    with MODES[request.param]():
        yield


@pytest.fixture
def tape():
    return TapeRecorder(poison_between_replays=True)


def everything(x, index, store):
    """Views, factories, in-place writes, composites, integer results as indices."""
    y = F.linear(x, WEIGHT).view(2, 2, 4)
    store.index_copy_(0, index, y.flatten(0, 1))
    attended = F.scaled_dot_product_attention(
        y[None], store.view(1, 1, *store.shape).expand(1, 2, -1, -1), y.new_ones(1, 2, 6, 4)
    )
    best = attended.to(torch.float32).argmax(-1)
    top, places = y.topk(2, -1)
    picked = WEIGHT[best].squeeze(0) + torch.arange(4) + torch.zeros(4).fill_(2)
    share = places // (best[0, :, :, None] + 1)
    top[0, 0] = 7.0
    top.masked_fill_(top > 6, 0.5)
    kept = torch.where(picked > 0, picked, 0.0)
    kept[:, 0] = torch.cat((top, top), -1)[:, 1]
    return kept, share, F.dropout(top, 0.5, training=False), F.rms_norm(y, (4,)), torch.full((2,), 3)


def arguments(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 4, generator=generator), torch.randperm(6, generator=generator)[:4], torch.zeros(6, 4)


def test_a_replay_is_the_pass_on_the_recorded_and_on_new_inputs(mode, tape):
    static = arguments(0)
    outputs, recording = tape.record(lambda: everything(*static))
    addresses = [output.data_ptr() for output in outputs]
    for seed in (0, 1, 2):
        given = arguments(seed)
        for buffer, value in zip(static, given, strict=True):
            buffer.copy_(value)
        expected = everything(*given)
        recording.replay()
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
        assert torch.equal(static[2], given[2])
    assert addresses == [output.data_ptr() for output in outputs]


def test_nothing_runs_while_it_records(mode, tape):
    x, index, store = arguments(0)
    outputs, _ = tape.record(lambda: everything(x, index, store))
    assert store.sum() == 0
    assert all(output.isnan().all() for output in outputs if output.is_floating_point())
    assert all((output == torch.iinfo(output.dtype).min).all() for output in outputs if not output.is_floating_point())


def test_views_share_memory_also_where_the_schema_only_says_they_may(mode, tape):
    x = torch.ones(2, 3)
    (same, copied), recording = tape.record(lambda: (x.to(torch.float32).reshape(-1).contiguous(), x.T.reshape(-1)))
    assert same.data_ptr() == x.data_ptr()
    x.copy_(torch.arange(6.0).view(2, 3))
    recording.replay()
    assert same.tolist() == [0, 1, 2, 3, 4, 5]
    assert copied.tolist() == [0, 3, 1, 4, 2, 5]


X, INDEX, MASK = torch.arange(1.0, 9.0).view(4, 2), torch.tensor([1, 2, 0]), torch.tensor([True, False, True, True])
FORBIDDEN = {
    "item": (lambda: X.sum().item(), "reads a value on the host"),
    "tolist": (lambda: INDEX.tolist(), "on the host"),
    "numpy": (lambda: INDEX.numpy(), "on the host"),
    "cpu": (lambda: INDEX.cpu(), "on the host"),
    "print": (lambda: f"{X!r}", "on the host"),
    "format": (lambda: f"{X[0, 0]:.2f}", "on the host"),
    "bool": (lambda: bool(INDEX[0] > 1), "on the host"),
    "if": (lambda: 1 if (X > 0).all() else 2, "on the host"),
    "int": (lambda: int(INDEX[0]), "on the host"),
    "equal": (lambda: torch.equal(X, X), "on the host"),
    "range": (lambda: range(INDEX[0]), "on the host"),
    "a scalar tensor as index": (lambda: X[INDEX[0]], "on the host"),
    "narrow": (lambda: torch.narrow(X, 0, INDEX[0], 1), "on the host"),
    "nonzero": (lambda: X.nonzero(), "depends on data"),
    "where": (lambda: torch.where(X > 0), "depends on data"),
    "mask": (lambda: X[MASK], "depends on data"),
    "masked_select": (lambda: X.masked_select(X > 0), "depends on data"),
    "unique": (lambda: INDEX.unique(), "depends on data"),
    "repeat_interleave": (lambda: INDEX.repeat_interleave(INDEX), "depends on data"),
    "values through a mask": (lambda: X.index_put_((MASK,), torch.ones(3, 2)), "depends on data"),
    "tensor": (lambda: torch.tensor([1, 2]), "fresh host data"),
    "as_tensor": (lambda: torch.as_tensor([1, 2]), "fresh host data"),
    "new_tensor": (lambda: X.new_tensor([1, 2]), "fresh host data"),
    "from_numpy": (lambda: torch.from_numpy(numpy.zeros(2)), "fresh host data"),
    "a number": (lambda: torch.tensor(3.0), "fresh host data"),
    "asarray": (lambda: torch.asarray(3.0), "fresh host data"),
    "a list as index": (lambda: X[[0, 1]], "index given as a list"),
    "resize": (lambda: torch.empty(0).resize_(3), "other memory"),
    "set": (lambda: torch.empty(0).set_(X), "other memory"),
    "rand": (lambda: torch.rand(2), "random"),
    "normal": (lambda: torch.empty(2).normal_(), "random"),
    "multinomial": (lambda: X.multinomial(1), "random"),
    "dropout": (lambda: F.dropout(X, 0.5), "random"),
    "a wrong shape": (lambda: X + X[:3], "must match the size"),
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_what_cuda_could_not_record_is_refused(mode, tape, name):
    body, text = FORBIDDEN[name]
    with pytest.raises(CaptureError, match=text):
        tape.record(body)
    assert not tape.recording
    outputs, recording = tape.record(lambda: X + 1)  # the next recording is sound
    recording.replay()
    assert torch.equal(outputs, X + 1)


ALLOWED = {
    "one value through a mask": lambda store: store.index_put_((MASK,), torch.zeros(())),
    "repeat_interleave of known length": lambda store: store.copy_(X[INDEX.repeat_interleave(2, output_size=6)[:4]]),
    "a tensor as index": lambda store: store[INDEX].add_(0) + 1,
    "a number in a slice": lambda store: store[:, 0].fill_(2),
    "setitem": lambda store: store.__setitem__((slice(None), 1), 3.0),
    "where with a number": lambda store: store.copy_(torch.where(X > 2, X, -1.0)),
    "in-place metadata": lambda store: store.copy_(store.add(1).t_().mul_(2).T),
    "foreach": lambda store: torch._foreach_add_([store[0], store[1]], 1.0),
    "out": lambda store: torch.add(X, 1, out=store),
    "sort": lambda store: store.copy_(X.sort(0).values),
    "index of an index": lambda store: store.copy_(X[INDEX.argsort()[INDEX][:1]]),
    "division by what was computed": lambda store: store.add_((7 // (INDEX + 1)).sum()),
    "as_tensor of a tensor": lambda store: store.copy_(torch.as_tensor(X)),
    "tril": lambda store: store.copy_(torch.ones(4, 2).tril()),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_what_cuda_records_is_recorded(mode, tape, name):
    store, expected = torch.zeros(4, 2), torch.zeros(4, 2)
    recording = tape.record(lambda: ALLOWED[name](store))[1]
    assert store.sum() == 0
    ALLOWED[name](expected)
    recording.replay()
    assert torch.equal(store, expected)


@torch.library.custom_op("graph_tests::store", mutates_args=("cache",))
def store_rows(cache: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    cache[: rows.shape[0]] = rows
    return rows.sum(0)


def test_an_operation_that_writes_and_returns_is_noted_whole(mode, tape):
    cache, rows = torch.zeros(4, 2), torch.ones(2, 2)
    total, recording = tape.record(lambda: store_rows(cache, rows))
    assert cache.sum() == 0 and total.isnan().all()
    rows.fill_(3)
    recording.replay()
    assert cache.sum() == 12 and total.tolist() == [6, 6]


def test_gradients_are_refused(tape):
    weight = torch.ones(2, requires_grad=True)
    with pytest.raises(CaptureError, match="no backward"):
        tape.record(lambda: weight * 2)
    with torch.no_grad():
        tape.record(lambda: weight * 2)


def test_a_recording_may_read_what_another_made(mode, tape):
    index = torch.tensor([2, 1])
    (places, values), first = tape.record(lambda: (index * 1, X[index]))
    picked, second = tape.record(lambda: X[places] + values)
    first.replay()
    second.replay()
    assert torch.equal(picked, X[index] * 2)


def test_a_pass_may_end_one_recording_and_begin_another(mode, tape):
    recordings = []

    def layer(x):
        y = x * 2
        recordings.append(tape.end())
        tape.begin()
        return y + 1

    x = torch.ones(2)
    tape.begin()
    y = layer(layer(x))
    recordings.append(tape.end(y))
    x.fill_(3)
    for recording in recordings:
        recording.replay()
    assert y.tolist() == [15, 15]


def test_begin_and_end_belong_together(tape):
    with pytest.raises(CaptureError, match="no recording"):
        tape.end()
    tape.begin()
    with pytest.raises(CaptureError, match="under way"):
        tape.begin()
    tape.abort()
    tape.abort()
    assert not tape.recording


def test_other_errors_are_left_as_they_are(tape):
    with pytest.raises(KeyError):
        tape.record(lambda: {}["a"])
    assert not tape.recording


def test_released_recordings_refuse_and_give_their_memory_back(mode, tape):
    x = torch.ones(256)
    recording = tape.record(lambda: (x + 1) * 2)[1]
    assert tape.pool_bytes == 2 * 1024
    recording.release()
    assert tape.pool_bytes == 0
    with pytest.raises(CaptureError, match="released"):
        recording.replay()
    tape.close()


def test_poison_reaches_what_nobody_kept_and_spares_what_was(mode):
    tape = TapeRecorder()
    x, held = torch.ones(3), []

    def body():
        held.append(x + 1)  # a reference that the recorder does not know
        return held[0] * 2

    kept, recording = tape.record(body)
    recording.replay()
    tape.poison().replay()
    assert held[0].isnan().all()
    assert kept.tolist() == [4, 4, 4]


@pytest.mark.parametrize("poisoned", [True, False])
def test_memory_that_a_pass_never_fills_is_poisoned_before_each_replay(mode, poisoned):
    unfilled, recording = TapeRecorder(poison_between_replays=poisoned).record(lambda: torch.empty(3))
    unfilled.fill_(1)
    recording.replay()
    assert bool(unfilled.isnan().all()) == poisoned


def test_a_tape_knows_which_memory_it_reads(mode, tape):
    toy = Toy()
    state = toy.state(GraphShape(1, 1))
    inputs = toy.inputs(state.shape)
    recording = tape.record(lambda: toy.forward(state, inputs))[1]
    assert all(recording.touches(buffer) for buffer in state.buffers.values())
    assert recording.touches(inputs["tokens"]) and recording.touches(toy.cache)
    assert not recording.touches(torch.zeros(1))


def test_recording_is_of_one_thread_of_modes_only(tape):
    with torch.no_grad():
        tape.record(lambda: X + 1)
    assert torch.rand(2).shape == (2,) and X.sum().item() is not None
