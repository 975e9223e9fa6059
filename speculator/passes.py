"""The passes of a step over target and head, run as they are.

Owns: which forward a pass is and on which attention. Must never know sessions, rules or sampling of the target. This
is the oracle of the recorded passes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from speculator import drafting
from speculator.drafting import Drafted, Start
from speculator.heads.base import DraftHead
from speculator.readout import Read, unread
from speculator.types import DraftShape
from target.attention.base import Attention, bind
from target.attention.choose import attention_for, grouped_attention
from target.batch import Batch
from target.cache import PagedCache
from target.model import Hidden, Target
from target.products import in_fixed_order
from target.readout import Asked, Readout
from target.states import StateCache, StatePass, bind_hybrid


class Verified:
    """What the target says about a batch of R drafts of T nodes: features [R, T, F] for the head, and its logits.

    Logits are written when they are first asked for; until then questions about them are `read` from the weights.
    """

    def __init__(self, features: Tensor, logits: Tensor | Callable[[], Tensor], read: Read = unread) -> None:
        self.features, self._logits, self._read = features, logits, read

    @property
    def logits(self) -> Tensor:
        """[R, T, V]"""
        if not isinstance(self._logits, Tensor):
            self._logits = self._logits()
        return self._logits

    def read(self, asked: Asked) -> Readout | None:
        """About R * T rows; None where logits are written already, or have to be."""
        return None if isinstance(self._logits, Tensor) else self._read(asked)


class Fed(NamedTuple):
    """What a prompt chunk leaves behind."""

    features: Tensor  # [R, T, F]
    final: Tensor  # [R, T, H] what the lm_head reads


class Passes(Protocol):
    """The passes an engine is made of. R rows of T tokens; rows and queries past a row's count hold anything."""

    def feed(self, batch: Batch) -> Fed: ...

    def feed_head(self, batch: Batch, features: Tensor, following: Tensor) -> Tensor:
        """`catch_up` over prompt chunks."""

    def verify(self, batch: Batch) -> Verified: ...

    def catch_up(self, batch: Batch, features: Tensor, following: Tensor) -> Tensor:
        """Run the head over true rows (feature t, token t + 1): [R, modules, H], see `DraftHead.catch_up`."""

    def draft(self, start: Start, shape: DraftShape) -> Drafted: ...

    def tally(self) -> dict[str, tuple[int, int]]:
        """Replayed and eager passes by name, where passes are recorded."""


class StatePasses(Passes, Protocol):
    """Passes that run a target with recurrent layers too, over `states`."""

    def feed(self, batch: Batch, states: StatePass | None = None) -> Fed: ...

    def verify(self, batch: Batch, states: StatePass | None = None) -> Verified: ...


class Relay:
    """Passes that hand every pass on to others; whoever watches or changes one of them overrides it."""

    def __init__(self, inner: Passes) -> None:
        self.inner = inner

    def feed(self, batch: Batch, *states: StatePass | None) -> Fed:
        run: Callable[..., Fed] = self.inner.feed  # with states where the passes inside take them
        return run(batch, *states)

    def feed_head(self, batch: Batch, features: Tensor, following: Tensor) -> Tensor:
        return self.inner.feed_head(batch, features, following)

    def verify(self, batch: Batch, *states: StatePass | None) -> Verified:
        run: Callable[..., Verified] = self.inner.verify
        return run(batch, *states)

    def catch_up(self, batch: Batch, features: Tensor, following: Tensor) -> Tensor:
        return self.inner.catch_up(batch, features, following)

    def draft(self, start: Start, shape: DraftShape) -> Drafted:
        return self.inner.draft(start, shape)

    def tally(self) -> dict[str, tuple[int, int]]:
        return self.inner.tally()


class EagerPasses:
    """Runs every pass at its own size. `head_attention` may differ from the target's, over the same cache.

    `states` are those of a hybrid's sessions, which passes that are recorded read.
    """

    def __init__(
        self,
        model: Target,
        head: DraftHead | None,
        attention: Attention[Any],
        head_attention: Attention[Any],
        states: StateCache | None = None,
    ) -> None:
        self.model, self.head, self.states = model, head, states
        self.attention, self.head_attention = attention, head_attention

    def target(self, tokens: Tensor, positions: Tensor, attend: Any) -> Hidden:
        return self.model(tokens, positions, attend, self.head.taps if self.head else ())

    def fed(self, tokens: Tensor, positions: Tensor, attend: Any) -> Fed:
        hidden = self.target(tokens, positions, attend)
        return Fed(self.features(hidden), hidden.final)

    def features(self, hidden: Hidden) -> Tensor:
        return self.head.features(hidden) if self.head else hidden.final

    def feed(self, batch: Batch, states: StatePass | None = None) -> Fed:
        return self.fed(batch.tokens, batch.positions, bind_target(self.attention, batch, states))

    def verify(self, batch: Batch, states: StatePass | None = None) -> Verified:
        hidden = self.target(batch.tokens, batch.positions, bind_target(self.attention, batch, states))
        return self.verified(hidden)

    def verified(self, hidden: Hidden) -> Verified:
        final = hidden.final
        return Verified(self.features(hidden), partial(self.model.logits, final), partial(self.model.read, final))

    def feed_head(self, batch: Batch, features: Tensor, following: Tensor) -> Tensor:
        return self.catch_up(batch, features, following)

    def catch_up(self, batch: Batch, features: Tensor, following: Tensor) -> Tensor:
        if batch.tokens.device.type == "cpu" and not batch.static:
            batch, features, following = _kept_columns(batch, features, following)
        return self.catch_up_on(batch, features, following, bind(self.head_attention, batch))

    def catch_up_on(self, batch: Batch, features: Tensor, following: Tensor, attend: Any) -> Tensor:
        assert self.head is not None
        return self.head.catch_up(self.head.fuse(features), following, batch.positions, batch.counts, attend)

    def outputs(self, batch: Batch, features: Tensor, following: Tensor) -> tuple[Tensor, Tensor]:
        """All that a head of one module makes of true rows, two parts [R, T, H]; `catch_up` keeps each row's last."""
        assert self.head is not None and not self.head.lookback
        attend = bind(self.head_attention, batch)
        return self.head.advance(self.head.fuse(features), following, batch.positions, attend)

    def draft(self, start: Start, shape: DraftShape) -> Drafted:
        assert self.head is not None
        return drafting.draft(self.head, self.head_attention, start, shape)

    def tally(self) -> dict[str, tuple[int, int]]:
        return {}


def bind_target(attention: Attention[Any], batch: Batch, states: StatePass | None) -> Any:
    """What the target's layers call; those of a hybrid read `states` too."""
    return bind(attention, batch) if states is None else bind_hybrid(attention, batch, states)


def eager_passes(
    model: Target, head: DraftHead | None, cache: PagedCache, states: StateCache | None = None
) -> EagerPasses:
    """On the backends that the layers of target and head need over `cache`; in fixed order where the target's are."""
    if in_fixed_order(model):
        from speculator.fixed_passes import fixed_passes  # it builds on this module

        return fixed_passes(model, head, cache)
    attention = attention_for(model.config, cache)
    alike = head is None or head.latent == (model.config.mla is not None)
    return EagerPasses(model, head, attention, attention if alike else grouped_attention(cache), states)


def rows_of(batch: Batch, index: Tensor) -> Batch:
    """The rows `index` [N] of a batch."""
    ancestors = None if batch.ancestors is None else batch.ancestors[index]
    return batch._replace(
        tokens=batch.tokens[index],
        positions=batch.positions[index],
        context=batch.context[index],
        counts=batch.counts[index],
        pages=batch.pages[index],
        ancestors=ancestors,
    )


def _kept_columns(batch: Batch, features: Tensor, following: Tensor) -> tuple[Batch, Tensor, Tensor]:
    """True rows without what no session kept of its draft, for a device on which looking costs nothing."""
    width = max(1, int(batch.counts.max()))
    if width == batch.tokens.shape[1]:
        return batch, features, following
    tokens, positions = batch.tokens[:, :width], batch.positions[:, :width]
    batch = batch._replace(tokens=tokens, positions=positions, longest=int((batch.context + batch.counts).max()))
    return batch, features[:, :width], following[:, :width]


def shifted(tokens: Tensor, counts: Tensor, following: Tensor) -> Tensor:
    """[R, T]: the token after each one; `following` [R] comes after the last valid one."""
    moved = torch.cat((tokens[:, 1:], tokens[:, :1]), dim=1)
    return moved.scatter(1, (counts - 1)[:, None], following[:, None])
