"""MiMo's MTP modules compute what is published, put together from transformers' own Qwen2 layer, norms and rotation.

Their names, the order of the two halves of `input_proj` and the norms come from the files; nothing here is ours but the
files and the head under test.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from engines import Driver
from mtp_models import family_target, mtp_engine, mtp_head, save_pair
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RMSNorm

from speculator.heads.load import load_head
from speculator.heads.mtp import MtpHead
from speculator.types import DraftShape, SamplingParams
from target.attention.dense import dense_attend
from target.decoder import Decoder
from target.load import load_target


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Reference:
    """Greedy drafts of a folder's modules, whole passes every time."""

    def __init__(self, folder: Path) -> None:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        assert raw.pop("architectures") == ["MiMoForCausalLM"]
        config = Qwen2Config(**{k: v for k, v in raw.items() if k != "model_type"}, attn_implementation="eager")
        tensors = load_file(folder / "model.safetensors")
        own = {name: tensors.pop(name) for name in sorted(tensors) if name.startswith("model.mtp_layers.")}
        self.model = Qwen2ForCausalLM(config).eval()
        self.model.load_state_dict(tensors)
        self.modules = raw["num_nextn_predict_layers"]
        stored = [_below(own, f"model.mtp_layers.{k}.") for k in range(self.modules)]
        self.layers = [_module(Qwen2DecoderLayer(config, 0), part) for part in stored]
        self.embedding_norms, self.hidden_norms, self.norms = (
            [
                _module(Qwen2RMSNorm(config.hidden_size, config.rms_norm_eps), _below(part, f"{name}."))
                for part in stored
            ]
            for name in ("token_layernorm", "hidden_layernorm", "final_layernorm")
        )
        self.projections = [part["input_proj.weight"] for part in stored]

    @torch.no_grad()
    def drafts(self, tokens: list[int]) -> tuple[list[int], Tensor]:
        """One draft of each module after `tokens`, and the logits [modules, V] they were taken from."""
        drafts: list[int] = []
        logits: list[Tensor] = []
        rows = len(tokens) - 1
        state = self.model.model(torch.tensor([tokens[:-1]])).last_hidden_state
        for k in range(self.modules):
            embedded = self.model.model.embed_tokens(torch.tensor([[*tokens, *drafts][1 + k : 1 + k + rows]]))
            pair = torch.cat((self.hidden_norms[k](state), self.embedding_norms[k](embedded)), -1)
            state = self.norms[k](self._layer(k, pair @ self.projections[k].T))
            logits.append(self.model.lm_head(state[0, -1]))
            drafts.append(int(logits[-1].argmax()))
        return drafts, torch.stack(logits)

    def _layer(self, k: int, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1])[None]
        rotation = self.model.model.rotary_emb(x, positions)
        mask = torch.full((x.shape[1],) * 2, float("-inf")).triu(1)[None, None]
        out = self.layers[k](x, position_embeddings=rotation, attention_mask=mask, position_ids=positions)
        return out[0] if isinstance(out, tuple) else out


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _module(module: torch.nn.Module, stored: dict[str, Tensor]) -> torch.nn.Module:
    """The module with the tensors that are its own."""
    wanted = module.state_dict().keys()
    module.load_state_dict({name: tensor for name, tensor in stored.items() if name in wanted})
    return module.eval()


@pytest.fixture(scope="module", params=[1, 2])
def twins(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Decoder, MtpHead, Reference]:
    made = family_target("mimo")
    folder = save_pair(made, mtp_head(made, modules=request.param), tmp_path_factory.mktemp("mimo"))
    target = load_target(folder, torch.float32)
    head = load_head(folder, target, torch.float32)
    assert isinstance(head, MtpHead)
    return target, head, Reference(folder)


def song(length: int, seed: int = 3) -> list[int]:
    return torch.randint(0, 60, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def our_logits(target: Decoder, head: MtpHead, tokens: list[int], drafts: list[int]) -> Tensor:
    """Logits [modules, V] after `tokens`, module k given the first k of `drafts`."""
    attend, rows = dense_attend(target.config), len(tokens) - 1
    positions, logits = torch.arange(rows)[None], list[Tensor]()
    state = target(torch.tensor([tokens[:-1]]), positions, attend).final
    for k in range(head.record.modules):
        stage = head.stage(k)
        output = stage(state, torch.tensor([[*tokens, *drafts][1 + k : 1 + k + rows]]), positions, attend)
        logits.append(stage.logits(output[0, -1]))
        state = stage.recycle(output)
    return torch.stack(logits)


@pytest.mark.parametrize("length", [2, 7, 40])
def test_the_forward_is_the_published_one(twins: tuple[Decoder, MtpHead, Reference], length: int) -> None:
    target, head, reference = twins
    drafts, expected = reference.drafts(song(length))
    assert len(drafts) == head.record.modules
    torch.testing.assert_close(our_logits(target, head, song(length), drafts), expected, rtol=1e-4, atol=1e-4)


def test_drafts_of_the_engine_round_by_round(twins: tuple[Decoder, MtpHead, Reference]) -> None:
    """Chunked prompts, caches that went through rejected drafts: still the chain of a fresh reference."""
    target, head, reference = twins
    shape, driver = DraftShape(head.record.modules), Driver(mtp_engine(target, head), scatter=1)
    sessions = driver.start([song(23), song(5, 4), song(2, 5)], [SamplingParams()] * 3, shape)
    for _ in range(4):
        for s in sessions:
            assert s.draft is not None
            assert list(s.draft.tokens) == reference.drafts(s.tokens)[0]
        driver.rounds(sessions, min(len(s.produced) for s in sessions) + 1, [shape] * 3)
