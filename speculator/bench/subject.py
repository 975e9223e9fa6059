"""What a run of the acceptance benchmark measures: models loaded here, a running server, or random weights.

Owns: the way from the arguments to something that plays prompts, and how it is named in the report. Must never play.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

from speculator.bench.hashes import model_hash
from speculator.bench.measure import shape_of
from speculator.bench.pairs import Pair, load_pair
from speculator.bench.player import EnginePlayer, Player
from speculator.bench.prompts import OPEN_SET, set_name
from speculator.bench.records import Settings
from speculator.bench.remote import RemotePlayer
from speculator.bench.rounds import ChatTokenizer, Plan
from speculator.bench.served import check_limits, identity, reach, tokenizer_of
from speculator.bench.synthetic import SHAPES, synthetic_engine
from speculator.config import GraphsConfig
from speculator.drafts import check_shape
from speculator.engine import Engine
from speculator.errors import ConfigError
from speculator.load import fingerprint
from speculator.types import DraftShape, Rule


@dataclass(frozen=True, slots=True)
class Subject:
    """`hashes` tell weights apart, by "target" and "head"; `server` says who served them.

    `revision` is the target's as a server tells it, the same for models loaded here.
    """

    player: Player
    tokenizer: ChatTokenizer
    settings: Settings
    ends: frozenset[int]
    hashes: dict[str, str]
    server: dict[str, Any] = field(default_factory=dict)
    revision: str = ""


class Bytes:
    """The tokenizer of models without one: a token a byte."""

    has_chat = False

    def encode_chat(self, messages: str | Sequence[dict[str, str]]) -> list[int]:
        text = messages if isinstance(messages, str) else "\n".join(m["content"] for m in messages)
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i % 256 for i in ids).decode("latin-1")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that name a server or random weights; those of a pair are in pairs.py."""
    remote = parser.add_argument_group("a running server instead of models loaded here")
    remote.add_argument("--server", metavar="HOST:PORT", help="record its rounds over gRPC; --target is its tokenizer")
    remote.add_argument("--ca", default="", help="PEM file of the CA to trust; switches TLS on")
    remote.add_argument("--cert", default="", help="PEM file of the client's certificate, with --key")
    remote.add_argument("--key", default="", help="PEM file of the client's key")
    remote.add_argument("--token-file", type=Path, help="file whose first line is the bearer token")
    parser.add_argument("--graphs", choices=get_args(get_type_hints(GraphsConfig)["mode"]), default="auto")
    parser.add_argument("--synthetic", choices=list(SHAPES), help="random weights of this shape, for times alone")


@contextmanager
def subject(args: argparse.Namespace, plans: Sequence[Plan], also: Sequence[DraftShape] = ()) -> Iterator[Subject]:
    """What the arguments name, ready to play `plans`; the report is named after the first. Raises SpeculatorError."""
    if args.server:
        with _reached(args, plans, also) as found:
            yield found
    else:
        yield _synthetic(args, plans[0]) if args.synthetic else _loaded(args, plans, also)


def _loaded(args: argparse.Namespace, plans: Sequence[Plan], also: Sequence[DraftShape]) -> Subject:
    plan = plans[0]
    pair: Pair = load_pair(args, plan.rows, engine_sets(args, plan))
    info = pair.engine.info
    _check_engine(args, pair.engine, plans, also)
    named = Named(str(pair.target), pair.head, info.draft_method, pair.tokenizer.has_chat)
    hashes = {"target": model_hash(pair.target), "head": model_hash(_head_folder(pair))}
    ends = frozenset(info.eos_token_ids)
    player, settings = EnginePlayer(pair.engine), settings_of(args, plan, named)
    return Subject(player, pair.tokenizer, settings, ends, hashes, revision=fingerprint(pair.target))


def _check_engine(args: argparse.Namespace, engine: Engine, plans: Sequence[Plan], also: Sequence[DraftShape]) -> None:
    """ConfigError or InvalidArgumentError for the first wish that this engine cannot grant, before anything runs."""
    if engine.head is None:
        raise ConfigError("There is no draft head to measure: give --head PATH.")
    if args.theory and engine.recurrent.cache is not None:
        raise ConfigError("--theory cannot listen to a target with recurrent layers: leave it out.")
    for shape, rule in [*((p.shape, p.sampling.rule) for p in plans), *((shape, Rule.COUPLED) for shape in also)]:
        if shape is not None:
            check_shape(shape, rule, engine.info)


def engine_sets(args: argparse.Namespace, plan: Plan) -> dict[str, object]:
    """Keys of the configuration by which passes are recorded in the shape that is played."""
    assert plan.shape is not None
    shape = {"draft.depth": plan.shape.depth, "draft.nodes": plan.shape.nodes, "draft.branching": plan.shape.branching}
    return {"graphs.mode": args.graphs, **shape}


def _head_folder(pair: Pair) -> Path:
    """An MTP head lies in the target's own folder."""
    return pair.target if pair.head == "mtp" else Path(pair.head)


def _synthetic(args: argparse.Namespace, plan: Plan) -> Subject:
    if args.target or args.head:
        raise ConfigError("--synthetic makes its own models, for times alone: leave out --target and --head.")
    engine = synthetic_engine(args.synthetic, args.device, plan.rows, {"engine.threads": args.threads})
    named = Named(args.synthetic, "random", engine.info.draft_method, False)
    ends = frozenset(engine.info.eos_token_ids)
    return Subject(EnginePlayer(engine), Bytes(), settings_of(args, plan, named), ends, {"target": "", "head": ""})


@contextmanager
def _reached(args: argparse.Namespace, plans: Sequence[Plan], also: Sequence[DraftShape]) -> Iterator[Subject]:
    _check_alone(args)
    with reach(args.server, args.ca, args.cert, args.key, args.token_file) as client, client.draft_stream() as steps:
        info = identity(client, args.server)
        check_limits(info, [*(plan.shape for plan in plans if plan.shape), *also], max(plan.rows for plan in plans))
        tokenizer, _ = tokenizer_of(info, Path(args.target) if args.target else None)
        named = Named(info.target_model, info.draft_model, info.draft_method, tokenizer.has_chat)
        hashes = {"target": info.target_revision, "head": info.draft_revision}
        told = {"address": args.server, "version": info.version, "instance": info.instance_id}
        told |= {"tokenizer": info.tokenizer_sha256[:16]}
        player = RemotePlayer(steps, info.limits.context)
        ends = frozenset(info.eos_token_ids)
        settings = settings_of(args, plans[0], named)
        yield Subject(player, tokenizer, settings, ends, hashes, told, info.target_revision)


def _check_alone(args: argparse.Namespace) -> None:
    if args.synthetic:
        raise ConfigError("--synthetic makes its own engine and --server has one: give one of them.")
    if args.head:
        raise ConfigError("The head is the server's: start the server with it, or leave out --server.")
    if (args.device, args.graphs) != ("auto", "auto"):
        raise ConfigError("--device and --graphs are the server's: start it with them, or leave out --server.")
    if args.theory:
        raise ConfigError("--theory compares whole distributions, which a server does not give: leave out --server.")


@dataclass(frozen=True, slots=True)
class Named:
    """How a report calls what it measured."""

    target: str
    head: str
    method: str
    chat: bool


def settings_of(args: argparse.Namespace, plan: Plan, named: Named) -> Settings:
    """The settings of a report."""
    assert plan.shape is not None
    return Settings(
        target=named.target,
        head=named.head,
        method=named.method,
        shape=shape_of(plan.shape),
        temperature=plan.sampling.temperature,
        rule=plan.sampling.rule.value,
        seed=plan.sampling.seed,
        max_tokens=plan.tokens,
        batch=plan.rows,
        top_k=plan.sampling.top_k,
        top_p=plan.sampling.top_p,
        files=tuple(set_name(file) for file in args.sets or [args.prompts or OPEN_SET]),
        chat=named.chat,
        confidence=args.confidence,
        resamples=args.resamples,
    )
