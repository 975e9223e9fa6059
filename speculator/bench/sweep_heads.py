"""The heads of a sweep on one target, loaded once: one head after the other, of MTP heads also fewer of their modules.

Owns: reading the heads beside the first one, their names, and giving back what a head held before the next one comes.
Must never play a prompt.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from speculator.bench.hashes import model_hash
from speculator.bench.measure import Bench
from speculator.bench.pairs import pair_config
from speculator.bench.player import EnginePlayer
from speculator.bench.rounds import Plan
from speculator.bench.subject import Subject, engine_sets
from speculator.bench.sweep import Contender
from speculator.config import Config
from speculator.engine import Engine
from speculator.errors import ConfigError
from speculator.heads.base import DraftHead
from speculator.heads.formats import read_head
from speculator.heads.load import build_head, load_head
from speculator.heads.reading import TargetFacts
from speculator.load import build_engine
from speculator.recorded import RecordedPasses
from target.decoder import Decoder

MTP = "mtp"  # the modules inside the target's own folder


def contenders(args: argparse.Namespace, subject: Subject, bench: Bench, plan: Plan) -> Heads | OneHead:
    """The heads that the arguments name; `bench` has the first of them, on an engine made for `plan`.

    ConfigError where there can be but one.
    """
    settings = subject.settings
    if len(args.heads) < 2 and not args.modules:
        return OneHead(settings.head, settings.method, subject.hashes["head"], bench)
    if args.synthetic or not isinstance(subject.player, EnginePlayer):
        raise ConfigError("Several heads or --modules need a target that is loaded here: give --target.")
    engine, config = subject.player.engine, pair_config(args, settings.batch, engine_sets(args, plan))

    def another(one: Engine) -> Bench:
        return bench if one is engine else Bench(one, bench.tokenizer, bench.prompts, bench.wishes, bench.progress)

    return Heads(engine, config, args.heads or [config.model.head], args.modules, another)


class OneHead:
    """The head that a bench has, alone: on an engine in this process or on a server."""

    def __init__(self, path: str, method: str, weights: str, bench: Bench) -> None:
        self.main, self._method, self._bench = names_of([path])[0], method, bench
        self.hashes, self.alone = {self.main: weights}, True

    def __iter__(self) -> Iterator[Contender]:
        yield Contender(self.main, self._method, self._bench)


class Heads:
    """Heads by path, the first of which `engine` runs; of those with several modules the first `modules` each.

    CheckpointError or ConfigError before anything is run when a head cannot be used with this target, or none of them
    has so many modules.
    """

    def __init__(
        self,
        engine: Engine,
        config: Config,
        paths: Sequence[str],
        modules: Sequence[int],
        bench: Callable[[Engine], Bench],
    ) -> None:
        self._engine, self._config, self._paths, self._modules, self._bench = engine, config, paths, modules, bench
        self._names = names_of(paths)
        self._target = Path(config.model.target)
        self._has = [_modules_of(folder_of(path, self._target), engine.model) for path in paths]
        if modules and not 1 <= min(modules) <= max(modules) <= max(self._has):
            raise ConfigError(f"--modules must lie between 1 and {max(self._has)}, the modules of these heads.")

    @property
    def alone(self) -> bool:
        """Whether there is nothing to sweep over."""
        return len(self._paths) == 1 and not self._modules

    @property
    def hashes(self) -> dict[str, str]:
        """Fingerprints of the weights by the names of their contenders."""
        found = [model_hash(folder_of(path, self._target)) for path in self._paths]
        return {self._name(i, n): text for i, text in enumerate(found) for n in self._counts(i)}

    @property
    def main(self) -> str:
        """The name of the first head with all of its modules."""
        return self._name(0, self._has[0])

    def __iter__(self) -> Iterator[Contender]:
        """One after the other; what one of them held is given back when the next is asked for."""
        for i in range(len(self._paths)):
            head = self._head(i)
            for count in self._counts(i):
                engine = self._with(head, count, i == 0 and count == self._has[0])
                yield Contender(self._name(i, count), head.record.kind, self._bench(engine))
                _give_back(engine)

    def _counts(self, index: int) -> list[int]:
        """How many modules of a head play: all of them, or each number that was asked for and is there."""
        has = self._has[index]
        return list(dict.fromkeys(min(count, has) for count in self._modules)) or [has]

    def _name(self, index: int, count: int) -> str:
        has, name = self._has[index], self._names[index]
        if has == 1:
            return name
        return f"{name}, {count} of {has} modules" if count < has else f"{name}, {count} modules"

    def _head(self, index: int) -> DraftHead:
        target = self._engine.model
        if index == 0:
            assert self._engine.head is not None
            return self._engine.head
        weight = target.embed.weight
        return load_head(folder_of(self._paths[index], self._target), target, weight.dtype, weight.device)

    def _with(self, head: DraftHead, count: int, is_first: bool) -> Engine:
        if is_first:
            return self._engine
        few = head if count == head.record.modules else first_modules(head, self._engine.model, count)
        return build_engine(self._config, self._engine.device, lambda: (self._engine.model, few))


def first_modules(head: DraftHead, target: Decoder, count: int) -> DraftHead:
    """The first `count` modules of an MTP head, on the same weights; the last of them feeds itself."""
    with torch.device("meta"):
        few = build_head(replace(head.record, modules=count), target)
    wanted = few.state_dict().keys()
    few.load_state_dict({k: w for k, w in head.state_dict().items() if k in wanted}, assign=True)
    buffers = dict(head.named_buffers())
    for name in [name for name, buffer in few.named_buffers() if buffer.is_meta]:
        owner, _, leaf = name.rpartition(".")
        setattr(few.get_submodule(owner), leaf, buffers[name])  # what no file holds
    return few.requires_grad_(False).eval()


def names_of(paths: Sequence[str]) -> list[str]:
    """The last parts of paths, as many as tell them apart; ConfigError for the same path twice."""
    parts = [tuple(part for part in path.rstrip("/").split("/") if part) for path in paths]
    if len(set(parts)) < len(parts):
        raise ConfigError(f"--head names the same head twice: {', '.join(paths)}.")
    length = 1
    while len({part[-length:] for part in parts}) < len(parts):
        length += 1
    return ["/".join(part[-length:]) or path for part, path in zip(parts, paths, strict=True)]


def folder_of(path: str, target: Path) -> Path:
    return target if path == MTP else Path(path)


def _modules_of(folder: Path, target: Decoder) -> int:
    return read_head(folder, TargetFacts.of(target.config)).record.modules


def _give_back(engine: Engine) -> None:
    if isinstance(engine.passes, RecordedPasses):
        engine.passes.close()
