"""What the commands do once their flags are read.

Owns: the order of loading, serving and showing. Must never be imported before a command runs: rich and grpc come with
it, torch with the first model.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console

from speculator import __version__
from speculator.cli.client import connect
from speculator.cli.models import Flags, configure, load_engine, load_policy, load_tokenizer, progress
from speculator.cli.paint import Painter, Speech
from speculator.client import Sampling, Stats, Stopping
from speculator.client.wire import tallied
from speculator.config import Config, ModelConfig
from speculator.errors import CheckpointError, ConfigError, InvalidArgumentError
from speculator.types import FinishReason, SamplingParams, StoppingParams

if TYPE_CHECKING:
    from speculator.engine import Engine
    from speculator.server import Server
    from speculator.tokenizer import FolderTokenizer
    from speculator.translate import About
    from speculator.types import DraftShape
    from speculator.watch import AcceptanceWatch

ONE_SESSION = "engine.max_sessions=1"


# ---- serve


def run_server(flags: Flags) -> None:
    """Load, listen, and drain when told to go."""
    from speculator.ranks.launch import Place
    from speculator.server import check_listening
    from speculator.watch import watch_of

    config = configure(flags)
    limits = config.server
    watch = watch_of(limits.acceptance_baseline, limits.acceptance_alarm_rounds)
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING  # ranks do the same: one speaks
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    place = Place.of(os.environ, config.parallel.ranks)
    if place is None or place.rank == 0:  # the one that will listen
        check_listening(limits)
    if config.parallel.ranks > 1:
        _run_ranks(config, watch)
    else:
        _serve(config, load_engine(config), watch)


def _run_ranks(config: Config, watch: AcceptanceWatch | None) -> None:
    """One process of several: rank 0 serves, the others run what it tells."""
    from speculator.load import load_engine as load_models
    from speculator.ranks.process import Process

    with Process(config) as process:
        with progress("loading") as tick:
            engine = load_models(config, process.noting(tick), process.team)
        if process.rank:
            process.follow(engine)
        else:
            _serve(config, engine, watch, lambda: process.lead(engine))


def _serve(
    config: Config, engine: Engine, watch: AcceptanceWatch | None, serving: Callable[[], None] = lambda: None
) -> None:
    """Serve until told to go; `serving` is called once the port is open."""
    from speculator.core import DrafterCore
    from speculator.server import new_loop, serve

    limits = config.server
    tokenizer = load_tokenizer(config)
    about = _about(config, engine, tokenizer)
    policy = load_policy(config, engine)

    def ready(server: Server) -> None:
        serving()
        _announce(server, config, engine)

    async def run() -> None:
        idle, queued = limits.session_idle_timeout_s, limits.max_queued_steps
        core = DrafterCore(engine, max_queued=queued, idle_timeout=idle, watch=watch, policy=policy)
        await serve(core, config, about=about, tokenizer=tokenizer, ready=ready)

    with asyncio.Runner(loop_factory=lambda: new_loop(config.server)) as runner:
        runner.run(run())


def _about(config: Config, engine: Engine, tokenizer: FolderTokenizer | None) -> About:
    import uuid

    from speculator.load import fingerprint, head_folder
    from speculator.translate import About

    return About(
        version=__version__,
        model=engine.info.target_model,
        instance_id=str(uuid.uuid4()),
        target_revision=fingerprint(Path(config.model.target)),
        draft_revision=fingerprint(head_folder(config)) if config.model.head else "",
        tokenizer_sha256=tokenizer.sha256 if tokenizer else "",
    )


def _announce(server: Server, config: Config, engine: Engine) -> None:
    """One line that scripts can wait for, then what is served."""
    info = engine.info
    host = f"[{config.server.host}]" if ":" in config.server.host else config.server.host
    print(f"speculator {__version__} listening on {host}:{server.port}", flush=True)
    rows = {
        "target": f"{info.target_model} ({config.model.target}) on {engine.device}",
        "head": f"{info.draft_model} ({info.draft_method})" if info.draft_model else "none: nothing is drafted",
        "limits": f"{info.max_rows} sessions of {info.max_context} tokens; {info.total_pages - 1} pages of "
        f"{info.page_size} tokens",
        "draft": _shape(info.default_shape),
        "security": _security(config),
        "metrics": f"http://{host}:{server.metrics_port}/metrics" if server.metrics_port else "off",
    }
    for name, text in rows.items():
        print(f"  {name:<9}{text}")
    if engine.head:
        print(
            "  record   "
            + ", ".join(f"{f.name}={getattr(engine.head.record, f.name)}" for f in fields(engine.head.record))
        )
    sys.stdout.flush()


def _shape(shape: DraftShape) -> str:
    if not shape.depth:
        return "nothing, unless a client asks for it"
    if shape.is_chain:
        return f"chains of {shape.depth}"
    return f"dynamic trees of {shape.nodes} nodes, {shape.depth} levels, top-{shape.branching}"


def _security(config: Config) -> str:
    parts = ["TLS" if config.server.tls else "plain text"]
    parts += ["client certificates"] if config.server.tls_client_ca else []
    parts += ["bearer tokens"] if config.server.token_file else []
    return ", ".join(parts)


# ---- generate


class Ask(NamedTuple):
    """What `generate` was asked."""

    prompt: str
    raw: bool
    plain: bool
    new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    stats: bool

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, top_k=self.top_k, top_p=self.top_p, seed=self.seed)


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt from the command line, a file or stdin; ConfigError when there is none or more than one."""
    if prompt is not None and file is not None:
        raise ConfigError("The prompt is given twice: as an argument and by --file.")
    if prompt is None and file is None and sys.stdin.isatty():
        raise ConfigError("No prompt: give it as an argument, by --file, or on stdin.")
    text = prompt if prompt is not None else _read_text(file)
    if not text.strip():
        raise ConfigError("The prompt is empty.")
    return text


def _read_text(file: Path | None) -> str:
    name = str(file) if file else "stdin"
    data = file.read_bytes() if file else sys.stdin.buffer.read()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(
            f"{name} is not UTF-8 text: byte {error.start} is 0x{data[error.start]:02x}"
        ) from None


def run_generate(ask: Ask, flags: Flags, server: str | None) -> None:
    """Stream one answer, from a server or from models loaded here."""
    painter = Painter(Console(highlight=False, soft_wrap=True), marks=False)
    found, seconds = _from_server(ask, flags, server, painter) if server else _from_models(ask, flags, painter)
    painter.end()
    if ask.stats:
        rates = " ".join(f"{rate:.2f}" for rate in found.rates)
        pace = found.output_tokens / seconds
        text = f"{found.output_tokens} tokens, {pace:.0f} a second, accept length {found.accept_length:.2f}"
        print(f"{text}, by position {rates}" if rates else text, file=sys.stderr)


def _from_server(ask: Ask, flags: Flags, server: str, painter: Painter) -> tuple[Stats, float]:
    from speculator.cli.paint import Piece

    tokenizer = _chat_tokenizer(flags)
    prompt = tokenizer.encode_chat(ask.prompt) if tokenizer and not ask.raw else ask.prompt
    stopping, found = Stopping(max_new_tokens=ask.new_tokens), Stats()
    with connect(server) as client:
        start = time.perf_counter()
        speech = Speech(tokenizer) if tokenizer and not isinstance(prompt, str) else None
        for chunk in client.generate(prompt, sampling=ask.sampling, stopping=stopping, speculate=not ask.plain):
            found = chunk.stats or found
            last = chunk.finish is not FinishReason.RUNNING
            pieces = speech.say(chunk.tokens, chunk.accepted, last) if speech else [Piece(chunk.text, False)]
            for piece in pieces:
                painter.paint(piece)
    return found, time.perf_counter() - start


def _chat_tokenizer(flags: Flags) -> FolderTokenizer | None:
    return load_tokenizer(Config(model=ModelConfig(target=flags.target))) if flags.target else None


def _from_models(ask: Ask, flags: Flags, painter: Painter) -> tuple[Stats, float]:
    config = configure(flags, ONE_SESSION)
    tokenizer = _needed_tokenizer(config)
    prompt = tokenizer.encode(ask.prompt) if ask.raw else tokenizer.encode_chat(ask.prompt)
    return asyncio.run(_from_core(ask, load_engine(config), tokenizer, prompt, painter))


async def _from_core(
    ask: Ask, engine: Engine, tokenizer: FolderTokenizer, prompt: Sequence[int], painter: Painter
) -> tuple[Stats, float]:
    from speculator.core import DrafterCore
    from speculator.session import SessionSpec

    sampling = SamplingParams(ask.temperature, ask.top_k, ask.top_p, seed=ask.seed)
    stopping = StoppingParams(ask.new_tokens)
    spec = SessionSpec("", "", tuple(prompt), sampling, stopping, speculate=not ask.plain)
    core, speech, found = DrafterCore(engine), Speech(tokenizer), Stats()
    await core.start()
    start = time.perf_counter()
    try:
        async for step in core.generate(spec):
            last = step.finish is not FinishReason.RUNNING
            found = tallied(step.session.stats) if last and step.session else found
            for piece in speech.say(step.tokens, step.accepted, last):
                painter.paint(piece)
    finally:
        await core.stop()
    return found, time.perf_counter() - start


def _needed_tokenizer(config: Config) -> FolderTokenizer:
    tokenizer = load_tokenizer(config)
    if tokenizer is None:
        raise CheckpointError(
            f"{config.model.target} has no tokenizer.json nor tokenizer.model, so text cannot be read"
        )
    return tokenizer


# ---- demo


def run_demo(flags: Flags, new_tokens: int) -> int:
    """Load the pair and run the demonstration."""
    from speculator.demo import plan, show
    from speculator.server import new_loop

    config = configure(flags)
    tokenizer = _needed_tokenizer(config)
    engine = load_engine(config)
    wanted = plan(tokenizer, new_tokens=new_tokens)
    with asyncio.Runner(loop_factory=lambda: new_loop(config.server)) as runner:
        return runner.run(show(engine, tokenizer, config, wanted, Console(highlight=False)))


# ---- inspect


def run_inspect(
    path: Path,
    target: Path | None,
    probe: bool,
    overrides: Sequence[str],
    prompts: Path | None,
    flags: Flags,
    check: bool,
) -> None:
    """Report on a folder; with `probe` measure what its file leaves open."""
    from speculator.inspect import inspect_folder, self_check

    if not path.is_dir():
        raise ConfigError(f"{path} is no folder; give the folder that holds config.json and the weights.")
    if probe and target is None:
        raise ConfigError("--probe measures a head on its target: give --target as well.")
    given = dict(_pair(text) for text in overrides)
    print(inspect_folder(path, target, given))
    if check:
        print(self_check())
    if probe and target is not None:
        _probe(path, target, given, prompts, flags)


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise ConfigError(f'An override is written field=value, not "{text}".')
    return name, value


def _probe(path: Path, target: Path, overrides: dict[str, str], prompts: Path | None, flags: Flags) -> None:
    from speculator.demo import PROMPTS
    from speculator.inspect import probe
    from speculator.load import load_target, resolve_device

    config = configure(Flags(target=str(target), device=flags.device, dtype=flags.dtype))
    tokenizer = _needed_tokenizer(config)
    texts = _read_text(prompts).splitlines() if prompts else PROMPTS
    ids = [tokenizer.encode_chat(text) for text in texts if text.strip()]
    if not ids:
        raise ConfigError(f"{prompts} holds no prompt.")
    with progress("loading") as tick:
        model = load_target(config, resolve_device(config.model.device), tick)
    with Console(stderr=True).status("measuring") as status:
        report = probe(model, path, ids, overrides=overrides, progress=lambda text: status.update(f"measuring {text}"))
    print(report.text())


# ---- train


def run_train(recipe: str, stages: Sequence[str], options: Sequence[str]) -> int:
    """Run the stages of a recipe; a bar counts them where there is more than one."""
    from speculator.train.__main__ import main
    from speculator.train.stages import HEADS, STAGES

    names = list(STAGES) if list(stages) == ["all"] else list(stages)
    known = (*STAGES, *HEADS)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(f"There is no stage {unknown[0]!r}; known: all, {', '.join(known)}.")
    with progress("training") as tick:
        for done, name in enumerate(names):
            tick("stages", done, len(names))
            code = main([recipe, *options, "--stage", name])
            if code:
                return code
    return 0
