"""From flags to a configuration, and from a configuration to a loaded engine with a progress bar.

Owns: how command-line flags override the TOML file, and what stands in for a model that was not named. Must never
import torch before a model is loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speculator.bundled import find_pair
from speculator.config import Config, load
from speculator.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from speculator.engine import Engine
    from speculator.policy import DepthPolicy
    from speculator.tokenizer import FolderTokenizer

KEYS = {
    "target": "model.target",
    "head": "model.head",
    "device": "model.device",
    "dtype": "model.dtype",
    "depth": "draft.depth",
    "branching": "draft.branching",
    "nodes": "draft.nodes",
    "threads": "engine.threads",
    "graphs": "graphs.mode",
    "policy": "policy.mode",
    "host": "server.host",
    "port": "server.port",
    "insecure": "server.insecure",
    "invariant": "engine.invariant",
    "tensor_parallel": "parallel.tensor",
    "pipeline_parallel": "parallel.pipeline",
    "head_parallel": "parallel.head",
    "attention_data_parallel": "parallel.attention_data",
}


@dataclass(frozen=True)
class Flags:
    """The flags of a command that loads models; None was not given. `sets` are section.key=value, `pair` is a name."""

    config: Path | None = None
    target: str | None = None
    head: str | None = None
    device: str | None = None
    dtype: str | None = None
    depth: int | None = None
    branching: int | None = None
    nodes: int | None = None
    threads: int | None = None
    graphs: str | None = None
    host: str | None = None
    port: int | None = None
    insecure: bool | None = None
    sets: Sequence[str] = ()
    pair: str | None = None
    policy: str | None = None
    invariant: bool | None = None
    tensor_parallel: int | None = None
    head_parallel: str | None = None
    attention_data_parallel: bool | None = None
    pipeline_parallel: int | None = None

    @property
    def overrides(self) -> list[str]:
        """Dotted overrides; a flag of its own wins over --set."""
        given = [(field.name, getattr(self, field.name)) for field in fields(self) if field.name in KEYS]
        return [*self.sets, *(f"{KEYS[name]}={_text(value)}" for name, value in given if value is not None)]


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def configure(flags: Flags, *more: str) -> Config:
    """The configuration that flags and file come to; a bundled pair where neither names a target."""
    config = load(flags.config, [*flags.overrides, *more])
    named = config.model.target or config.model.head
    if flags.pair and named:
        raise ConfigError(f"--pair {flags.pair} names target and head, but {named} is named too: give one of them.")
    if config.model.target:
        return config
    if named:
        raise ConfigError("A head is named but no target: give --target as well.")
    pair = find_pair(flags.pair)
    return load(flags.config, [f"model.target={pair.target}", f"model.head={pair.head}", *flags.overrides, *more])


def load_engine(config: Config) -> Engine:
    """Target and head with a progress bar on stderr."""
    with progress("loading") as tick:
        from speculator.load import load_engine as load_models  # torch comes here

        return load_models(config, tick)


def load_policy(config: Config, engine: Engine) -> DepthPolicy | None:
    """How deep to draft, as the configuration wants it; None: always as deep as it says."""
    from speculator.policy_load import depth_policy

    return depth_policy(config, engine)


def load_tokenizer(config: Config) -> FolderTokenizer | None:
    """The target's tokenizer; None for a folder without one, which can serve token ids all the same."""
    from speculator.tokenizer import has_tokenizer
    from speculator.tokenizer import load_tokenizer as load_folder

    folder = Path(config.model.target)
    return load_folder(folder) if has_tokenizer(folder) else None


@contextmanager
def progress(title: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each thing that is counted, gone when all is done; silent where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    console, together = Console(stderr=True), sys.stdout.isatty()  # what goes to a file is not drawn around the bar
    silent = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=silent, redirect_stdout=together) as bars:
        tasks: dict[str, Any] = {}

        def tick(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(f"{title} {what}", total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield tick
