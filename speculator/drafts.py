"""What a request may ask: drafts, draft shapes, sampling and stopping, checked before they reach the device.

Owns: the limits and their sentences, and how an asked shape becomes the shape of one step.
Must never import torch, grpc or protobuf, nor look at a session.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from speculator.errors import InvalidArgumentError, InvalidTreeError, PromptTooLongError
from speculator.types import (
    MASK_BITS,
    MOST_NODES,
    Distribution,
    Draft,
    DraftShape,
    EngineInfo,
    Rule,
    SamplingParams,
    StoppingParams,
)

SESSION_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")
TOTAL_TOLERANCE = 1e-3  # float32 log-probabilities of a whole vocabulary do not sum to 1 more closely


@dataclass(frozen=True, slots=True)
class ShapeRequest:
    """What a caller asks of a draft; None (or empty `parents`) keeps the session's own."""

    depth: int | None = None
    nodes: int | None = None
    branching: int | None = None
    parents: tuple[int, ...] = ()

    def over(self, base: DraftShape) -> DraftShape:
        """The shape asked for, on top of `base`."""
        if self == KEEP:
            return base
        if self.parents or (base.parents and self.branching is None):
            return _static(self.parents or base.parents, self.depth, self.nodes)
        depth = base.depth if self.depth is None else self.depth
        branching = max(1, base.branching if self.branching is None else self.branching)
        nodes = base.nodes if self.nodes is None else self.nodes
        return _chain(depth, self.nodes) if branching == 1 else _dynamic(depth, nodes, branching)


KEEP = ShapeRequest()


def _chain(depth: int, nodes: int | None) -> DraftShape:
    return DraftShape(depth if nodes is None else min(depth, nodes))


def _dynamic(depth: int, nodes: int, branching: int) -> DraftShape:
    """Nodes 0 stays open; more than the levels can hold is cut."""
    room = branching + (depth - 1) * branching * branching
    return DraftShape(depth, min(nodes, room), branching) if depth else DraftShape(0)


def _static(parents: Sequence[int], depth: int | None, nodes: int | None) -> DraftShape:
    _check_order(parents, "draft.static_parents")
    levels = depths(parents)
    top = max(levels) if depth is None else min(depth, max(levels))
    keep = [i for i, level in enumerate(levels[:nodes]) if level <= top]
    index = {-1: -1} | {old: new for new, old in enumerate(keep)}
    return DraftShape(top, len(keep), 1, tuple(index[parents[i]] for i in keep)) if keep else DraftShape(0)


def capped(shape: DraftShape, depth: int) -> DraftShape:
    """`shape` cut to at most `depth` levels; the same object when nothing is cut."""
    if shape.depth <= depth:
        return shape
    if shape.parents:
        return _static(shape.parents, depth, None)
    return DraftShape(depth) if shape.is_chain else _dynamic(depth, shape.nodes, shape.branching)


def fitted(shape: DraftShape, info: EngineInfo) -> DraftShape:
    """`shape` with a dynamic tree's open number of nodes filled in: as many as its levels and the engine can hold."""
    return filled(shape, info.max_nodes)


def filled(shape: DraftShape, most: int = MOST_NODES) -> DraftShape:
    """`fitted` for an engine that takes trees of `most` nodes."""
    if shape.parents or shape.is_chain:
        return shape
    return _dynamic(shape.depth, shape.nodes or most, shape.branching)


def depths(parents: Sequence[int]) -> list[int]:
    """Depth of each node, 1 below the last committed token; `parents[i] < i`."""
    levels: list[int] = []
    for parent in parents:
        levels.append(1 if parent < 0 else levels[parent] + 1)
    return levels


def draft_depth(draft: Draft) -> int:
    """Levels of a draft; 0 when it is empty."""
    if draft.is_chain:
        return len(draft.tokens)
    return max(depths(draft.parents))


def check_shape(shape: DraftShape, rule: Rule, info: EngineInfo) -> None:
    """Raises InvalidArgumentError when the engine cannot draft `shape` for verification by `rule`."""
    _at_most(shape.depth, info.max_depth, "draft.max_depth", "drafted levels")
    nodes = len(shape.parents) or shape.nodes or shape.depth
    _at_most(nodes, info.max_nodes, "draft.max_nodes", "drafted nodes")
    _at_most(shape.branching, info.max_branching, "draft.branching", "children of a node")
    if shape.scratch > MASK_BITS:
        raise InvalidArgumentError(
            f"a dynamic tree needs (max_depth - 2) * branching <= {MASK_BITS}, got ({shape.depth} - 2) * "
            f"{shape.branching}",
            field="draft.branching",
        )
    if rule is Rule.BLOCK and not (shape.is_chain or _is_chain(shape.parents)):
        raise InvalidArgumentError("block verification takes chains only, the draft's shape is a tree", field="draft")


def check_rule(sampling: SamplingParams, info: EngineInfo) -> None:
    """Raises InvalidArgumentError where a draft would choose among tokens of an engine that no draft may change."""
    if info.invariant and sampling.rule is not Rule.COUPLED and sampling.temperature > 0:
        rule = sampling.rule.value
        raise InvalidArgumentError(
            f'verification rule "{rule}" lets drafts choose among tokens, which engine.invariant excludes: use coupled',
            field="sampling.verification_rule",
        )


def _is_chain(parents: Sequence[int]) -> bool:
    return bool(parents) and all(parent == i - 1 for i, parent in enumerate(parents))


def _at_most(value: int, limit: int, where: str, what: str) -> None:
    if value > limit:
        raise InvalidArgumentError(f"{value} {what} asked for, the limit is {limit}", field=where)


def check_prompt(tokens: Sequence[int], context: int, info: EngineInfo) -> None:
    """Raises when the prompt is empty, holds a foreign token, or leaves no room for one token in `context`."""
    if not tokens:
        raise InvalidArgumentError("the prompt is empty; give token_ids or text", field="token_ids")
    if len(tokens) >= context:
        raise PromptTooLongError(
            f"the prompt has {len(tokens)} tokens; this server takes at most {context - 1}, one is left for output",
            field="token_ids",
            prompt_tokens=str(len(tokens)),
            max_prompt_tokens=str(context - 1),
        )
    check_tokens(tokens, info.vocab_size, "token_ids")


def check_tokens(tokens: Sequence[int], vocab_size: int, where: str) -> None:
    """Raises InvalidArgumentError naming the first token outside the vocabulary."""
    if not tokens or (min(tokens) >= 0 and max(tokens) < vocab_size):
        return
    at = next(i for i, token in enumerate(tokens) if not 0 <= token < vocab_size)
    raise InvalidArgumentError(
        f"token {tokens[at]} at index {at} is outside the vocabulary of {vocab_size} tokens", field=f"{where}[{at}]"
    )


def check_session_id(session_id: str) -> None:
    """Raises InvalidArgumentError unless the id is 1 to 64 characters of letters, digits, '_', '.' and '-'."""
    if not SESSION_ID.fullmatch(session_id):
        raise InvalidArgumentError(
            "session_id must be 1 to 64 characters of letters, digits, '_', '.' and '-'", field="session_id"
        )


def check_sampling(params: SamplingParams) -> None:
    """Raises InvalidArgumentError with one sentence about the first bad field."""
    _in_range(params.temperature, "temperature", 0.0, math.inf, "finite and at least 0")
    _in_range(params.top_p, "top_p", 0.0, 1.0, "in (0, 1]", open_low=True)
    _in_range(params.min_p, "min_p", 0.0, 1.0, "in [0, 1]")
    _in_range(params.repetition_penalty, "repetition_penalty", 0.0, math.inf, "finite and above 0", open_low=True)
    if params.top_k < 0:
        raise InvalidArgumentError("top_k must be at least 0; 0 switches it off", field="sampling.top_k")


def _in_range(value: float, name: str, low: float, high: float, words: str, open_low: bool = False) -> None:
    if not math.isfinite(value) or not low <= value <= high or (open_low and value == low):
        raise InvalidArgumentError(f"{name} must be {words}, got {value:g}", field=f"sampling.{name}")


def check_stopping(params: StoppingParams, info: EngineInfo) -> None:
    """Raises InvalidArgumentError for an empty output or a foreign stop token."""
    if params.max_new_tokens is not None and params.max_new_tokens < 1:
        raise InvalidArgumentError("max_new_tokens must be at least 1", field="stopping.max_new_tokens")
    check_tokens(sorted(params.stop_token_ids), info.vocab_size, "stopping.stop_token_ids")


def validate(draft: Draft, info: EngineInfo, rule: Rule = Rule.COUPLED) -> None:
    """Raises InvalidTreeError (InvalidArgumentError for a foreign token) unless the target can verify `draft`."""
    if len(draft.tokens) > info.max_nodes:
        raise InvalidTreeError(f"the tree has {len(draft.tokens)} nodes, the limit is {info.max_nodes}", field="tree")
    if len(draft.parents) != len(draft.tokens):
        raise InvalidTreeError(
            f"parent_indices has {len(draft.parents)} entries for {len(draft.tokens)} tokens", field="tree"
        )
    _check_logprobs(draft)
    check_tokens(draft.tokens, info.vocab_size, "tree.token_ids")
    _check_order(draft.parents, "tree.parent_indices")
    if draft.tokens and draft_depth(draft) > info.max_depth:
        raise InvalidTreeError(
            f"the tree is {draft_depth(draft)} levels deep, the limit is {info.max_depth}", field="tree"
        )
    if rule is Rule.BLOCK and not draft.is_chain:
        raise InvalidTreeError("block verification takes chains only, this draft is a tree", field="tree")
    if draft.q is not None:
        _check_distributions(draft, draft.q, info)


def _check_logprobs(draft: Draft) -> None:
    if draft.logprobs and len(draft.logprobs) != len(draft.tokens):
        raise InvalidTreeError(
            f"logprobs has {len(draft.logprobs)} entries for {len(draft.tokens)} tokens", field="tree.logprobs"
        )
    for i, value in enumerate(draft.logprobs):
        if _no_logprob(value):
            raise InvalidTreeError(f"the log-probability of node {i} is NaN or above 0", field=f"tree.logprobs[{i}]")


def _no_logprob(value: float) -> bool:
    return math.isnan(value) or value > TOTAL_TOLERANCE


def _check_order(parents: Sequence[int], where: str) -> None:
    for i, parent in enumerate(parents):
        if not -1 <= parent < i:
            raise InvalidTreeError(
                f"the parent of node {i} is {parent}; it must be -1 (the last committed token) or an earlier node",
                field=f"{where}[{i}]",
            )


def _check_distributions(draft: Draft, q: Sequence[Distribution], info: EngineInfo) -> None:
    if len(q) != len(draft.tokens):
        raise InvalidTreeError(
            f"support_counts has {len(q)} entries for {len(draft.tokens)} tokens", field="tree.support_counts"
        )
    for i, (token, support) in enumerate(zip(draft.tokens, q, strict=True)):
        check_tokens(support.token_ids, info.vocab_size, f"tree.support_token_ids of node {i}")
        _check_distribution(i, token, support)


def _check_distribution(node: int, token: int, support: Distribution) -> None:
    if len(support.token_ids) != len(support.logprobs):
        raise InvalidTreeError(
            f"node {node} has {len(support.token_ids)} support tokens and {len(support.logprobs)} log-probabilities",
            field="tree.support_logprobs",
        )
    if len(set(support.token_ids)) != len(support.token_ids):
        raise InvalidTreeError(f"the support of node {node} lists a token twice", field="tree.support_token_ids")
    mass = dict(zip(support.token_ids, support.logprobs, strict=True))
    if any(map(_no_logprob, mass.values())):
        raise InvalidTreeError(
            f"the support of node {node} has a log-probability that is NaN or above 0", field="tree.support_logprobs"
        )
    if mass.get(token, -math.inf) == -math.inf:
        raise InvalidTreeError(
            f"token {token} of node {node} is not in the support it was drawn from", field="tree.support_token_ids"
        )
    total = math.fsum(math.exp(value) for value in mass.values())
    if abs(total - 1.0) > TOTAL_TOLERANCE:
        raise InvalidTreeError(
            f"q of node {node} sums to {total:.4f}, not 1: verification needs the full support, not its top part",
            field="tree.support_logprobs",
        )
