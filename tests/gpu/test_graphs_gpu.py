"""The rules of recorded passes and the segments of a prompt with CUDA graphs, and what only a device can show."""

from __future__ import annotations

import pytest
import torch
from graph_toys import Toy, some_rows
from test_graph_piecewise import *  # noqa: F403
from test_graph_rules import *  # noqa: F403
from test_graph_rules import SHAPE, picked, verify_manager

from graphs.errors import CaptureError, SideEffectError
from graphs.recorder import CudaRecorder
from tests.gpu.sync import no_waiting

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def device():
    return "cuda"


@pytest.fixture
def cuda_recorder():
    recorder = CudaRecorder()
    yield recorder
    recorder.close()


def test_a_recording_runs_nothing(cuda_recorder):
    store = torch.zeros(4, device="cuda")
    _, recording = cuda_recorder.record(lambda: store.add_(1))
    assert store.sum() == 0
    recording.replay()
    assert store.sum() == 4


READS = {
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "fresh host data": lambda x: torch.tensor([1.0, 2.0]).to(x.device),
    "cpu": lambda x: x.cpu(),
}


@pytest.mark.parametrize("name", READS)
def test_what_the_tape_refuses_cuda_refuses_too_and_the_next_recording_is_sound(cuda_recorder, name):
    x = torch.ones(4, device="cuda")
    with pytest.raises(CaptureError):
        cuda_recorder.record(lambda: READS[name](x))
    assert not cuda_recorder.recording
    torch.cuda.synchronize()
    assert torch.rand(2, device="cuda").shape == (2,), "the random generator does not wait for the broken capture"
    out, recording = cuda_recorder.record(lambda: x * 3)
    recording.replay()
    assert out.tolist() == [3, 3, 3, 3]


def test_the_pool_is_shared_and_given_back(cuda_recorder):
    x = torch.ones(1 << 24, device="cuda")  # far above the allocator's own granularity
    for _ in range(4):
        cuda_recorder.record(lambda: (x + 1).sum())
    held = cuda_recorder.pool_bytes
    assert 0 < held < 4 * x.nbytes, "what one recording left free, the next one takes"
    cuda_recorder.close()
    assert cuda_recorder.pool_bytes == 0


def test_poison_reaches_free_memory_of_the_pool_and_spares_outputs(cuda_recorder):
    x = torch.ones(1 << 18, device="cuda")
    peek = []

    def body():
        held = x + 1
        peek.append((held.data_ptr(), held.numel()))
        return held.sum()

    total, recording = cuda_recorder.record(body)
    poison = cuda_recorder.poison()
    for _ in range(2):
        recording.replay()
        poison.replay()
        assert total.item() == 2 * x.numel()
    reader, second = cuda_recorder.record(lambda: torch.empty_like(x) * 1)  # its first block is a free one
    second.replay()
    assert reader.isnan().any()


def test_a_broken_capture_leaves_no_memory_behind(cuda_recorder):
    x = torch.ones(1 << 20, device="cuda")
    cuda_recorder.record(lambda: x + 1)
    with pytest.raises(CaptureError):
        cuda_recorder.record(lambda: (x + 1).sum().item())
    pool = cuda_recorder._pool
    cuda_recorder.close()
    held = [s for s in torch.cuda.memory_snapshot() if tuple(s["segment_pool_id"]) == tuple(pool)]
    assert not held


def test_begin_and_end_leave_the_stream_as_it_was(cuda_recorder):
    before = torch.cuda.current_stream()
    cuda_recorder.begin()
    assert torch.cuda.current_stream() != before
    torch.ones(2, device="cuda").add(1)
    cuda_recorder.end()
    assert torch.cuda.current_stream() == before
    with pytest.raises(CaptureError):
        cuda_recorder.end()


def test_a_python_error_inside_leaves_the_recorder_usable(cuda_recorder):
    def body():
        raise SideEffectError("no")

    with pytest.raises(SideEffectError):
        cuda_recorder.record(body)
    x = torch.ones(2, device="cuda")
    for _ in range(2):  # the second one after the pool has emptied
        out, recording = cuda_recorder.record(lambda: x + 1)
        recording.replay()
        assert out.tolist() == [2, 2]
        recording.release()


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature:UserWarning")
def test_a_round_of_replays_waits_for_nothing(cuda_recorder):
    toy = Toy("cuda")
    with torch.inference_mode():
        manager = verify_manager(toy, cuda_recorder, SHAPE)
        manager.capture()
        graph, rows = picked(manager), some_rows([30, 41], 3)
        values, inputs = toy.values(rows), toy.load(rows)
        with no_waiting():
            for _ in range(3):
                graph.state.refresh(values)
                graph.load(inputs)
                graph.replay()
