"""The commands: `speculator serve | demo | generate | client | inspect | bench | train | invariant`.

Owns: flags, help texts, and what a user reads when something is wrong: one sentence and an exit code. Must never
import torch, grpc or a model library before a command needs it.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from speculator.errors import CheckpointError, ConfigError, InvalidArgumentError, SpeculatorError

try:
    import typer
    from typer import Exit, TyperException
except ImportError:  # the base install is the client library alone
    sys.exit("speculator: the commands need more packages: pip install 'speculator[server]'")

from speculator.cli.bench import bench
from speculator.cli.client import client, whole_text
from speculator.cli.models import Flags

WRONG_INPUT, FAILED, INTERRUPTED = 2, 1, 130

app = typer.Typer(
    name="speculator",
    help="Lossless draft tokens for large language models: a target and its draft head in one process, over gRPC.",
    epilog="Try it: speculator demo",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
app.add_typer(client, name="client")
app.add_typer(bench, name="bench")

ConfigFile = Annotated[Path | None, typer.Option("--config", "-c", help="TOML file; flags win over it.")]
BundledPair = Annotated[str | None, typer.Option("--pair", help="Name of a bundled pair. Default: the first one.")]
Target = Annotated[str | None, typer.Option(help="Folder of the target model. Default: that of a bundled pair.")]
Head = Annotated[str | None, typer.Option(help="Folder of the draft head, made for that target.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")]
Depth = Annotated[int | None, typer.Option(help="Levels of drafted tokens, 0 to 16.")]
Branching = Annotated[int | None, typer.Option(help="1 drafts a chain, k > 1 a dynamic tree with top-k k.")]
Nodes = Annotated[int | None, typer.Option(help="Drafted nodes of a dynamic tree, at most 63.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads of one pass; 0 is torch's own choice.")]
Graphs = Annotated[str | None, typer.Option(help="Recorded passes: auto, off, split, piecewise or round.")]
Policy = Annotated[
    str | None, typer.Option(help="auto: as deep as pays off, by measured costs; off: always the draft's own shape.")
]
Invariant = Annotated[
    bool, typer.Option("--invariant", help="The same tokens whatever head, draft or batch they came by; slower.")
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Any key of the configuration; repeatable."),
]


def _version(wanted: bool) -> None:
    if wanted:
        from speculator import __version__

        typer.echo(__version__)
        raise Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    return None


@app.command()
def serve(
    config: ConfigFile = None,
    pair: BundledPair = None,
    target: Target = None,
    head: Head = None,
    device: Device = None,
    dtype: Dtype = None,
    depth: Depth = None,
    branching: Branching = None,
    nodes: Nodes = None,
    threads: Threads = None,
    graphs: Graphs = None,
    policy: Policy = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; another than loopback needs TLS.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Accept plain text on an open address.")] = False,
    tensor_parallel: Annotated[
        int | None, typer.Option("--tensor-parallel", help="Ranks that share the target, one device each.")
    ] = None,
    head_parallel: Annotated[
        str | None, typer.Option("--head-parallel", help="Where ranks share: replicate or shard the draft head.")
    ] = None,
    attention_data_parallel: Annotated[
        bool,
        typer.Option("--attention-data-parallel", help="Ranks share only experts; each has sessions of its own."),
    ] = False,
    pipeline_parallel: Annotated[
        int | None, typer.Option("--pipeline-parallel", help="Stages that share the target's layers.")
    ] = None,
    invariant: Invariant = False,
    sets: Sets = None,
) -> None:
    """Serve drafts and verification over gRPC until SIGTERM or Ctrl-C, then drain.

    \b
    Examples:
      speculator serve                # the bundled pair on 127.0.0.1:50051
      speculator serve --target Llama-3.1-8B --head EAGLE3-LLaMA3.1-8B
      speculator serve --config my.toml --set engine.max_sessions=8
      speculator serve --host 0.0.0.0 --config tls.toml
    """
    from speculator.cli.run import run_server

    flags = (config, target, head, device, dtype, depth, branching, nodes, threads, graphs)
    ranks = (tensor_parallel, head_parallel, attention_data_parallel or None, pipeline_parallel)
    run_server(Flags(*flags, host, port, insecure or None, sets or (), pair, policy, invariant or None, *ranks))


@app.command()
def generate(
    prompt: Annotated[
        str | None,
        typer.Argument(help="The prompt; without one it is read from --file or stdin.", callback=whole_text),
    ] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Read the prompt from a file.")] = None,
    server: Annotated[
        str | None, typer.Option(help="HOST:PORT of a running server; default: load the models here.")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="The target alone, without drafts.")] = False,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, help="Longest answer in tokens.")
    ] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus sampling; 1 is off.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample among the k best; 0 is off.")] = 0,
    seed: Annotated[
        int, typer.Option(min=0, max=2**64 - 1, help="The same seed gives the same text, with or without drafts.")
    ] = 0,
    stats: Annotated[bool, typer.Option("--stats", help="Print acceptance to stderr at the end.")] = False,
    config: ConfigFile = None,
    pair: BundledPair = None,
    target: Target = None,
    head: Head = None,
    device: Device = None,
    dtype: Dtype = None,
    depth: Depth = None,
    branching: Branching = None,
    nodes: Nodes = None,
    threads: Threads = None,
    graphs: Graphs = None,
    invariant: Invariant = False,
    sets: Sets = None,
) -> None:
    """Write an answer to a prompt, streamed to stdout.

    With --server the server's tokenizer reads the prompt as it is; give --target for the chat template of that folder.
    For a server with TLS or tokens there is `speculator client generate`.

    \b
    Examples:
      speculator generate "Why is the sky blue?"
      speculator generate --file notes.txt --raw -n 64 --temperature 0.8 --seed 7
      cat prompt.txt | speculator generate --server 127.0.0.1:50051
    """
    from speculator.cli.run import Ask, read_prompt, run_generate

    ask = Ask(read_prompt(prompt, file), raw, plain, max_new_tokens, temperature, top_p, top_k, seed, stats)
    shape = (depth, branching, nodes)
    models = (config, target, head, device, dtype, *shape, threads, graphs)
    flags = Flags(*models, sets=sets or (), pair=pair, invariant=invariant or None)
    run_generate(ask, flags, server)


@app.command()
def demo(
    new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Longest answer in tokens.")] = 96,
    config: ConfigFile = None,
    pair: BundledPair = None,
    target: Target = None,
    head: Head = None,
    device: Device = None,
    dtype: Dtype = None,
    depth: Depth = None,
    branching: Branching = None,
    nodes: Nodes = None,
    threads: Threads = None,
    graphs: Graphs = None,
    invariant: Invariant = False,
    sets: Sets = None,
) -> None:
    """Draft and verify a handful of prompts over gRPC, in colour, and check every text against plain decoding.

    Exits with 1 when a text differs.

    \b
    Examples:
      speculator demo
      speculator demo --pair nano-en
      speculator demo --depth 7 --branching 10 --nodes 59
    """
    from speculator.cli.run import run_demo

    shape = (depth, branching, nodes)
    models = (config, target, head, device, dtype, *shape, threads, graphs)
    flags = Flags(*models, sets=sets or (), pair=pair, invariant=invariant or None)
    raise Exit(run_demo(flags, new_tokens))


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="Folder of a target or of a draft head.")],
    target: Annotated[
        Path | None, typer.Option(help="Folder of the target that the head is for; checks that they fit.")
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Measure acceptance over what the file leaves open (needs --target).")
    ] = False,
    override: Annotated[
        list[str] | None,
        typer.Option("--override", metavar="FIELD=VALUE", help="Read a field of the head's record so; repeatable."),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="File with one prompt a line for --probe; default: built-in ones.")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    self_check: Annotated[
        bool, typer.Option("--self-check", hidden=True, help="Also prove the probe on exact heads.")
    ] = False,
) -> None:
    """Say what a model folder holds, and what was chosen where its format is ambiguous.

    \b
    Examples:
      speculator inspect EAGLE3-LLaMA3.1-8B --target Llama-3.1-8B
      speculator inspect my-head --target my-target --probe
    """
    from speculator.cli.run import run_inspect

    run_inspect(path, target, probe, override or [], prompts, Flags(device=device, dtype=dtype), self_check)


@app.command()
def train(
    stages: Annotated[
        list[str],
        typer.Argument(
            help="all, or some of: tokenizer, tokens, target, refine, answers, head (or its kind: eagle3, mtp), "
            "evaluate, card."
        ),
    ],
    data: Annotated[Path, typer.Option(help="Folder of *.jsonl.gz corpora.")],
    out: Annotated[Path, typer.Option(help="Folder for models and results.")],
    recipe: Annotated[str, typer.Option(help="A TOML file, or the name of a recipe that comes along.")] = "nano-en",
    prompts: Annotated[
        Path | None, typer.Option(help="Folder with mt_bench.jsonl, gsm8k.jsonl, humaneval.jsonl.")
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder for what may be thrown away; default: OUT.cache.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: a GPU when there is one.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that tokenize.")] = 1,
    pace: Annotated[float, typer.Option(min=0.0, help="Multiplies every time budget of the recipe.")] = 1.0,
    force: Annotated[bool, typer.Option("--force", help="Run stages again whose results are there.")] = False,
) -> None:
    """Train a tokenizer, a target and its draft head on the target's own answers, stage by stage.

    A stage whose result is there is skipped.

    \b
    Examples:
      speculator train all --data corpora --out runs/nano-moe --recipe nano-moe
      speculator train target --data corpora --out runs/nano-en
      speculator train eagle3 --data corpora --out runs/nano-en --force
      speculator train all --data corpora --out runs/toy --recipe toy --device cpu
    """
    from speculator.cli.run import run_train

    given = {"data": data, "out": out, "prompts": prompts, "cache": cache, "device": device}
    options = [part for name, value in given.items() if value is not None for part in (f"--{name}", str(value))]
    options += ["--workers", str(workers), "--pace", str(pace), *(["--force"] if force else [])]
    raise Exit(run_train(recipe, stages, options))


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def invariant(context: typer.Context) -> None:
    """Certify that no head, draft, batch or prompt chunk changes a committed token; `--help` lists the options."""
    from speculator.invariant import main as certify

    raise Exit(certify(context.args))


# ---- what goes wrong


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script: 0, 1 when the command failed, 2 when its input was wrong. --debug shows the traceback."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    code = _guarded([word for word in given if word != "--debug"], debug)
    _flush()
    sys.exit(code)


def _guarded(arguments: list[str], debug: bool) -> int:
    try:
        result = app(arguments, prog_name="speculator", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        return FAILED
    except Exception as error:
        if debug:
            traceback.print_exc()
        code, sentence = explain(error)
        if sentence:
            print(f"speculator: {sentence}", file=sys.stderr)
        return code


def explain(error: Exception) -> tuple[int, str]:
    """Exit code and sentence for what went wrong; of several things at once, for the first."""
    from target.errors import CheckpointError as TargetCheckpointError

    if isinstance(error, ExceptionGroup):
        return explain(error.exceptions[0])
    if isinstance(error, TyperException):
        return error.exit_code, error.format_message()
    if isinstance(error, (ConfigError, CheckpointError, InvalidArgumentError)):
        return WRONG_INPUT, error.message
    if isinstance(error, (TargetCheckpointError, UnicodeError)):
        return WRONG_INPUT, str(error)
    if isinstance(error, SpeculatorError):
        return FAILED, error.message
    if isinstance(error, OSError) and error.filename is not None:
        return WRONG_INPUT, f"{error.filename}: {error.strerror}"
    return FAILED, f"{type(error).__name__}: {error} (run again with --debug to see where)"


def _flush() -> None:
    """Writes what is still buffered; a reader that has gone is no reason for a traceback."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        sys.stdout = None  # the interpreter would try again at exit
