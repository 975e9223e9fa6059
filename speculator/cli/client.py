"""`speculator client`: a running server seen from the command line.

Owns: the flags that reach a server and how its answers are shown. Must never import torch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from speculator.errors import InvalidArgumentError

if TYPE_CHECKING:
    from speculator.client import Client

client = typer.Typer(
    help="Ask a running server. Every command takes --server, and --json prints machine-readable answers.",
    no_args_is_help=True,
)

Server = Annotated[str, typer.Option("--server", "-s", metavar="HOST:PORT", help="Where the server listens.")]
Ca = Annotated[str, typer.Option("--ca", help="PEM file of the CA to trust; switches TLS on.")]
Cert = Annotated[str, typer.Option("--cert", help="PEM file of the client's certificate, with --key.")]
Key = Annotated[str, typer.Option("--key", help="PEM file of the client's key.")]
TokenFile = Annotated[Path | None, typer.Option("--token-file", help="File whose first line is the bearer token.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
LOCAL = "127.0.0.1:50051"


def whole_text(text: str | None) -> str | None:
    """An argument as it was typed; InvalidArgumentError where its bytes were no UTF-8."""
    broken = [place for place, letter in enumerate(text or "") if "\ud800" <= letter <= "\udfff"]
    if text and broken:
        before, byte = text[: broken[0]].encode("utf-8"), ord(text[broken[0]]) & 0xFF
        raise InvalidArgumentError(f"the prompt is not UTF-8 text: byte {len(before)} is 0x{byte:02x}")
    return text


REACH_SECONDS = 5.0


def connect(server: str, ca: str = "", cert: str = "", key: str = "", token_file: Path | None = None) -> Client:
    """A client of the server that the flags name, which must be there within REACH_SECONDS."""
    from speculator.client import Client, Tls, read_token

    tls = Tls(ca, cert, key) if ca or cert or key else None
    made = Client(server, tls=tls, token=read_token(token_file) if token_file else "", patience=REACH_SECONDS)
    made.wait_ready(REACH_SECONDS)
    return made


@client.command()
def info(
    server: Server = LOCAL,
    ca: Ca = "",
    cert: Cert = "",
    key: Key = "",
    token_file: TokenFile = None,
    as_json: Json = False,
) -> None:
    """Which models a server runs and within which limits."""
    with connect(server, ca, cert, key, token_file) as made:
        show(made.server_info(), as_json)


@client.command()
def stats(
    server: Server = LOCAL,
    ca: Ca = "",
    cert: Cert = "",
    key: Key = "",
    token_file: TokenFile = None,
    as_json: Json = False,
) -> None:
    """Acceptance since the server's start, and what it holds now."""
    with connect(server, ca, cert, key, token_file) as made:
        found = made.stats()
        show(found, as_json, {"accept length": found.stats.accept_length, "acceptance by position": found.stats.rates})


@client.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="Text that the server continues.", callback=whole_text)],
    server: Server = LOCAL,
    ca: Ca = "",
    cert: Cert = "",
    key: Key = "",
    token_file: TokenFile = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, help="Longest answer in tokens.")
    ] = 256,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="0 is greedy; default: the server's.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**64 - 1, help="The same seed gives the same text.")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="The target alone, without drafts.")] = False,
) -> None:
    """Let the server run the loop, and stream the text.

    \b
    Example:
      speculator client generate "Once upon a time" --server 127.0.0.1:50051 -n 64
    """
    from speculator.client import Sampling, Stopping

    sampling, stopping = Sampling(temperature=temperature, seed=seed), Stopping(max_new_tokens=max_new_tokens)
    with connect(server, ca, cert, key, token_file) as made:
        for chunk in made.generate(prompt, sampling=sampling, stopping=stopping, speculate=not plain):
            sys.stdout.write(chunk.text)
            sys.stdout.flush()
    print()


@client.command()
def propose(
    prompt: Annotated[
        str, typer.Argument(help="Text, or token ids separated by commas with --ids.", callback=whole_text)
    ],
    server: Server = LOCAL,
    ca: Ca = "",
    cert: Cert = "",
    key: Key = "",
    token_file: TokenFile = None,
    ids: Annotated[bool, typer.Option("--ids", help="The prompt is token ids.")] = False,
    depth: Annotated[int | None, typer.Option(min=0, help="Levels of drafted tokens.")] = None,
    branching: Annotated[int | None, typer.Option(min=1, help="1 drafts a chain, k > 1 a tree.")] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Drafted nodes of a tree.")] = None,
    as_json: Json = False,
) -> None:
    """Draft once below a prompt, and show the draft.

    \b
    Example:
      speculator client propose --ids 5,17,256 --depth 4
    """
    from speculator.client import Shape

    asked = token_ids(prompt) if ids else prompt
    with connect(server, ca, cert, key, token_file) as made, made.session(asked) as session:
        draft = session.propose(Shape(depth, nodes, branching)).draft
        table = {
            "committed": session.tokens,
            "tokens": draft.tokens,
            "parents": draft.parents,
            "logprobs": draft.logprobs,
        }
    show(table, as_json)


def token_ids(text: str) -> list[int]:
    """Numbers between commas; BadParameter for anything else."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"token ids are numbers between commas, as in 5,17,256, not {text!r}") from None


# ---- showing


def show(value: Any, as_json: bool, more: dict[str, Any] | None = None) -> None:
    """A record as a table of its fields, or as JSON."""
    table = {**flat(value), **(more or {})}
    if as_json:
        print(json.dumps(table))
        return
    width = max(len(name) for name in table)
    for name, field in table.items():
        print(f"{name:<{width}}  {_text(field)}")


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """The fields of nested records by readable name."""
    table: dict[str, Any] = {}
    for name, field in _fields(value).items():
        title = f"{prefix}{name}".replace("_", " ")
        if _fields(field) and not isinstance(field, dict):
            table.update(flat(field, f"{title} "))
        else:
            table[title] = field.value if isinstance(field, Enum) else field
    return table


def _fields(value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    named = isinstance(value, tuple) and type(value) is not tuple
    return dict(value._asdict()) if named else {}


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " ".join(_text(part) for part in value) or "-"
    return "-" if value in (None, "") else str(value)
