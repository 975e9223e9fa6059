"""The configuration: one frozen tree, parsed once at the edge from a TOML file and dotted overrides.

Owns: every key, its type, its bounds, and the sentence a user reads when one is wrong.
Must never import torch or grpc, look at a model, or be changed after parsing.
"""

from __future__ import annotations

import ipaddress
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from speculator.errors import ConfigError
from speculator.types import MASK_BITS, DraftShape, Rule, SamplingParams

Switch = Literal["auto", "on", "off"]
DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")
UNBOUNDED = float("inf")


def _require(ok: bool, sentence: str) -> None:
    if not ok:
        raise ConfigError(sentence)


def _within(section: object, name: str, **bounds: tuple[float, float]) -> None:
    for key, (low, high) in bounds.items():
        value = getattr(section, key)
        wanted = f"at least {low}" if high == UNBOUNDED else f"between {low} and {high}"
        _require(low <= value <= high, f"{name}.{key} must be {wanted}, not {value}.")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What to load. `head` "" serves without drafting; `head_overrides` replaces fields of the head's record."""

    target: str = ""  # folder of the target, relative to the working directory
    head: str = ""  # folder of the draft head
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: what suits the device
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    served_name: str = ""  # name told to clients; "" is the folder's own name
    head_overrides: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = DEVICE.fullmatch(self.device) is not None
        _require(known, f'model.device must be "auto", "cpu", "cuda" or "cuda:N", not "{self.device}".')


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How the device is shared. Sizes are in tokens unless they say otherwise; 0 lets the engine decide."""

    page_size: int = 0  # tokens of one KV page; 0 is 64 on a GPU, where kernels read whole pages, and 16 on a CPU
    kv_tokens: int = 0  # size of the KV cache over all sessions
    max_sessions: int = 64
    max_context: int = 0  # tokens of one session; 0 is what the target was trained for
    prefill_chunk: int = 512  # longest piece of a prompt in one step
    threads: int = 0  # CPU threads of one pass; 0 is torch's own choice
    memory_share: float = 0.9  # of a GPU that may be in use, other processes included
    invariant: bool = False  # committed tokens are the same whatever head, draft, batch or chunk they came by; slower
    products: Literal["auto", "torch"] = "auto"  # auto: kernels where the table says so, packed on a CPU
    product_table: str = ""  # file of `speculator bench skinny`; "" is the table that comes along

    def __post_init__(self) -> None:
        _within(self, "engine", page_size=(0, 1024), kv_tokens=(0, UNBOUNDED), max_sessions=(1, 4096))
        _require(
            0 < self.memory_share <= 1, f"engine.memory_share must be above 0 and at most 1, not {self.memory_share}."
        )
        _within(self, "engine", max_context=(0, UNBOUNDED), prefill_chunk=(1, UNBOUNDED), threads=(0, 1024))


@dataclass(frozen=True, slots=True)
class ParallelConfig:
    """How many ranks share the target. Without ranks started from outside (torchrun), `serve` starts them itself."""

    tensor: int = 1  # ranks that divide heads, inner columns and the vocabulary of each layer
    attention_data: bool = False  # those ranks divide only routed experts, and each has sessions and a cache of its own
    pipeline: int = 1  # stages that divide the layers, each of so many ranks; the last one has the draft head
    head: Literal["replicate", "shard"] = "replicate"  # the draft head whole on every rank, or divided as the target is
    silent_s: float = 10.0  # a rank without any sign of life for so long ends all
    stalled_s: float = 15.0  # and one that does not go on for so long while it serves: no layer, no collective
    starting_s: float = 60.0  # or while it starts, where each tensor read and each shape recorded goes on

    def __post_init__(self) -> None:
        _within(self, "parallel", tensor=(1, 1024), pipeline=(1, 1024), silent_s=(1, 3600))
        _within(self, "parallel", stalled_s=(1, 86400), starting_s=(1, 86400))
        alone = self.attention_data and self.tensor == 1
        _require(not alone, "parallel.attention_data needs ranks that share experts: set parallel.tensor to 2 or more.")
        staged = self.attention_data and self.pipeline > 1
        _require(not staged, "parallel.attention_data has no stages: set parallel.pipeline to 1.")

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline


@dataclass(frozen=True, slots=True)
class GraphsConfig:
    """Which passes are recorded at start-up and replayed. On a CPU the tape recorder stands in for CUDA graphs."""

    mode: Literal["auto", "off", "split", "piecewise", "round"] = "auto"  # auto: all that can be on a GPU, off on a CPU
    rows: int = 0  # largest batch of rounds that is recorded; 0 is the engine's sessions, 32 at most
    prompt_tokens: int = 1024  # largest prompt chunk that is recorded, over all rows of a step (piecewise, round)
    depths: str = "0"  # shorter chains with rounds of their own, depths between commas; beside trees 0 alone (round)
    every_rule: bool = False  # rounds under rejection, block rule and repetition penalty too; more memory (round)

    def __post_init__(self) -> None:
        _within(self, "graphs", rows=(0, 4096), prompt_tokens=(1, 8192))
        fits = all(depth.isdigit() and int(depth) <= 16 for depth in self._depths)
        _require(fits, f'graphs.depths must be depths from 0 to 16 between commas, as "0,3", not "{self.depths}".')

    @property
    def _depths(self) -> list[str]:
        return [depth.strip() for depth in self.depths.split(",") if depth.strip()]

    @property
    def round_depths(self) -> tuple[int, ...]:
        return tuple(map(int, self._depths))


@dataclass(frozen=True, slots=True)
class DraftConfig:
    """The shape of a draft when a client asks for none; the words are those of `types.DraftShape`."""

    depth: int = 5
    nodes: int = 0
    branching: int = 1

    def __post_init__(self) -> None:
        _within(self, "draft", depth=(0, 16), nodes=(0, 63), branching=(0, 16))
        wide = f"draft.depth {self.depth} with draft.branching {self.branching}"
        limit = f"(depth - 2) * branching must be at most {MASK_BITS}"
        _require(self.shape.scratch <= MASK_BITS, f"{wide} is too wide a tree: {limit}.")

    @property
    def shape(self) -> DraftShape:
        return DraftShape(self.depth, self.nodes, max(1, self.branching))


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    """How deep to draft where a client leaves it open: never deeper than [draft], not at all where that would lose.

    The policy needs to know what rounds cost: `costs` names a JSON file that is read when it is there, else measured
    and written; without a name the costs are measured at every start.
    """

    mode: Literal["auto", "off"] = "auto"  # off: always the shape of [draft]
    measure: Switch = "auto"  # rounds are timed at start-up; auto: on a GPU
    measure_seconds: float = 10.0  # how long that may take, about
    costs: str = ""  # the file

    def __post_init__(self) -> None:
        _within(self, "policy", measure_seconds=(0, 3600))


@dataclass(frozen=True, slots=True)
class SamplingConfig:
    """How the target samples when a client does not say; the words are those of `types.SamplingParams`."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    rule: Rule = Rule.COUPLED

    def __post_init__(self) -> None:
        _within(self, "sampling", temperature=(0, 100), top_k=(0, UNBOUNDED), min_p=(0, 1), seed=(0, 2**64 - 1))
        _require(0 < self.top_p <= 1, f"sampling.top_p must be above 0 and at most 1, not {self.top_p}.")
        penalty = self.repetition_penalty
        _require(0 < penalty < UNBOUNDED, f"sampling.repetition_penalty must be above 0, not {penalty}.")

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(**{item.name: getattr(self, item.name) for item in fields(self)})


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Where and how to listen. Loopback by default; another address needs TLS or an explicit `insecure`."""

    host: str = "127.0.0.1"
    port: int = 50051  # 0 takes a free port
    metrics_port: int = 9464  # Prometheus, same host; 0 is off
    tls_cert: str = ""  # PEM files
    tls_key: str = ""
    tls_client_ca: str = ""  # set: clients must present a certificate signed by it
    token_file: str = ""  # set: one bearer token a line, clients must send one of them
    insecure: bool = False
    max_message_bytes: int = 33554432
    max_queued_steps: int = 1024
    max_streams: int = 1024  # HTTP/2 streams of one connection
    session_idle_timeout_s: float = 600.0
    drain_grace_s: float = 10.0
    reflection: Switch = "auto"  # auto: on for loopback only
    uvloop: Switch = "auto"  # auto: when it is installed
    acceptance_baseline: str = ""  # report whose acceptance is expected; "" learns it from the first rounds
    acceptance_alarm_rounds: float = 1e9  # rounds between false alarms of drift, at least; 0 is off

    def __post_init__(self) -> None:
        _within(self, "server", port=(0, 65535), metrics_port=(0, 65535), max_message_bytes=(1024, 2**31 - 1))
        _within(self, "server", max_queued_steps=(1, UNBOUNDED), max_streams=(1, 2**31 - 1))
        _within(self, "server", session_idle_timeout_s=(0, 10**9), drain_grace_s=(0, 86400))
        _within(self, "server", acceptance_alarm_rounds=(0, UNBOUNDED))
        _require(self.host != "", 'server.host must not be empty; "127.0.0.1" is the default.')
        self._check_security()

    def _check_security(self) -> None:
        pair = bool(self.tls_cert) == bool(self.tls_key)
        _require(pair, "server.tls_cert and server.tls_key go together; set both or neither.")
        _require(not self.tls_client_ca or self.tls, "server.tls_client_ca needs server.tls_cert and server.tls_key.")
        open_address = (
            f"server.host {self.host} is reachable from other machines: set server.tls_cert and server.tls_key"
        )
        _require(
            self.loopback or self.tls or self.insecure, f"{open_address}, or server.insecure = true to accept that."
        )

    @property
    def tls(self) -> bool:
        return bool(self.tls_cert)

    @property
    def loopback(self) -> bool:
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:  # a name; only this one is known not to leave the machine
            return self.host == "localhost"

    @property
    def address(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def serve_reflection(self) -> bool:
        return self.reflection == "on" or (self.reflection == "auto" and self.loopback)


@dataclass(frozen=True, slots=True)
class Config:
    """The whole tree; every section has usable defaults except `model.target`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    graphs: GraphsConfig = field(default_factory=GraphsConfig)
    draft: DraftConfig = field(default_factory=DraftConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    server: ServerConfig = field(default_factory=ServerConfig)

    def __post_init__(self) -> None:
        chains = self.sampling.rule is not Rule.BLOCK or self.draft.branching <= 1
        _require(chains, 'sampling.rule "block" takes chains only: set draft.branching to 1.')


SECTIONS: Mapping[str, type[Any]] = get_type_hints(Config)


def load(path: str | Path | None = None, overrides: Iterable[str] = ()) -> Config:
    """The configuration of a TOML file (None: the defaults) with `section.key=value` overrides on top, later ones win.

    Raises ConfigError for a file that cannot be read, an unknown key, a wrong type or value, or a named file that
    does not exist. Relative paths inside are relative to the working directory, in the file as in an override.
    """
    config = parse({} if path is None else _read(Path(path)), overrides)
    _check_files(config.server)
    return config


def parse(table: Mapping[str, Any], overrides: Iterable[str] = ()) -> Config:
    """The configuration of a table of sections, as `load`, without touching the file system."""
    merged = {name: dict(_section(name, values)) for name, values in table.items()}
    for override in overrides:
        _apply(merged, override)
    return Config(**{name: _build(name, values) for name, values in merged.items()})


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"Cannot read the configuration {path}: {error.strerror}.") from error
    except ValueError as error:  # bad TOML and bad UTF-8 alike
        raise ConfigError(f"The configuration {path} is not valid TOML: {error}.") from error


def _check_files(server: ServerConfig) -> None:
    for key in ("tls_cert", "tls_key", "tls_client_ca", "token_file", "acceptance_baseline"):
        path = getattr(server, key)
        _require(not path or Path(path).is_file(), f"server.{key} names {path}, which is not a file.")


def _section(name: str, values: object) -> Mapping[str, Any]:
    _known(name, SECTIONS, "section", "sections")
    if not isinstance(values, Mapping):
        raise ConfigError(f"{name} must be a section, written [{name}] with keys below it, not {_shown(values)}.")
    return values


def _known(name: str, known: Iterable[str], one: str, many: str) -> None:
    names = sorted(known)
    _require(name in names, f"Unknown {one} {name!r}; known {many}: {', '.join(names)}.")


def _build(name: str, values: Mapping[str, Any]) -> Any:
    hints = get_type_hints(SECTIONS[name])
    for key in values:
        _known(key, hints, f"key in [{name}]:", "keys")
    return SECTIONS[name](**{key: _convert(f"{name}.{key}", value, hints[key]) for key, value in values.items()})


def _apply(table: dict[str, dict[str, Any]], override: str) -> None:
    path, equals, text = override.partition("=")
    section, dot, key = path.strip().partition(".")
    _require(bool(equals and dot and key), f'An override is written section.key=value, not "{override}".')
    values = table.setdefault(section, dict(_section(section, {})))
    key, nested, inner = key.partition(".")
    hints = get_type_hints(SECTIONS[section])
    _known(key, hints, f"key in [{section}]:", "keys")
    if not nested:
        values[key] = _from_text(text.strip(), hints[key])
        return
    _require(_is_table(hints[key]), f"{section}.{key} is a single value; {path.strip()} does not exist.")
    values[key] = {**values.get(key, {}), inner: _from_text(text.strip(), None)}


def _from_text(text: str, wanted: Any) -> Any:
    """The value that `text` means where `wanted` is expected; words need no quotes, and stay words for a text key."""
    if _is_word(wanted) and not text.startswith(("'", '"')):
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _is_word(wanted: Any) -> bool:
    return wanted is str or get_origin(wanted) is Literal or _is_enum(wanted)


def _is_enum(wanted: Any) -> bool:
    return isinstance(wanted, type) and issubclass(wanted, Enum)


def _is_table(wanted: Any) -> bool:
    return get_origin(wanted) is Mapping


def _convert(path: str, value: Any, wanted: Any) -> Any:
    if _is_table(wanted):
        _require(isinstance(value, Mapping), f"{path} must be a table, not {_shown(value)}.")
        return dict(value)
    if get_origin(wanted) is Literal:
        return _choice(path, value, get_args(wanted))
    if _is_enum(wanted):
        return wanted(_choice(path, value, [member.value for member in wanted]))
    return _scalar(path, value, wanted)


def _choice(path: str, value: Any, choices: Sequence[str]) -> Any:
    listed = ", ".join(f'"{choice}"' for choice in choices)
    _require(isinstance(value, str) and value in choices, f"{path} must be one of {listed}, not {_shown(value)}.")
    return value


def _scalar(path: str, value: Any, wanted: type) -> Any:
    # bool is an int in Python; in a configuration it never stands for a number
    accepted = {float: (int, float), int: (int,), str: (str,), bool: (bool,)}[wanted]
    words = {float: "a number", int: "a whole number", str: "a text", bool: "true or false"}[wanted]
    fits = isinstance(value, accepted) and (wanted is bool or not isinstance(value, bool))
    _require(fits, f"{path} must be {words}, not {_shown(value)}.")
    return wanted(value)


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return f'"{value}"' if isinstance(value, str) else str(value)
