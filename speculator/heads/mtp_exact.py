"""Tiny targets with MTP modules that draft exactly what they will say.

Owns: weights set by hand in the fields of `speculator.heads.exact`, so that a wrong input, order, norm, module or row
shows as acceptance below 1. For tests and self-checks. Must never know files or the engine.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from speculator.heads.exact import (
    FINAL,
    ExactPair,
    ExactPlan,
    HandSetHeads,
    exact_config,
    exact_target,
    keep_scale,
    permutation,
    target_readout,
)
from speculator.heads.load import build_head
from speculator.heads.mtp import MtpHead, mtp_record
from speculator.heads.record import HeadRecord
from target.config import ModelConfig
from target.layers import SelfAttention

_WRONG = 5  # tokens by which a poisoned field is off


@dataclass(frozen=True)
class MtpPlan:
    """What an exact pair with MTP modules shall depend on; `needs` and `lag` as in ExactPlan.

    Module k turns the tokens it hands on by k + 1 tokens and the next one turns them back, so modules cannot stand in
    for each other.
    """

    needs: str = "both"
    lag: int = 2
    modules: int = 1
    hidden_first: bool = False
    norm_output: bool = True
    raw_input: bool = False  # the modules read B(n) instead of F
    base: ExactPlan = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "base", ExactPlan(needs=self.needs, lag=self.lag, draft_vocab=False))

    @property
    def turned(self) -> bool:
        """Recycling the wrong side of the norm shows in the sign of the token only."""
        return not self.norm_output and not self.raw_input

    @property
    def own_lm_head(self) -> bool:
        return self.modules > 1 or self.turned


def exact_mtp(plan: MtpPlan | None = None) -> ExactPair:
    """A float32 target on the CPU and the head that is exact for it."""
    plan = plan or MtpPlan()
    with torch.no_grad():
        target = exact_target(plan.base, _mimo(exact_config(plan.base)))
        target.norm.weight[plan.base.fields.mark] = 0.0  # B(n) has a mark, F has none
        head = build_head(_record(plan, target.config), target)
        assert isinstance(head, MtpHead)
        for k in range(plan.modules):
            module = head.stage(k)
            assert isinstance(module, MtpHead)
            _module(plan, module, k)
    return ExactPair(target.requires_grad_(False).eval(), head.requires_grad_(False).eval())


def _mimo(config: ModelConfig) -> ModelConfig:
    """A family whose folders hold MTP modules."""
    return replace(config, architecture="MiMoForCausalLM", qkv_bias=True)


def _record(plan: MtpPlan, config: ModelConfig) -> HeadRecord:
    return mtp_record(
        config,
        boundaries=(config.num_layers,) if plan.raw_input else (),
        modules=plan.modules,
        hidden_first=plan.hidden_first,
        norm_output=plan.norm_output,
        own_lm_head=plan.own_lm_head,
    )


def _module(plan: MtpPlan, module: MtpHead, k: int) -> None:
    """Module k: token t + 1 + k into `now`, the one before it into `mark`, from where attention fetches the past."""
    f, out = plan.base.fields, min(k + 1, plan.modules - 1)
    for parameter in (p for name, p in module.named_parameters() if not name.startswith("later.")):
        parameter.zero_()
    keep_scale(module.embedding_norm, 3, f.size)
    keep_scale(module.hidden_norm, 4 if plan.raw_input else 3, f.size)
    _project(plan, module, k, out)
    keep_scale(module.layer.input_norm, 3, f.size)
    assert isinstance(module.layer.attention, SelfAttention)
    _attend(plan, module.layer.attention)
    _read_out(plan, module, out)


def _project(plan: MtpPlan, module: MtpHead, k: int, out: int) -> None:
    """A hidden state whose mark is not what the right one's would be puts a wrong token into `mark`."""
    base, f = plan.base, plan.base.fields
    embedding, hidden = torch.zeros(f.size, f.size), torch.zeros(f.size, f.size)
    embedding[f.now, f.now] = permutation(base.vocab, out)
    embedding[f.constant, f.constant] = 1.0
    right, wrong = permutation(base.vocab, -k), 3.0 * permutation(base.vocab, _WRONG - k)
    marked = wrong @ permutation(base.vocab, -base.layers)
    # what is missing and what is too much must both put something in: taking away would go unnoticed
    hidden[f.mark, f.now] = right + wrong if plan.raw_input else right
    hidden[f.mark, f.mark] = -marked if plan.raw_input else marked
    pair = (embedding, hidden)
    module.eh_proj.weight.copy_(torch.cat(pair[::-1] if plan.hidden_first else pair, dim=1))


def _attend(plan: MtpPlan, attention: SelfAttention) -> None:
    """The past from `mark`; then `mark` becomes what the next step must find there, before the norm or after it."""
    base, f = plan.base, plan.base.fields
    heads = HandSetHeads(attention, base.target_theta)
    heads.look_back(0, plan.lag - 1, f.constant, 1.0)
    heads.look_back(1, 0, f.constant, 1.0)
    heads.copy(0, f.mark, f.past, torch.eye(base.vocab))
    turn = permutation(base.vocab, base.layers)
    heads.copy(1, f.now, f.mark, turn)
    heads.add(1, f.now, _mark(plan) * torch.eye(base.vocab))
    heads.add(1, f.mark, -turn.T)


def _mark(plan: MtpPlan) -> float:
    """How long the mark of an output is, before the norm."""
    if plan.raw_input:
        return 0.5 if plan.norm_output else 1.0
    return 1.0 if plan.norm_output else 0.0


def _read_out(plan: MtpPlan, module: MtpHead, out: int) -> None:
    base, f, sign = plan.base, plan.base.fields, -1.0 if plan.turned else 1.0
    keep_scale(module.norm, 3 + _mark(plan) ** 2, f.size, FINAL)
    module.norm.weight[f.mark] *= 2.0 if plan.raw_input and plan.norm_output else 0.0
    module.norm.weight[f.now] *= sign
    if module.lm_head is not None:
        readout: Tensor = target_readout(base) / FINAL
        readout[:, f.now] = readout[:, f.now] @ permutation(base.vocab, -out) * sign
        module.lm_head.weight.copy_(readout)
