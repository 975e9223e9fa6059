"""A running server as the subject of the acceptance benchmark: reached, asked who it is, refused when it will not do.

Owns: what a server must have for its rounds to be recorded, one sentence for each thing that it lacks, and which
tokenizer goes with it. Must never play a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from speculator import __version__
from speculator.bundled import find_pairs
from speculator.client import Client, ServerInfo, Tls, read_token
from speculator.client.errors import ConnectionLostError, RemoteError
from speculator.errors import ConfigError
from speculator.tokenizer import FolderTokenizer, fingerprint, load_tokenizer
from speculator.types import DraftShape

REVISION = 2  # of the contract: a step says its whole time on the server
REACH = 5.0  # seconds for the server to be there
STEP = 600.0  # seconds for one step: large targets on a CPU are slow


def reach(address: str, ca: str = "", cert: str = "", key: str = "", token_file: Path | None = None) -> Client:
    """A client of a server that is there; ConfigError when it is not."""
    tls = Tls(ca, cert, key) if ca or cert or key else None
    made = Client(address, tls=tls, token=read_token(token_file) if token_file else "", timeout=STEP)
    try:
        made.wait_ready(REACH)
    except ConnectionLostError as error:
        made.close()
        raise ConfigError(f"{error.message}: start it, or name another with --server.") from None
    return made


def identity(client: Client, address: str) -> ServerInfo:
    """Who serves; ConfigError for whoever listens there and is no speculator server of this version with a head."""
    try:
        info = client.server_info(timeout=REACH)
    except RemoteError as error:
        raise ConfigError(f"{address} is no speculator server: {error.message}.") from None
    _check_version(info, address)
    if info.draft_method == "none":
        raise ConfigError(f"The server at {address} has no draft head, so there is no acceptance to measure.")
    return info


def _check_version(info: ServerInfo, address: str) -> None:
    if _release(info.version) != _release(__version__):
        raise ConfigError(
            f"The server at {address} runs speculator {info.version or '(unknown)'}, this is {__version__}: figures of"
            " one version are not measured by another; use the command of the server's version."
        )
    if info.schema_revision < REVISION:
        raise ConfigError(
            f"The server at {address} speaks revision {info.schema_revision} of the contract, a recording needs"
            f" {REVISION} (times of whole steps): update the server."
        )


def _release(version: str) -> tuple[str, ...]:
    """The part of a version by which behaviour may differ: all but the last of three numbers."""
    return tuple(version.split(".")[:2])


def check_limits(info: ServerInfo, shapes: Sequence[DraftShape], rows: int) -> None:
    """ConfigError for the first wish that is beyond the server's limits."""
    limits = info.limits
    for shape in shapes:
        _at_most(shape.depth, limits.depth, "levels of a draft")
        _at_most(len(shape.parents) or shape.nodes, limits.nodes, "nodes of a draft")
    _at_most(rows, limits.sessions, "sessions at a time (--batch)")


def _at_most(wanted: int, limit: int, what: str) -> None:
    if wanted > limit:
        raise ConfigError(f"{wanted} {what} are asked for, the server takes {limit}.")


def tokenizer_of(info: ServerInfo, folder: Path | None) -> tuple[FolderTokenizer, Path]:
    """The server's tokenizer, from `folder` or a bundled pair; ConfigError when it is another one, or not to be had."""
    if folder is None:
        folder = next((p.target for p in find_pairs() if fingerprint(p.target) == info.tokenizer_sha256), None)
    if folder is None:
        raise ConfigError(
            f"No tokenizer here is that of the server's {info.target_model}: name its model folder with --target."
        )
    made = load_tokenizer(folder)
    if info.tokenizer_sha256 and made.sha256 != info.tokenizer_sha256:
        raise ConfigError(
            f"The tokenizer in {folder} ({made.sha256[:12]}) is not that of the server's {info.target_model}"
            f" ({info.tokenizer_sha256[:12]}): name the folder of the served target with --target."
        )
    return made, folder
