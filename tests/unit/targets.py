"""Tiny random targets beside their transformers twins, and a driver that runs passes over a paged cache.

Shared by the tests of the target package, on CPU and GPU. Must never know drafting.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    Glm4MoeConfig,
    Glm4MoeLiteConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from target.attention.base import bind
from target.attention.mla import MlaAttention
from target.attention.sdpa import SdpaAttention
from target.batch import Batch, causal_positions
from target.cache import PagedCache
from target.decoder import Decoder
from target.load import load_target
from target.model import Hidden

transformers.utils.logging.disable_progress_bar()

VOCAB, LAYERS = 53, 4
SIZES = dict(
    vocab_size=VOCAB, hidden_size=48, intermediate_size=56, num_hidden_layers=LAYERS, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def rope(kind: str, **keys: object) -> dict[str, object]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1000.0, **keys}}


YARN = dict(rope_type="yarn", rope_theta=100.0, factor=4.0, original_max_position_embeddings=32, beta_fast=4.0)
MSCALE = {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7}
MOE = dict(num_experts_per_tok=3, moe_intermediate_size=24)  # rows of whole 16 bytes, also in bfloat16
QWEN3_MOE = dict(**MOE, head_dim=16, num_experts=8)
ROUTED = dict(
    **MOE, n_routed_experts=8, n_shared_experts=2, n_group=4, topk_group=2, routed_scaling_factor=1.7,
    first_k_dense_replace=1,
)  # fmt: skip
GLM4_MOE = dict(**ROUTED, head_dim=16)
MLA = dict(
    num_key_value_heads=4, kv_lora_rank=16, q_lora_rank=24, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=10
)
DEEPSEEK = dict(**MLA, **ROUTED)
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "llama-tied": (LlamaConfig, {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama-biases": (LlamaConfig, {"attention_bias": True, "mlp_bias": True, "head_dim": 8}),
    "llama-linear": (LlamaConfig, rope("linear", factor=3.0)),
    "llama-dynamic": (LlamaConfig, rope("dynamic", factor=2.0)),
    "llama-llama3": (
        LlamaConfig,
        rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16),
    ),
    "llama-yarn": (LlamaConfig, {"rope_parameters": YARN}),
    "llama-yarn-exact": (LlamaConfig, {"rope_parameters": {**YARN, "truncate": False}}),
    "llama-yarn-mscale": (LlamaConfig, {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.4}}),
    "llama-yarn-given": (LlamaConfig, {"rope_parameters": {**YARN, "attention_factor": 1.3}}),
    "mistral": (MistralConfig, {"sliding_window": None, "head_dim": 16}),
    "mistral-window": (MistralConfig, {"sliding_window": 6, "head_dim": 16}),
    "qwen2": (Qwen2Config, {}),
    "qwen2-tied": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2-window": (Qwen2Config, {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2}),
    "qwen3": (Qwen3Config, {"head_dim": 16}),
    "qwen3-biases": (Qwen3Config, {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True}),
    "qwen3_moe": (Qwen3MoeConfig, {**QWEN3_MOE, "norm_topk_prob": True}),
    "qwen3_moe-sparse": (Qwen3MoeConfig, {**QWEN3_MOE, "decoder_sparse_step": 2, "mlp_only_layers": [3]}),
    "qwen3_moe-window": (Qwen3MoeConfig, {**QWEN3_MOE, "use_sliding_window": True, "sliding_window": 7}),
    "glm4_moe": (Glm4MoeConfig, {**GLM4_MOE, "attention_bias": True, "use_qk_norm": True}),
    "glm4_moe-plain": (Glm4MoeConfig, {**GLM4_MOE, "n_group": 1, "topk_group": 1, "norm_topk_prob": False}),
    "glm4_moe-rotary": (Glm4MoeConfig, {**GLM4_MOE, "partial_rotary_factor": 0.25, "head_dim": 32}),
    "glm4_moe_lite": (
        Glm4MoeLiteConfig,
        {**MLA, **MOE, "n_routed_experts": 8, "mlp_layer_types": ["sparse", "dense", "sparse", "dense"]},
    ),
    "deepseek_v2": (DeepseekV2Config, {**DEEPSEEK, "topk_method": "group_limited_greedy"}),
    "deepseek_v2-greedy": (DeepseekV2Config, {**DEEPSEEK, "topk_method": "greedy", "q_lora_rank": None}),
    "deepseek_v2-yarn": (DeepseekV2Config, {**DEEPSEEK, "rope_parameters": {**MSCALE, "mscale": 0.7}}),
    "deepseek_v3": (DeepseekV3Config, DEEPSEEK),
    "deepseek_v3-yarn": (DeepseekV3Config, {**DEEPSEEK, "rope_parameters": MSCALE, "q_lora_rank": None}),
    "deepseek_v3-halves": (DeepseekV3Config, {**DEEPSEEK, "rope_interleave": False, "norm_topk_prob": False}),
}


class Twins(NamedTuple):
    """One set of weights in transformers and here."""

    theirs: PreTrainedModel
    ours: Decoder
    folder: Path


def save_reference(folder: Path, family: str, **changes: object) -> PreTrainedModel:
    """A random transformers model of a family whose every weight matters, saved to `folder`."""
    kind, given = FAMILIES[family]
    config = kind(**{**SIZES, **given, **changes})
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(3)
    corrections = [(n, b) for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")]
    for name, parameter in (*model.named_parameters(), *corrections):
        noise = 0.2 * torch.randn(parameter.shape, generator=generator)
        # corrections above zero: older transformers mask dropped groups with zeros, which must not win
        parameter.data = noise.abs() if "correction" in name else noise + float("norm" in name)
    model.save_pretrained(folder)
    return model.requires_grad_(False)


def twins(
    folder: Path, family: str, dtype: torch.dtype = torch.float32, device: str = "cpu", **changes: object
) -> Twins:
    theirs = save_reference(folder, family, **changes)
    return Twins(theirs, load_target(folder, dtype, device), folder)


def reference_hidden(model: PreTrainedModel, tokens: Tensor, **options: Any) -> Hidden:
    """F and B(0..n) of transformers for tokens [R, T]; B(n) is what its final norm reads."""
    last: list[Tensor] = []
    hook = model.model.norm.register_forward_pre_hook(lambda _, inputs: last.append(inputs[0]))
    states = model(tokens, output_hidden_states=True, **options).hidden_states
    hook.remove()
    return Hidden(states[-1], (*states[:-1], last[0]))


class Rig:
    """A model over its own paged cache; rows take pages in scattered order, or side by side."""

    def __init__(self, model: Decoder, page_size: int = 4, pages: int = 120, scattered: bool = True) -> None:
        weight = model.embed.weight
        self.model, self.device = model, weight.device
        self.cache = PagedCache([model.cache_layers], pages, page_size, weight.dtype, weight.device)
        mla = model.config.mla
        self.attention: Any = SdpaAttention(self.cache) if mla is None else MlaAttention(self.cache, mla.rank)
        order = (
            torch.randperm(pages - 1, generator=torch.Generator().manual_seed(7))
            if scattered
            else torch.arange(pages - 1)
        )
        self._free = (order + 1).tolist()

    def table(self, tokens: int) -> list[int]:
        """Pages for a new row of `tokens` tokens."""
        count = -(-tokens // self.cache.page_size)
        taken, self._free = self._free[:count], self._free[count:]
        return taken

    def slots(self, table: Sequence[int], indices: Sequence[int]) -> list[int]:
        size = self.cache.page_size
        return [table[i // size] * size + i % size for i in indices]

    def batch(
        self,
        tokens: Sequence[Sequence[int]],
        contexts: Sequence[int],
        tables: Sequence[Sequence[int]],
        ancestors: Sequence[Sequence[int]] | None = None,
        depths: Sequence[Sequence[int]] | None = None,
        offset: int = 0,
    ) -> Batch:
        """Rows of different lengths, padded with token 0; `depths` are positions above the context."""
        context, counts = self._ints(contexts), self._ints([len(row) for row in tokens])
        width = int(counts.max())
        positions = causal_positions(context + offset, width)
        if depths is not None:
            positions = context[:, None] + self._ints(_padded(depths, width))
        return Batch(
            tokens=self._ints(_padded(tokens, width)),
            positions=positions,
            context=context,
            counts=counts,
            pages=self._ints(_padded(tables, max(map(len, tables)))),
            ancestors=None if ancestors is None else self._ints(_padded(ancestors, width)),
            offset=offset,
            longest=offset + int((context + counts).max()),
        )

    def _ints(self, values: Sequence[Any]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    @torch.inference_mode()
    def run(self, batch: Batch, taps: tuple[int, ...] = ()) -> Hidden:
        return self.model(batch.tokens, batch.positions, bind(self.attention, batch), taps)  # type: ignore[no-any-return]

    def feed(self, tokens: Sequence[int], table: Sequence[int], sizes: Sequence[int], taps: tuple[int, ...]) -> Hidden:
        """One row in chunks of `sizes` tokens; the pieces joined along T."""
        parts, at = [], 0
        for size in sizes:
            parts.append(self.run(self.batch([tokens[at : at + size]], [at], [table]), taps))
            at += size
        return Hidden(
            torch.cat([p.final for p in parts], 1),
            tuple(torch.cat(t, 1) for t in zip(*(p.taps for p in parts), strict=True)),
        )


def _padded(rows: Sequence[Sequence[int]], width: int) -> list[list[int]]:
    return [list(row) + [0] * (width - len(row)) for row in rows]


def some_tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
