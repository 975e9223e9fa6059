"""Trains the target: language modelling over a mix of texts and conversations, in phases.

Owns: the loss and the loop. Must never know heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speculator.train.companion import CompanionTrainer
from speculator.train.data import ANSWER, QUESTION, REPEATED, Mixture, Stream
from speculator.train.optim import Budget, Optimizers
from speculator.train.recipe import Phase, TargetRecipe
from speculator.train.report import Log
from speculator.train.tokenizer import END
from target.attention.dense import attend_causal
from target.config import ModelConfig, RopeConfig
from target.llama import Llama, init_weights

Loss = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def target_config(recipe: TargetRecipe, vocab_size: int) -> ModelConfig:
    """The Llama config of a recipe."""
    r = recipe
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=vocab_size,
        hidden_size=r.hidden_size,
        intermediate_size=r.intermediate_size,
        num_layers=r.layers,
        num_heads=r.heads,
        num_kv_heads=r.kv_heads,
        head_dim=r.head_dim,
        norm_eps=r.norm_eps,
        rope=RopeConfig(r.rope_theta, max_position=r.max_position),
        tied=True,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        windows=(None,) * r.layers,
        max_position=r.max_position,
        bos_token_id=None,
        eos_token_ids=(END,),
        dtype="bfloat16",
    )


def new_target(config: ModelConfig, seed: int) -> Llama:
    """Random weights; what writes to the residual stream starts smaller with depth."""
    model = Llama(config)
    init_weights(model, torch.Generator().manual_seed(seed))
    for name, parameter in model.named_parameters():
        if name.endswith(("attention.o.weight", "mlp.down.weight")):
            parameter.data /= math.sqrt(2 * config.num_layers)
    return model


def language_loss(model: Llama, tokens: Tensor, weights: Tensor, unlike: Tensor) -> tuple[Tensor, Tensor]:
    """(cross-entropy, unlikelihood) means over tokens [R, L + 1] with weights [R, L] for each.

    Unlikelihood is -log(1 - p(token)) (Welleck et al. 2019, arXiv 1908.04319).
    """
    positions = torch.arange(tokens.shape[1] - 1, device=tokens.device).expand(tokens.shape[0], -1)
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.is_cuda):
        logits = model.logits(model(tokens[:, :-1], positions, attend_causal).final)
    loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(weights.shape)
    unlikely = -torch.log1p(-(-loss).exp().clamp(max=1 - 1e-4))
    return (loss * weights).sum() / weights.sum().clamp(min=1), (unlikely * unlike).sum() / unlike.sum().clamp(min=1)


def make_loss(model: Llama, device: torch.device) -> Loss:
    """`language_loss` of a model, compiled on a GPU; one shape is compiled once."""

    def loss(tokens: Tensor, weights: Tensor, unlike: Tensor) -> tuple[Tensor, Tensor]:
        return language_loss(model, tokens, weights, unlike)

    return torch.compile(loss, dynamic=False) if device.type == "cuda" else loss


def loss_weights(marks: Tensor, prompt_weight: float) -> tuple[Tensor, Tensor]:
    """marks [R, L] -> weights of cross-entropy and of unlikelihood."""
    weights = (marks == ANSWER).float() + prompt_weight * (marks == QUESTION).float()
    return weights, (marks == REPEATED).float()


def train_phase(
    model: Llama,
    loss: Loss,
    phase: Phase,
    streams: Mapping[str, Stream],
    device: torch.device,
    seed: int,
    companion: CompanionTrainer | None = None,
) -> list[dict[str, float]]:
    """Run one phase in place and return its curve."""
    mixture = Mixture(streams, phase.weights, phase.length, device, seed)
    optimizers, budget, log = Optimizers(model, phase.learning), Budget(phase.steps, phase.seconds), Log(phase.name)
    step = 0
    while (progress := budget.progress(step)) < 1:
        tokens, marks = mixture.batch(phase.rows)
        value, _ = loss(tokens, *loss_weights(marks, phase.prompt_weight))
        value.backward()
        if companion is not None:
            companion.backward()
            companion.step(progress)
        optimizers.step(progress)
        step += 1
        if step % 10 == 0:  # reading the loss also keeps the host from running ahead of the clock
            last = float(value.detach())
            if log.due:
                agree = companion.state() if companion is not None else {}
                log(step, loss=last, progress=progress, tokens=step * phase.rows * phase.length, **agree)
    log(step, loss=float(value.detach()), progress=1.0, tokens=step * phase.rows * phase.length)
    return log.rows


@torch.no_grad()
def round_weights(module: nn.Module, dtype: torch.dtype = torch.bfloat16) -> None:
    """Make float32 parameters hold what the saved half-precision ones will: what is served is what is measured."""
    for parameter in module.parameters():
        parameter.copy_(parameter.to(dtype))


@torch.no_grad()
def heldout_losses(
    model: Llama, streams: Mapping[str, Stream], length: int, device: torch.device, rows: int = 32
) -> dict[str, float]:
    """Cross-entropy per token of each source's held-out documents."""
    losses = {}
    for name, stream in streams.items():
        if len(stream.tokens):
            tokens, marks = Mixture({name: stream}, {name: 1.0}, length, device, seed=0).batch(rows)
            losses[name] = round(float(language_loss(model, tokens, *loss_weights(marks, 1.0))[0]), 4)
    return losses
