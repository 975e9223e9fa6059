"""Tiny targets with heads that draft exactly what they will say.

Owns: weights set by hand, so that acceptance is 1 by construction and a wrong shift, tap, offset, norm or recycling
shows as acceptance below 1. For tests and self-checks. Must never know files or the engine.

The residual stream has four fields: `now` (one-hot of the token), `past` (one-hot of the token `lag` positions back),
`mark` (one-hot of the token, turned by one token per layer, which tells the taps apart) and a constant. Attention heads
look back by a fixed distance: queries and keys are constants whose rotary angles meet at that distance only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from speculator.heads.base import DraftHead
from speculator.heads.eagle import EagleHead
from speculator.heads.eagle3 import Eagle3Head, WideLayer
from speculator.heads.load import build_head
from speculator.heads.record import HeadRecord
from target.config import ModelConfig, RopeConfig
from target.decoder import Decoder, DecoderLayer
from target.layers import RMSNorm, SelfAttention

EPS = 1e-6
FINAL = 4.0  # F is this much longer than B(n), so that a head fed with the wrong one is wrong


class ExactPair(NamedTuple):
    target: Decoder
    head: DraftHead


@dataclass(frozen=True)
class ExactPlan:
    """What an exact pair shall depend on.

    `needs`: "token" (the next token follows from the last one), "feature" (from the one `lag` before it, which the head
    sees in its features only) or "both". Every third token is never said, so a draft vocabulary has offsets.
    """

    kind: str = "eagle3"
    needs: str = "both"
    vocab: int = 24
    layers: int = 6
    lag: int = 1  # EAGLE-1 knows 1 only; prompts should be longer than this
    boundaries: tuple[int, ...] = (1, 3, 4)
    draft_vocab: bool = True
    own_embed: bool = False
    norm_before_residual: bool = False
    norm_output: bool = False
    target_theta: float = 10000.0
    head_theta: float = 10000.0
    fields: _Fields = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.needs not in ("token", "feature", "both") or self.kind not in ("eagle", "eagle3"):
            raise ValueError(f"no exact pair of kind {self.kind} that needs {self.needs}")
        if self.vocab % 2 or self.kind == "eagle" and self.lag != 1:
            raise ValueError("the vocabulary must be even, and an exact EAGLE-1 head looks back by 1")
        object.__setattr__(self, "fields", _Fields(self.vocab))

    @property
    def said(self) -> Tensor:
        """Ids that the target says: two of three."""
        ids = torch.arange(self.vocab)
        return ids[ids % 3 != 1]


class _Fields:
    """Places in the residual stream."""

    def __init__(self, vocab: int) -> None:
        self.now, self.past = slice(0, vocab), slice(vocab, 2 * vocab)
        self.mark, self.constant = slice(2 * vocab, 3 * vocab), 3 * vocab
        self.size = 3 * vocab + 8


def exact_pair(plan: ExactPlan | None = None) -> ExactPair:
    """A float32 target on the CPU and the head that is exact for it."""
    plan = plan or ExactPlan()
    with torch.no_grad():
        target = exact_target(plan)
        head = _eagle(plan, target) if plan.kind == "eagle" else _eagle3(plan, target)
    return ExactPair(target.requires_grad_(False).eval(), head.requires_grad_(False).eval())


def _zeroed(module: torch.nn.Module) -> None:
    for parameter in module.parameters():
        parameter.zero_()


def keep_scale(norm: RMSNorm, ones: float, size: int, scale: float = 1.0) -> None:
    """Make a norm multiply by `scale` whatever stream has a squared length of `ones`."""
    norm.weight.fill_(scale * math.sqrt(ones / size + EPS))


def permutation(vocab: int, steps: int) -> Tensor:
    """Permutation matrix of token v -> v + steps."""
    return torch.eye(vocab).roll(steps, dims=0)


# the target


def exact_target(plan: ExactPlan, config: ModelConfig | None = None) -> Decoder:
    """The target of a plan, of `exact_config(plan)` or of another config with layers of the same sizes."""
    target = Decoder(config or exact_config(plan))
    _zeroed(target)
    f = plan.fields
    target.embed.weight[:, f.now] = torch.eye(plan.vocab)
    target.embed.weight[:, f.mark] = torch.eye(plan.vocab)
    target.embed.weight[:, f.constant] = 1.0
    for i, layer in enumerate(target.layers):
        assert isinstance(layer, DecoderLayer) and isinstance(layer.attention, SelfAttention)
        _target_layer(plan, layer.attention, first=i == 0)
        keep_scale(layer.input_norm, 3 if i == 0 else 4, f.size)
    keep_scale(target.norm, 4, f.size, FINAL)
    assert target.lm_head is not None
    target.lm_head.weight.copy_(target_readout(plan) / FINAL)
    return target


def exact_config(plan: ExactPlan) -> ModelConfig:
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=plan.vocab,
        hidden_size=plan.fields.size,
        intermediate_size=8,
        num_layers=plan.layers,
        num_heads=2,
        num_kv_heads=2,
        head_dim=plan.vocab,
        norm_eps=EPS,
        rope=RopeConfig(plan.target_theta),
        tied=False,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        windows=(None,) * plan.layers,
        max_position=2048,
        bos_token_id=None,
        eos_token_ids=(),
        dtype="float32",
    )


def _target_layer(plan: ExactPlan, attention: SelfAttention, first: bool) -> None:
    """Turn the mark by one token; the first layer also fetches the past."""
    f, heads = plan.fields, HandSetHeads(attention, plan.target_theta)
    turn = permutation(plan.vocab, 1) - torch.eye(plan.vocab)
    heads.look_back(0, plan.lag if first else 0, f.constant, 1.0)
    heads.look_back(1, 0, f.constant, 1.0)
    if first:
        heads.copy(0, f.now, f.past, torch.eye(plan.vocab))
    heads.copy(1, f.mark, f.mark, turn)


def target_readout(plan: ExactPlan) -> Tensor:
    """[V, H] lm_head: a successor of the last token, a successor of the past one, and a bar to what is never said."""
    f, said = plan.fields, plan.said
    weight = torch.zeros(plan.vocab, f.size)
    by_now, by_past = _successor(plan.vocab, said, 1), _successor(plan.vocab, said, 5)
    # with both, even tokens decide alone and odd ones leave it to the past
    strength = torch.where(torch.arange(plan.vocab) % 2 == 0, 3.0, 0.5) if plan.needs == "both" else torch.tensor(2.0)
    if plan.needs != "feature":
        weight[:, f.now] = by_now * strength
    if plan.needs != "token":
        weight[:, f.past] = by_past * 1.5
    weight[:, f.constant] = -8.0
    weight[said, f.constant] = 0.0
    return weight


def _successor(vocab: int, said: Tensor, step: int) -> Tensor:
    """[V, V] one-hot columns: the token that follows each token, a cycle through all that are said."""
    rank = torch.searchsorted(said, torch.arange(vocab)).remainder(said.numel())
    matrix = torch.zeros(vocab, vocab)
    matrix[said[(rank + step) % said.numel()], torch.arange(vocab)] = 1.0
    return matrix


class HandSetHeads:
    """Sets attention heads by hand; every head has its own keys and values."""

    def __init__(self, attention: SelfAttention, theta: float) -> None:
        assert attention.heads == attention.kv_heads
        self.o, self.dim, self.heads = attention.o.weight, attention.head_dim, attention.heads
        self.qkv = attention.qkv.weight.view(3, attention.heads, attention.head_dim, -1)
        self.frequencies = theta ** (-torch.arange(0, self.dim, 2) / self.dim)

    def look_back(self, head: int, distance: int, constant: int, value: float) -> None:
        """Attend to the position `distance` back; `constant` is an input that always holds `value`."""
        size = math.sqrt(240 * math.sqrt(self.dim)) / value
        angle = -distance * self.frequencies
        self.qkv[0, head, :, constant] = size * torch.cat((angle.cos(), angle.sin()))
        self.qkv[1, head, : self.dim // 2, constant] = size

    def copy(self, head: int, source: slice, place: slice, matrix: Tensor) -> None:
        """Add `matrix` times the input field `source` of the position looked at to the output field `place`."""
        self.qkv[2, head, :, source] = torch.eye(self.dim)
        self.o[place, self._columns(head)] = matrix

    def add(self, head: int, source: slice, matrix: Tensor) -> None:
        """Let the value of a head also read `source`, through `matrix`."""
        self.qkv[2, head, :, source] = matrix

    def scalar(self, head: int, source: int, place: int, factor: float) -> None:
        self.qkv[2, head, 0, source] = 1.0
        self.o[place, head * self.dim] = factor

    def _columns(self, head: int) -> slice:
        return slice(head * self.dim, (head + 1) * self.dim)


# the heads


def _record(plan: ExactPlan) -> HeadRecord:
    said = plan.said.numel() if plan.draft_vocab else plan.vocab
    eagle3 = plan.kind == "eagle3"
    return HeadRecord(
        kind=plan.kind,
        hidden_size=plan.fields.size,
        target_hidden_size=plan.fields.size,
        vocab_size=plan.vocab,
        draft_vocab_size=said if eagle3 else plan.vocab,
        intermediate_size=8,
        num_layers=1,
        num_heads=4,
        num_kv_heads=4,
        head_dim=plan.vocab,
        norm_eps=EPS,
        rope=RopeConfig(plan.head_theta),
        boundaries=plan.boundaries if eagle3 else (),
        norm_before_residual=plan.norm_before_residual and eagle3,
        norm_output=plan.norm_output and eagle3,
        own_embed=plan.own_embed,
        own_lm_head=eagle3,
        d2t=eagle3 and plan.draft_vocab,
    )


def _own_table(plan: ExactPlan, head: DraftHead) -> Tensor:
    """[V, V]: undoes the head's own embedding, which names token v + 7 where the target's names v."""
    if head.embed is None:
        return torch.eye(plan.vocab)
    f = plan.fields
    head.embed.weight[:, f.now] = permutation(plan.vocab, -7)
    head.embed.weight[:, f.mark] = torch.eye(plan.vocab)
    head.embed.weight[:, f.constant] = 1.0
    return permutation(plan.vocab, -7)


def _eagle(plan: ExactPlan, target: Decoder) -> DraftHead:
    """fc alone, in F's scale: the new token from the embedding, the past one from the feature's token."""
    head = build_head(_record(plan), target)
    assert isinstance(head, EagleHead)
    _zeroed(head)
    f, fc = plan.fields, head.fc.weight
    fc[f.now, f.now] = _own_table(plan, head) * FINAL
    fc[f.constant, f.constant] = FINAL
    feature = slice(f.size, f.size + plan.vocab)  # the `now` field of the feature
    fc[f.past, feature] = torch.eye(plan.vocab)
    return head


class _Scales(NamedTuple):
    """Factors that make a forgotten or misplaced norm visible: fields of h, of the normed h, and of the readout."""

    normed: float  # normed h = normed * h
    now: float
    past: float
    constant: float
    squares: float  # squared length of h


def _eagle3(plan: ExactPlan, target: Decoder) -> DraftHead:
    ids = plan.said if plan.draft_vocab else None
    head = build_head(_record(plan), target, ids)
    assert isinstance(head, Eagle3Head) and head.fc is not None
    _zeroed(head)
    now, past, constant = _OUT if plan.norm_output else (1.0, 1.0, 1.0)
    scales = _Scales(2.0, now, past, constant, now**2 + past**2 + constant**2)
    _fuse(plan, head.fc.weight, scales)
    _eagle3_layer(plan, head, scales)
    _eagle3_readout(plan, head)
    return head


# The final norm's factors of now, past and constant: without it the past would outvote the last token.
_OUT = (5.0, 1.0, 0.5)


def _fuse(plan: ExactPlan, fc: Tensor, scales: _Scales) -> None:
    """h = [token t, past of t, constant]; every tap's mark votes for the token, and none may be off."""
    f, size = plan.fields, plan.fields.size
    votes = _votes(len(plan.boundaries))
    for i, (k, vote) in enumerate(zip(plan.boundaries, votes, strict=True)):
        mark = slice(i * size + f.mark.start, i * size + f.mark.stop)
        fc[f.now, mark] = permutation(plan.vocab, -k) * (vote * scales.now)
    last = (len(plan.boundaries) - 1) * size
    fc[f.past, last + f.past.start : last + f.past.stop] = torch.eye(plan.vocab) * scales.past
    fc[f.constant, last + f.constant] = scales.constant


def _votes(taps: int) -> list[float]:
    """Weights of sum 1, such that no tap can be outvoted."""
    if taps == 1:
        return [1.0]
    others = [3.0, *[2.0] * (taps - 2)]
    return [*others, 1.0 - sum(others)]


def _eagle3_layer(plan: ExactPlan, head: Eagle3Head, scales: _Scales) -> None:
    """h_t, token t + 1 -> [token t + 1, its past, constant]: the residual is taken away, the new fields are added."""
    f, layer, s = plan.fields, head.layers[0], scales
    assert isinstance(layer, WideLayer) and layer.input_norm is not None
    keep_scale(layer.input_norm, 3, f.size)
    keep_scale(layer.hidden_norm, s.squares, f.size, s.normed)
    left = s.normed if plan.norm_before_residual else 1.0  # the residual is left * h
    constant = f.size + f.constant  # of the normed h, in the input [embedding, normed h]
    heads, eye = HandSetHeads(layer.attention, plan.head_theta), torch.eye(plan.vocab)
    heads.look_back(0, plan.lag - 1, constant, s.normed * s.constant)
    for i in (1, 2, 3):
        heads.look_back(i, 0, constant, s.normed * s.constant)
    now, past = (slice(f.size + x.start, f.size + x.stop) for x in (f.now, f.past))
    heads.copy(0, now, f.past, eye / (s.normed * s.now))
    heads.copy(1, f.now, f.now, eye)
    heads.add(1, f.now, _own_table(plan, head))
    heads.add(1, now, eye * (-left / s.normed))
    heads.copy(2, past, f.past, eye * (-left / s.normed))
    heads.scalar(3, constant, f.constant, (1 - left * s.constant) / (s.normed * s.constant))


def _eagle3_readout(plan: ExactPlan, head: Eagle3Head) -> None:
    f, norm, readout = plan.fields, head.norm, target_readout(plan)
    assert norm is not None and head.lm_head is not None
    keep_scale(norm, 3, f.size)
    places: tuple[slice | int, ...] = (f.now, f.past, f.constant)
    for place, factor in zip(places, _OUT, strict=True):
        norm.weight[place] *= factor
        readout[:, place] /= factor
    head.lm_head.weight.copy_(readout[plan.said] if plan.draft_vocab else readout)
