"""Writes continuations of many prompts at once, with a dense cache, for training and measuring.

Owns: batched plain decoding. Must never know drafting; serving has its own engine.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from speculator.train.attention import attend_with
from speculator.train.tokenizer import END, PAD
from target.decoder import Decoder
from target.deltanet import DeltaInputs, HybridAttend, delta_rows, delta_rule
from target.states import StateShape

CHECK_EVERY = 16  # steps between looks at whether all rows have ended


class DenseCache:
    """What each layer stores, [layers, parts, rows, kv_heads, length, dim], of rows that stand at the same position.

    Recurrent layers keep windows and matrices in its place, as `target.states` has them, moved on by every pass.
    """

    def __init__(self, model: Decoder, rows: int, length: int) -> None:
        layers, weight = model.cache_layers, model.embed.weight
        kv_heads, dim, parts = layers[0]
        self.store = torch.zeros(
            len(layers), parts, rows, kv_heads, length, dim, dtype=weight.dtype, device=weight.device
        )
        self.at = 0  # tokens stored before the running pass
        attend = attend_with(self.run, model.config.mla)
        self.attend = attend if model.config.delta is None else HybridAttend(attend, self.recur)
        self._states = [_no_past(shape, rows, weight) for shape in model.state_layers]

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """A first pass of any length, then passes of one token; of latents there is one part, keys and values both."""
        rows, length, heads, dim = q.shape
        store, end = self.store[layer], self.at + length
        for part, new in zip(store, (k, v), strict=False):
            part[:, :, self.at : end] = new.transpose(1, 2)
        keys, values = store[0, :, :, :end], store[-1, :, :, :end]
        if length > 1:
            out = F.scaled_dot_product_attention(
                q.transpose(1, 2), keys, values, is_causal=True, scale=scale, enable_gqa=True
            )
            return out.transpose(1, 2)
        grouped = q.view(rows, k.shape[2], heads // k.shape[2], dim)
        return F.scaled_dot_product_attention(grouped, keys, values, scale=scale).reshape(rows, 1, heads, dim)

    def recur(self, layer: int, inputs: DeltaInputs) -> Tensor:
        window, matrices = self._states[layer]
        q, rows = delta_rows(inputs, window)
        out, end = delta_rule(matrices, q, rows)
        self._states[layer] = (rows.window[:, inputs.mixed.shape[1] :], end)
        return out


def _no_past(shape: StateShape, rows: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """The window and the matrices of sequences that have not begun."""
    matrices = like.new_zeros(rows, shape.heads, shape.key_dim, shape.value_dim, dtype=torch.float32)
    return like.new_zeros(rows, shape.kernel - 1, shape.channels), matrices


def choose(logits: Tensor, temperature: Tensor, generator: torch.Generator) -> Tensor:
    """logits [R, V], temperature [R] (0 is greedy) -> tokens [R]."""
    noise = -torch.empty_like(logits).exponential_(generator=generator).clamp_min(1e-20).log()
    return (logits + noise * temperature[:, None]).argmax(-1)


@torch.no_grad()
def decode(
    model: Decoder, prompts: Sequence[Sequence[int]], new_tokens: int, temperature: Tensor, generator: torch.Generator
) -> list[list[int]]:
    """Continuations of at most `new_tokens`, each ending with <|end|> when the model said so.

    `temperature` [rows] and `generator` live on the model's device. Prompts of about one length waste least.
    """
    device = model.embed.weight.device
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    longest, first = max(map(len, prompts)), min(map(len, prompts))
    tokens = torch.full((len(prompts), longest + new_tokens), PAD, device=device)
    tokens[:, :longest] = torch.tensor([[*p, *[PAD] * (longest - len(p))] for p in prompts], device=device)
    cache = DenseCache(model, len(prompts), longest + new_tokens)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    passed = tokens[:, :first]
    for at in range(first, longest + new_tokens):
        final = model(passed, torch.arange(cache.at, at, device=device).expand_as(passed), cache.attend).final
        cache.at = at
        chosen = choose(model.logits(final[:, -1]).float(), temperature, generator)
        own = lengths <= at
        tokens[:, at] = torch.where(own, chosen, tokens[:, at])
        ended |= own & ((chosen == END) | (at + 1 >= lengths + new_tokens))
        if at % CHECK_EVERY == 0 and bool(ended.all()):
            break
        passed = tokens[:, at : at + 1]
    return [_cut(row[len(p) : len(p) + new_tokens]) for row, p in zip(tokens.tolist(), prompts, strict=True)]


def _cut(tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(END) + 1] if END in tokens else tokens


def decode_sorted(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    temperatures: Sequence[float],
    rows: int,
    seed: int,
) -> list[list[int]]:
    """`decode` in batches of prompts of similar length; answers in the order of the prompts."""
    device = model.embed.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), rows):
        some = order[start : start + rows]
        heat = torch.tensor([temperatures[i] for i in some], device=device)
        for i, answer in zip(some, decode(model, [prompts[i] for i in some], new_tokens, heat, generator), strict=True):
            answers[i] = answer
    return answers
