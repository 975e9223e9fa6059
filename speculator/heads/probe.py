"""Measures how often a head's greedy chain agrees with the target, on whole sequences and without a cache.

Owns: greedy text by the target, drafting from every position at once, acceptance by position. It is an oracle that
shares no code with the engine. Must never know formats or folders.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from speculator.errors import ConfigError
from speculator.heads.base import DraftHead
from target.attention.base import Attend
from target.config import ModelConfig
from target.decoder import Decoder


class Acceptance(NamedTuple):
    """Accepted drafts of each round, all of `depth` drafts."""

    lengths: tuple[int, ...]
    depth: int

    @property
    def mean(self) -> float:
        """Drafts accepted per round; one more is the accept length tau."""
        return sum(self.lengths) / max(1, len(self.lengths))

    @property
    def error(self) -> float:
        """Standard error of `mean`, were the rounds independent."""
        rounds = max(2, len(self.lengths))
        return math.sqrt(sum((n - self.mean) ** 2 for n in self.lengths) / (rounds - 1) / rounds)

    @property
    def rates(self) -> tuple[float, ...]:
        """Drafts accepted at each position / rounds."""
        rounds = max(1, len(self.lengths))
        return tuple(sum(n > i for n in self.lengths) / rounds for i in range(self.depth))


class AcceptanceProbe(Protocol):
    """Runs a head against the target it was loaded for."""

    def __call__(self, head: DraftHead) -> Acceptance: ...


class GrowingAttention:
    """Causal attention over everything seen so far, keys and values in plain lists; an `Attend`."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        if layer in self._seen:
            k, v = (torch.cat(pair, dim=1) for pair in zip(self._seen[layer], (k, v), strict=True))
        self._seen[layer] = (k, v)
        scores = _scores(q, k)  # [R, heads, T, L]
        last = torch.arange(k.shape[1] - q.shape[1], k.shape[1], device=q.device)[:, None]
        index = torch.arange(k.shape[1], device=q.device)
        hidden = index > last
        if window is not None:
            hidden |= index <= last - window
        return _mix(scores.masked_fill(hidden, -torch.inf).softmax(dim=-1), v)


class UnrolledAttention:
    """Attention of the steps of drafting, started from every row at once; an `Attend`.

    Step 0 is causal over true-feature rows. In step j, row t stands for the j-th drafted row after true row t: it sees
    the true rows up to t, and of each earlier drafted step and its own only the row at its own index. A layer that runs
    for the first time in a later step (that of a further module) is causal there.
    """

    def __init__(self) -> None:
        self._steps: list[dict[int, tuple[Tensor, Tensor]]] = []

    def next_step(self) -> None:
        self._steps.append({})

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        self._steps[-1][layer] = (k, v)
        (true_keys, true_values), *drafted = (step[layer] for step in self._steps if layer in step)
        scores = _scores(q, true_keys)
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        parts = [scores.masked_fill(future, -torch.inf)]
        parts += [_own_scores(q, keys) for keys, _ in drafted]
        weights = torch.cat(parts, dim=-1).softmax(dim=-1)
        out = _mix(weights[..., : true_keys.shape[1]], true_values)
        for i, (_, values) in enumerate(drafted, true_keys.shape[1]):
            out = out + weights[..., i].transpose(1, 2)[..., None].to(out.dtype) * _repeated(values, q)
        return out


def fitting(attend: Attend, config: ModelConfig) -> Any:
    """`attend` as the layers of this config call it: in those of MLA one latent per token is key and value."""
    if config.mla is None:
        return attend
    rank = config.mla.rank

    def over_latents(layer: int, q: Tensor, latent: Tensor, scale: float) -> Tensor:
        shared = latent[:, :, None]
        return attend(layer, q * (scale * math.sqrt(q.shape[-1])), shared, shared[..., :rank], None)

    return over_latents


def _repeated(x: Tensor, q: Tensor) -> Tensor:
    """One kv head per query head."""
    return x.repeat_interleave(q.shape[2] // x.shape[2], dim=2)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """q [R, T, heads, dim], k [R, L, kv_heads, dim] -> [R, heads, T, L] float32."""
    return torch.einsum("rthd,rlhd->rhtl", q.float(), _repeated(k, q).float()) / math.sqrt(q.shape[-1])


def _own_scores(q: Tensor, k: Tensor) -> Tensor:
    """The score of each query with the key at its own index: [R, heads, T, 1]."""
    products = (q.float() * _repeated(k, q).float()).sum(dim=-1) / math.sqrt(q.shape[-1])
    return products.transpose(1, 2)[..., None]


def _mix(weights: Tensor, v: Tensor) -> Tensor:
    """weights [R, heads, T, L], v [R, L, kv_heads, dim] -> [R, T, heads, dim] in v's dtype."""
    values = v.repeat_interleave(weights.shape[1] // v.shape[2], dim=2)
    return torch.einsum("rhtl,rlhd->rthd", weights.to(v.dtype), values)


class Text(NamedTuple):
    """A prompt and the target's greedy continuation."""

    tokens: Tensor  # [1, N] int64
    prompt: int  # tokens of the prompt


@torch.inference_mode()
def greedy_text(target: Decoder, prompt: Sequence[int], new_tokens: int) -> Text:
    """Continue a prompt by the target alone, until an end token."""
    device = target.embed.weight.device
    attend = fitting(GrowingAttention(), target.config)
    tokens = torch.tensor([list(prompt)], device=device)
    step = tokens
    for _ in range(new_tokens):
        positions = torch.arange(tokens.shape[1] - step.shape[1], tokens.shape[1], device=device)[None]
        final = target(step, positions, attend).final[:, -1:]
        step = target.logits(final).argmax(dim=-1)
        tokens = torch.cat((tokens, step), dim=1)
        if int(step) in target.config.eos_token_ids:
            break
    return Text(tokens, len(prompt))


@torch.inference_mode()
def accepted_lengths(target: Decoder, head: DraftHead, text: Text, depth: int) -> list[int]:
    """Drafts accepted out of `depth` in rounds that start at every generated token with `depth` tokens after it."""
    tokens = text.tokens
    rows = tokens.shape[1] - 1 - depth  # row t pairs feature t with token t + 1 and drafts tokens t + 2 ..
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    unrolled = UnrolledAttention()
    whole, attend = fitting(GrowingAttention(), target.config), fitting(unrolled, target.config)
    state = head.fuse(head.features(target(tokens[:, :rows], positions[:, :rows], whole, head.taps)))
    alive = torch.ones(rows, dtype=torch.bool, device=tokens.device)
    lengths = torch.zeros(rows, dtype=torch.long, device=tokens.device)
    for step in range(depth):
        unrolled.next_step()
        module = head.stage(step)
        fed, truth = tokens[:, step + 1 : step + 1 + rows], tokens[0, step + 2 : step + 2 + rows]
        output = module(state, fed, positions[:, step : step + rows], attend)
        alive &= drafted_tokens(module, output)[0] == truth
        lengths += alive
        state = module.recycle(output)
    return lengths[text.prompt - 1 :].tolist()


def drafted_tokens(head: DraftHead, output: Tensor) -> Tensor:
    """Output g [..., H] -> the greedy draft as target ids [...]."""
    drafts = head.logits(output).argmax(dim=-1)
    return drafts if head.target_ids is None else head.target_ids[drafts]


class DenseProbe:
    """An AcceptanceProbe that needs no engine: chains of `depth` drafts over the target's greedy text.

    ConfigError when no prompt leads to more than `depth` new tokens.
    """

    def __init__(self, target: Decoder, prompts: Sequence[Sequence[int]], new_tokens: int = 64, depth: int = 5) -> None:
        self.target, self.depth = target, depth
        texts = [greedy_text(target, prompt, new_tokens) for prompt in prompts]
        self.texts = [text for text in texts if text.tokens.shape[1] > text.prompt + depth]
        if not self.texts:
            raise ConfigError(f"no prompt leads to more than {depth} new tokens; give more prompts or a lower depth")

    def __call__(self, head: DraftHead) -> Acceptance:
        lengths = [n for text in self.texts for n in accepted_lengths(self.target, head, text, self.depth)]
        return Acceptance(tuple(lengths), self.depth)
