"""What the engine asks of a draft head.

Owns: the seam. A head fuses the target's features, runs one pass over (feature, next token) rows, says what it drafts
and what it feeds itself next. Must never know sessions, sampling or trees.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from speculator.heads.record import HeadRecord
from target.attention.base import Attend
from target.cache import LayerShape
from target.config import ModelConfig
from target.layers import GatedMLP, RMSNorm, SelfAttention
from target.model import Hidden
from target.products import Linear, Multiplies
from target.readout import Asked, Readout, Reads
from target.rope import Rope


class TargetWeights(NamedTuple):
    """What a head may borrow; a tuple, so that torch does not count them as the head's own parameters."""

    embed: Tensor  # [V, Ht]
    lm_head: Tensor  # [V, Ht]
    config: ModelConfig | None = None  # for heads whose layers are of the target's own kind


class DraftHead(Reads, Multiplies, nn.Module, ABC):
    """Row t pairs the target's feature at position t with the embedding of token t + 1; its output drafts token t + 2.

    Shapes: R rows, T tokens, H head width, Vd draft vocabulary. `first_layer` is the number of the head's first layer
    in the shared KV cache.
    """

    target_ids: Tensor | None  # [Vd] int64, draft id -> target id; None when the vocabularies are equal

    def __init__(self, record: HeadRecord, shared: TargetWeights, first_layer: int) -> None:
        super().__init__()
        self.record, self.shared, self.first_layer = record, shared, first_layer
        self.rope = Rope(record.rope, record.head_dim)
        self.embed = nn.Embedding(record.vocab_size, record.hidden_size) if record.own_embed else None
        own = record.own_lm_head
        self.lm_head = Linear(record.hidden_size, record.draft_vocab_size, bias=False) if own else None
        ids = torch.arange(record.draft_vocab_size) if record.d2t else None
        self.register_buffer("target_ids", ids, persistent=False)

    @property
    def taps(self) -> tuple[int, ...]:
        """Boundaries k of the B(k) that the target must hand over."""
        return self.record.boundaries

    @property
    def cache_layers(self) -> list[LayerShape]:
        return [LayerShape(self.record.num_kv_heads, self.record.head_dim)] * self.record.num_layers

    @property
    def latent(self) -> bool:
        """Whether its layers cache one latent a token (MLA), as a target of that kind does."""
        return self.cache_layers[0].parts == 1

    @property
    def lookback(self) -> int:
        """Modules that follow this one; module k reads token t + 1 + k, so its last k rows wait for their tokens."""
        return 0

    def stage(self, step: int) -> DraftHead:
        """The module that drafts after `step` drafted tokens."""
        return self

    def catch_up(self, hidden: Tensor, tokens: Tensor, positions: Tensor, counts: Tensor, attend: Attend) -> Tensor:
        """Run the first `counts` [R] true rows through every module; see `forward` for the rest.

        Returns [R, modules, H]: of module k the output at its last row whose tokens are known, `counts - 1 - k`. What
        it makes of later rows is overwritten before anything sees it.
        """
        output, newest = hidden, list[Tensor]()
        for k in range(self.lookback + 1):
            if k:
                hidden, tokens = self.stage(k - 1).recycle(output), tokens.roll(-1, dims=1)
            output = self.stage(k)(hidden, tokens, positions, attend)
            last = (counts - 1 - k).clamp(min=0)[:, None, None]
            newest.append(output.gather(1, last.expand(-1, 1, output.shape[-1])))
        return torch.cat(newest, dim=1)

    def features(self, hidden: Hidden) -> Tensor:
        """[R, T, feature_size] true features of a target pass."""
        return torch.cat(hidden.taps, dim=-1) if self.taps else hidden.final

    @abstractmethod
    def fuse(self, features: Tensor) -> Tensor:
        """True features [R, T, feature_size] -> what `forward` takes as hidden [R, T, H]."""

    @abstractmethod
    def advance(self, hidden: Tensor, tokens: Tensor, positions: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
        """`forward` as two parts still to be added: what follows adds in the same kernel."""

    @property
    @abstractmethod
    def out_norm(self) -> RMSNorm | None:
        """What stands between outputs and the lm_head."""

    def forward(self, hidden: Tensor, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """hidden [R, T, H], tokens and positions [R, T] int64 (token t + 1 at position t) -> output g [R, T, H]."""
        x, more = self.advance(hidden, tokens, positions, attend)
        return x + more

    def recycle(self, output: Tensor) -> Tensor:
        """Output g -> the hidden of the next recursive step."""
        return self.lm_input(output) if self.record.norm_output else output

    def lm_input(self, output: Tensor) -> Tensor:
        """Output g [..., H] -> what the lm_head reads."""
        return output if self.out_norm is None else self.out_norm(output)

    def logits(self, output: Tensor) -> Tensor:
        """Output g [..., H] -> draft logits [..., Vd]."""
        return self.project(self.lm_input(output))

    def read(self, output: Tensor, asked: Asked) -> Readout | None:
        """What is asked about `logits(output)`, g [..., H] as N rows; None where they have to be written first."""
        return self.ask(self.lm_input(output), self.lm_table, self.product, asked)

    def read_sum(self, x: Tensor, more: Tensor, asked: Asked) -> tuple[Tensor, Readout | None]:
        """The output x + more [..., H] that `advance` left in two parts, and `read` about it."""
        output, normed = (x + more,) * 2 if self.out_norm is None else self.out_norm.after(x, more)
        return output, self.ask(normed, self.lm_table, self.product, asked)

    @property
    def embedding_table(self) -> Tensor:
        """[V, H]; the head's own or the target's."""
        return self.shared.embed if self.embed is None else self.embed.weight

    def embedding(self, tokens: Tensor) -> Tensor:
        return nn.functional.embedding(tokens, self.embedding_table)

    @property
    def lm_table(self) -> Tensor:
        """[Vd, H]; the head's own lm_head, its embedding table, or the target's lm_head."""
        if self.lm_head is not None:
            return self.lm_head.weight
        return self.embedding_table if self.record.lm_head_is_embed else self.shared.lm_head

    def project(self, normed: Tensor) -> Tensor:
        return self.product(normed, self.lm_table, None)


def head_attention(record: HeadRecord, layer: int, in_size: int) -> SelfAttention:
    """The head's attention with cache layer number `layer`."""
    r = record
    return SelfAttention(
        layer,
        in_size,
        r.hidden_size,
        r.num_heads,
        r.num_kv_heads,
        r.head_dim,
        qkv_bias=r.qkv_bias,
        o_bias=r.o_bias,
        qk_norm_eps=r.norm_eps if r.qk_norm else None,
    )


class PlainLayer(nn.Module):
    """An ordinary pre-norm layer, as the layers after the first of a deep head."""

    def __init__(self, record: HeadRecord, layer: int, input_norm: bool = True) -> None:
        super().__init__()
        r = record
        self.input_norm = RMSNorm(r.hidden_size, r.norm_eps) if input_norm else None
        self.attention = head_attention(r, layer, r.hidden_size)
        self.post_norm = RMSNorm(r.hidden_size, r.norm_eps)
        self.mlp = GatedMLP(r.hidden_size, r.intermediate_size, r.mlp_bias)

    def forward(
        self, x: Tensor, more: Tensor | None, cos: Tensor, sin: Tensor, attend: Attend
    ) -> tuple[Tensor, Tensor]:
        """Of x + more, two parts still to be added, as `DecoderLayer.advance`."""
        if self.input_norm is None:
            x = normed = x if more is None else x + more
        else:
            x, normed = self.input_norm.after(x, more)
        x, normed = self.post_norm.after(x, self.attention(normed, cos, sin, attend))
        return x, self.mlp(normed)
