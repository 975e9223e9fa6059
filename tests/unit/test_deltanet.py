"""The gated DeltaNet layer: its formulas, its two layouts, and replays that equal decoding bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from target.attention.dense import attend_causal
from target.config_hybrid import DeltaNetConfig
from target.deltanet import DeltaInputs, DeltaRows, GatedDeltaNet, causal_conv, delta_rows, delta_rule
from target.deltanet_chunks import chunked_delta_rule, whole_sequences
from target.errors import PlanError
from target.states import StateCache, StatePass, StateShape

SIZES = DeltaNetConfig(
    key_heads=2, value_heads=6, key_dim=8, value_dim=16, kernel=4, layers=frozenset({0}), grouped=False
)
SIZE, EPS = 24, 1e-5
SHAPE = StateShape(4, SIZES.channels, 6, 8, 16)
NO_ROTATION = torch.empty(0)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def layer(sizes: DeltaNetConfig = SIZES) -> GatedDeltaNet:
    generator, made = torch.Generator().manual_seed(0), GatedDeltaNet(0, SIZE, sizes, EPS)
    for parameter in made.parameters():
        parameter.data = 0.4 * torch.randn(parameter.shape, generator=generator)
    return made.requires_grad_(False)


def run(made: GatedDeltaNet, x: Tensor) -> Tensor:
    return made(x, NO_ROTATION, NO_ROTATION, whole_sequences(attend_causal))  # type: ignore[no-any-return]


def by_hand(made: GatedDeltaNet, x: Tensor) -> Tensor:
    """One sequence x [T, size] by the paper's formula S (I - beta k k^T) a + beta v k^T, in float64 and by head."""
    s, weights = made.sizes, {name: p.double() for name, p in made.named_parameters()}
    x = x.double()
    mixed, z = (x @ weights["qkvz.weight"].T).split((s.channels, s.value_size), -1)
    b, a = (x @ weights["ba.weight"].T).chunk(2, -1)
    padded = F.pad(mixed.T[None], (s.kernel - 1, 0))
    mixed = F.silu(F.conv1d(padded, weights["conv"], groups=s.channels)[0].T)
    out = torch.zeros(len(x), s.value_heads, s.value_dim, dtype=torch.float64)
    for head in range(s.value_heads):
        at = head // s.ratio * s.key_dim
        state = torch.zeros(s.value_dim, s.key_dim, dtype=torch.float64)
        for t in range(len(x)):
            q, k = (mixed[t, start + at : start + at + s.key_dim] for start in (0, s.key_size))
            q, k = (y / (y.square().sum() + 1e-6).sqrt() for y in (q, k))
            v = mixed[t, 2 * s.key_size + head * s.value_dim :][: s.value_dim]
            beta = b[t, head].sigmoid()
            decay = (-weights["a_log"][head].exp() * F.softplus(a[t, head] + weights["dt_bias"][head])).exp()
            state = decay * state @ (torch.eye(s.key_dim) - beta * k.outer(k)) + beta * v.outer(k)
            out[t, head] = state @ q / s.key_dim**0.5
    normed = F.rms_norm(out, (s.value_dim,), weights["norm.weight"], EPS) * F.silu(z.unflatten(-1, (s.value_heads, -1)))
    return normed.flatten(1) @ weights["o.weight"].T


def test_the_formula() -> None:
    made, x = layer(), torch.randn(2, 19, SIZE, generator=torch.Generator().manual_seed(1))
    got = run(made, x)
    for row in range(2):
        torch.testing.assert_close(got[row], by_hand(made, x[row]).float(), rtol=1e-4, atol=1e-5)


def test_a_grouped_layout_is_the_flat_one_in_another_order() -> None:
    flat, x = layer(), torch.randn(1, 7, SIZE, generator=torch.Generator().manual_seed(2))
    grouped = GatedDeltaNet(0, SIZE, replace(SIZES, grouped=True), EPS)
    state = dict(flat.state_dict())
    q, k, v, z = (part.unflatten(0, (SIZES.key_heads, -1)) for part in state["qkvz.weight"].split((16, 16, 96, 96)))
    state["qkvz.weight"] = torch.cat((q, k, v, z), dim=1).flatten(0, 1)
    b, a = (part.unflatten(0, (SIZES.key_heads, -1)) for part in state["ba.weight"].chunk(2))
    state["ba.weight"] = torch.cat((b, a), dim=1).flatten(0, 1)
    grouped.load_state_dict(state)
    torch.testing.assert_close(run(grouped, x), run(flat, x))


def test_the_convolution() -> None:
    generator = torch.Generator().manual_seed(3)
    window, weight = torch.randn(2, 9, 5, generator=generator), torch.randn(5, 4, generator=generator)
    expected = F.conv1d(window.transpose(1, 2), weight[:, None], groups=5).transpose(1, 2)
    torch.testing.assert_close(causal_conv(window, weight), expected)


def test_a_layer_without_states_is_refused() -> None:
    with pytest.raises(PlanError, match="a hybrid target cannot run without recurrent states"):
        layer()(torch.zeros(1, 1, SIZE), NO_ROTATION, NO_ROTATION, attend_causal)


def test_decays_stay_float32() -> None:
    made = layer()
    exact = made.a_log.clone(), made.dt_bias.clone()
    half = made.to(torch.bfloat16)
    assert half.conv.dtype == half.qkvz.weight.dtype == torch.bfloat16
    assert torch.equal(half.a_log, exact[0]) and torch.equal(half.dt_bias, exact[1])
    with torch.device("meta"):
        empty = GatedDeltaNet(0, SIZE, SIZES, EPS)
    filled = empty.to(torch.bfloat16).to_empty(device="cpu")
    assert (filled.a_log.dtype, filled.a_log.device.type) == (torch.float32, "cpu")


def test_training_reaches_every_weight() -> None:
    made = layer().requires_grad_(True)
    run(made, torch.randn(2, 6, SIZE)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in made.parameters())


# states


def song(length: int, seed: int) -> DeltaInputs:
    """Inputs of one row."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(1, length, SIZES.channels, generator=generator)
    decay, beta = torch.rand(2, 1, length, SIZES.value_heads, generator=generator).unbind()
    return DeltaInputs(mixed, decay, beta, layer().conv.squeeze(1), SIZES)


def cut(songs: list[DeltaInputs], at: list[int], width: int) -> DeltaInputs:
    """The next `width` tokens of each row as one pass."""
    first = songs[0]
    rows = [[x[:, n : n + width] for x in song[:3]] for song, n in zip(songs, at, strict=True)]
    return DeltaInputs(*(torch.cat(parts) for parts in zip(*rows, strict=True)), first.conv, SIZES)


def decode(inputs: DeltaInputs, length: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """One row alone, token by token: windows and matrices after 0 .. length tokens, and what each token reads."""
    states, one = StateCache([SHAPE], 2, torch.float32), torch.tensor([1])
    windows, matrices, read = [states.windows[0, 1].clone()], [states.matrices[0, 1].clone()], []
    for t in range(length):
        step = StatePass(states, one, one)
        read.append(step.recur(0, cut([inputs], [t], 1)))
        step.commit()
        windows.append(states.windows[0, 1].clone())
        matrices.append(states.matrices[0, 1].clone())
    return windows, matrices, torch.cat(read, dim=1)


LENGTH, ROUNDS = 60, 5000


def test_thousands_of_commits_equal_decoding_bit_for_bit() -> None:
    """Rows of any number in one pass against each row alone; what was not accepted leaves no trace."""
    songs, generator = [song(LENGTH + 8, seed) for seed in range(5)], torch.Generator().manual_seed(9)
    plain = [decode(inputs, LENGTH + 8) for inputs in songs]
    states, at, rounds = StateCache([SHAPE], 8, torch.float32), [0] * 5, 0
    while rounds < ROUNDS:
        rows = torch.randperm(5, generator=generator)[: int(torch.randint(1, 6, (), generator=generator))].tolist()
        width = int(torch.randint(1, 9, (), generator=generator))
        accepted = torch.randint(0, width + 1, (len(rows),), generator=generator)
        inputs = cut([songs[row] for row in rows], [at[row] for row in rows], width)
        wrong = torch.arange(width) >= accepted[:, None]
        inputs.mixed[wrong] += 1
        inputs.beta[wrong] *= 0.5
        step = StatePass(states, torch.tensor(rows) + 1)
        read = step.recur(0, inputs)
        step.commit(accepted)
        for i, row in enumerate(rows):
            before, at[row] = at[row], at[row] + int(accepted[i])
            windows, matrices, expected = plain[row]
            assert torch.equal(states.windows[0, row + 1], windows[at[row]]), (rounds, row)
            assert torch.equal(states.matrices[0, row + 1], matrices[at[row]]), (rounds, row)
            assert torch.equal(read[i, : accepted[i]], expected[0, before : at[row]]), (rounds, row)
            if at[row] >= LENGTH:
                states.clear(torch.tensor([row + 1]))
                at[row] = 0
        rounds += len(rows)


def test_known_counts_end_where_a_replay_ends() -> None:
    """A prompt in ragged chunks, padded with what must not count, and a padded row."""
    songs, lengths = [song(20, seed) for seed in range(3)], [20, 7, 0]
    ends, replays = (StateCache([SHAPE], 4, torch.float32) for _ in range(2))
    slots, at = torch.tensor([3, 1, 0]), [0, 0, 0]
    for width in (6, 1, 13):
        counts = torch.tensor([min(max(n - a, 0), width) for n, a in zip(lengths, at, strict=True)])
        inputs = cut(songs, [min(a, 20 - width) for a in at], width)
        inputs.mixed[2] = float("nan")
        known, later = StatePass(ends, slots, counts), StatePass(replays, slots)
        assert torch.equal(known.recur(0, inputs)[:2], later.recur(0, inputs)[:2])
        known.commit()
        later.commit(counts)
        at = [a + int(n) for a, n in zip(at, counts, strict=True)]
    assert torch.equal(ends.matrices, replays.matrices) and torch.equal(ends.windows, replays.windows)
    for row, slot in ((0, 3), (1, 1)):
        windows, matrices, _ = decode(songs[row], lengths[row])
        assert torch.equal(ends.matrices[0, slot], matrices[-1]) and torch.equal(ends.windows[0, slot], windows[-1])
    assert not ends.matrices[0, [0, 2]].any() and not ends.windows[0, [0, 2]].any()


def test_slots_are_cleared_and_copied() -> None:
    states = StateCache([SHAPE], 5, torch.float32)
    states.matrices.copy_(torch.arange(5.0)[:, None, None, None].expand_as(states.matrices))
    states.windows.copy_(torch.arange(5.0)[:, None, None].expand_as(states.windows))
    states.copy(torch.tensor([1, 2]), torch.tensor([2, 3]))
    states.clear(torch.tensor([4]))
    assert states.matrices[0, :, 0, 0, 0].tolist() == states.windows[0, :, 0, 0].tolist() == [0, 1, 1, 2, 0]


def test_what_a_recording_must_hold_on_to() -> None:
    """Everything that a commit reads besides storage, and nothing once it is done."""
    states, slots = StateCache([SHAPE], 3, torch.float32), torch.tensor([1, 2])
    step = StatePass(states, slots)
    step.recur(0, cut([song(9, 0), song(9, 1)], [0, 3], 4))
    kept = step.kept
    assert kept is not None and [part.shape[:2] for part in kept] == [(1, 2)] * 5
    again = StatePass(states, slots)
    again.adopt(DeltaRows(*(part.clone() for part in kept)))
    again.commit(torch.tensor([2, 0]))
    found = [store.clone() for store in (states.windows, states.matrices)]
    states.clear(slots)
    step.commit(torch.tensor([2, 0]))
    assert step.kept is None
    assert all(map(torch.equal, found, (states.windows, states.matrices))) and states.matrices[:, 1].any()


def test_layers_move_on_together() -> None:
    """Two layers in one commit are the two alone, and slots that no row has stay as they are."""
    generator, slots, counts = torch.Generator().manual_seed(2), torch.tensor([3, 1]), torch.tensor([2, 4])
    songs = [[song(9, 2 * layer), song(9, 2 * layer + 1)] for layer in (0, 1)]
    filled = [torch.randn(2, 5, *sizes, generator=generator) for sizes in ((3, SIZES.channels), (6, 8, 16))]
    stores = []
    for layers in ([0, 1], [0], [1]):
        states = StateCache([SHAPE] * len(layers), 5, torch.float32)
        states.windows.copy_(filled[0][layers]), states.matrices.copy_(filled[1][layers])
        run = StatePass(states, slots)
        for place, layer in enumerate(layers):
            run.recur(place, cut(songs[layer], [0, 3], 4))
        run.commit(counts)
        stores.append((states.windows, states.matrices))
    for both, first, second, before in zip(*stores, filled, strict=True):
        assert torch.equal(both, torch.cat((first, second)))
        assert torch.equal(both[:, [0, 2, 4]], before[:, [0, 2, 4]]) and not torch.equal(both[:, 3], before[:, 3])


# chunks


@pytest.mark.parametrize("length", [1, 31, 32, 33, 150])
def test_chunks_are_the_recurrence(length: int) -> None:
    """In values and in gradients, also where a token forgets all."""
    inputs = song(length, 4)
    inputs.decay[:, length // 2, :3] = 0
    inputs.mixed.requires_grad_()
    weights = torch.randn(1, length, 6, 16, generator=torch.Generator().manual_seed(8))
    outs, grads = [], []
    for rule in (chunked_delta_rule, by_token):
        q, rows = delta_rows(inputs, torch.zeros(1, 3, SIZES.channels))
        outs.append(rule(q, rows))
        grads.append(torch.autograd.grad((outs[-1] * weights).sum(), inputs.mixed)[0])
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def by_token(q: Tensor, rows: DeltaRows) -> Tensor:
    return delta_rule(torch.zeros(1, 6, 8, 16), q, rows)[0]


def test_gradients_are_finite_where_nothing_is_kept() -> None:
    """A decay that underflows, as large activations make it."""
    made, x = layer().requires_grad_(True), torch.randn(1, 70, SIZE)
    made.dt_bias.data.fill_(80.0)
    made.a_log.data.fill_(3.0)
    run(made, x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.parameters())
