"""The configuration says what it took and what it refuses, in one sentence each.

Owns: every way a file or an override can be right or wrong. Must never start a server.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speculator.config import Config, ServerConfig, load, parse
from speculator.errors import ConfigError
from speculator.types import DraftShape, Rule, SamplingParams

ROOT = Path(__file__).resolve().parents[2]


def refused(*overrides: str) -> str:
    """The sentence that answers `overrides`."""
    with pytest.raises(ConfigError) as caught:
        load(None, overrides)
    return caught.value.message


def written(folder: Path, text: str) -> Path:
    path = folder / "speculator.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults() -> None:
    config = load()
    assert config == Config()
    assert (config.server.address, config.server.metrics_port) == ("127.0.0.1:50051", 9464)
    assert config.draft.shape == DraftShape(depth=5)
    assert config.sampling.params == SamplingParams()


def test_file_and_overrides_later_ones_win(tmp_path: Path) -> None:
    path = written(tmp_path, "[engine]\npage_size = 8\nthreads = 2\n[sampling]\nrule = 'block'\ntemperature = 1\n")
    config = load(path, ["engine.page_size=32", "engine.page_size=64"])
    assert (config.engine.page_size, config.engine.threads) == (64, 2)
    assert config.sampling.params == SamplingParams(temperature=1.0, rule=Rule.BLOCK)
    assert isinstance(config.sampling.temperature, float)


@pytest.mark.parametrize("name", ["cpu.toml", "gpu.toml"])
def test_shipped_files_load(name: str) -> None:
    config = load(ROOT / "deploy" / "config" / name)
    assert config.model.target and config.model.head and config.server.loopback


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("model.target=/models/1", "model", "target", "/models/1"),
        ("model.target=12", "model", "target", "12"),
        ('model.target="a = b"', "model", "target", "a = b"),
        ("model.target=", "model", "target", ""),
        (" model.device = cuda:1 ", "model", "device", "cuda:1"),
        ("model.head_overrides={norm_output = true}", "model", "head_overrides", {"norm_output": True}),
        ("model.head_overrides.taps=[2, 6]", "model", "head_overrides", {"taps": [2, 6]}),
        ("model.head_overrides.norm_kind=post", "model", "head_overrides", {"norm_kind": "post"}),
        ("sampling.top_p=0.9", "sampling", "top_p", 0.9),
        ("sampling.rule=rejection", "sampling", "rule", Rule.REJECTION),
        ("server.uvloop=off", "server", "uvloop", "off"),
        ("server.max_message_bytes=1_048_576", "server", "max_message_bytes", 1048576),
    ],
)
def test_override_values(override: str, section: str, key: str, value: object) -> None:
    assert getattr(getattr(load(None, [override]), section), key) == value


def test_overrides_inside_a_table_add_up() -> None:
    table = {"model": {"head_overrides": {"a": 1, "b": 2}}}
    config = parse(table, ["model.head_overrides.b=3", "model.head_overrides.c=true"])
    assert config.model.head_overrides == {"a": 1, "b": 3, "c": True}
    assert table == {"model": {"head_overrides": {"a": 1, "b": 2}}}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "engin.page_size=1",
            "Unknown section 'engin'; known sections: draft, engine, graphs, model, parallel, policy, sampling, "
            "server.",
        ),
        (
            "engine.pagesize=1",
            "'pagesize'; known keys: invariant, kv_tokens, max_context, max_sessions, memory_share, page_size",
        ),
        ("engine.page_size=big", 'engine.page_size must be a whole number, not "big".'),
        ("engine.page_size=1.5", "engine.page_size must be a whole number, not 1.5."),
        ("engine.page_size=true", "engine.page_size must be a whole number, not true."),
        ("engine.page_size=-1", "engine.page_size must be between 0 and 1024, not -1."),
        ("engine.kv_tokens=-1", "engine.kv_tokens must be at least 0, not -1."),
        ("engine.page_size", 'written section.key=value, not "engine.page_size"'),
        ("page_size=3", "written section.key=value"),
        ("engine.page_size.x=3", "engine.page_size is a single value"),
        ("model.head_overrides=3", "model.head_overrides must be a table, not 3."),
        ("model.device=tpu", 'model.device must be "auto", "cpu", "cuda" or "cuda:N", not "tpu".'),
        ("model.dtype=int8", 'must be one of "auto", "float32", "bfloat16", "float16", not "int8".'),
        ("draft.depth=17", "draft.depth must be between 0 and 16, not 17."),
        ("draft.nodes=64", "draft.nodes must be between 0 and 63, not 64."),
        ("graphs.mode=quick", 'graphs.mode must be one of "auto", "off", "split", "piecewise", "round", not "quick".'),
        ("sampling.rule=lucky", 'sampling.rule must be one of "coupled", "rejection", "block", not "lucky".'),
        ("sampling.temperature=hot", 'sampling.temperature must be a number, not "hot".'),
        ("sampling.temperature=nan", "sampling.temperature must be between 0 and 100, not nan."),
        ("sampling.temperature=-1", "sampling.temperature must be between 0 and 100, not -1.0."),
        ("sampling.top_p=0", "sampling.top_p must be above 0 and at most 1, not 0.0."),
        ("sampling.repetition_penalty=inf", "sampling.repetition_penalty must be above 0"),
        ("sampling.seed=18446744073709551616", "sampling.seed must be between 0 and 18446744073709551615"),
        ("server.port=70000", "server.port must be between 0 and 65535, not 70000."),
        ("server.insecure=yes", 'server.insecure must be true or false, not "yes".'),
        ("server.host=", "server.host must not be empty"),
        ("server.tls_cert=a.pem", "server.tls_cert and server.tls_key go together"),
        ("server.tls_client_ca=a.pem", "server.tls_client_ca needs server.tls_cert"),
        ("server.token_file=/nowhere/tokens", "server.token_file names /nowhere/tokens, which is not a file."),
    ],
)
def test_wrong_overrides_get_one_clear_sentence(override: str, words: str) -> None:
    message = refused(override)
    assert words in message
    assert "\n" not in message


def test_a_tree_that_no_session_may_have_is_refused_before_it_is_recorded() -> None:
    with pytest.raises(ConfigError, match=r"draft.depth 8 with draft.branching 11 is too wide a tree: .* at most 64"):
        load(None, ["draft.depth=8", "draft.branching=11"])
    assert load(None, ["draft.depth=8", "draft.branching=10"]).draft.shape == DraftShape(8, 0, 10)
    with pytest.raises(ConfigError, match='sampling.rule "block" takes chains only: set draft.branching to 1'):
        load(None, ["draft.branching=2", "sampling.rule=block"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[engine\n", "is not valid TOML"),
        ("[nonsense]\na = 1\n", "Unknown section 'nonsense'"),
        ("engine = 3\n", "engine must be a section, written [engine] with keys below it, not 3."),
        ("[server]\nreflection = true\n", 'server.reflection must be one of "auto", "on", "off", not true.'),
        ("[model]\ntarget = 5\n", "model.target must be a text, not 5."),
        ("[engine]\nthreads = '2'\n", 'engine.threads must be a whole number, not "2".'),
    ],
)
def test_wrong_files(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(written(tmp_path, text))
    assert words in caught.value.message


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Cannot read the configuration .*nothing.toml"):
        load(tmp_path / "nothing.toml")
    with pytest.raises(ConfigError, match="Cannot read the configuration"):
        load(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b"[model]\ntarget = '\xff'\n")
    with pytest.raises(ConfigError, match="latin.toml is not valid TOML"):
        load(tmp_path / "latin.toml")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "example.org"])
def test_open_address_needs_tls_or_an_explicit_word(host: str, tmp_path: Path) -> None:
    message = refused(f"server.host={host}")
    assert "server.tls_cert" in message and "server.insecure = true" in message
    assert load(None, [f"server.host={host}", "server.insecure=true"]).server.host == host
    pem = written(tmp_path, "")
    secure = load(None, [f"server.host={host}", f"server.tls_cert={pem}", f"server.tls_key={pem}"]).server
    assert secure.tls and not secure.serve_reflection


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_nothing(host: str) -> None:
    server = ServerConfig(host=host)
    assert server.loopback and server.serve_reflection
    assert not ServerConfig(host=host, reflection="off").serve_reflection


def test_addresses_are_what_grpc_expects() -> None:
    assert ServerConfig(host="::1", port=1).address == "[::1]:1"
    assert ServerConfig(host="localhost", port=1).address == "localhost:1"


def test_nothing_is_filled_in_later() -> None:
    config = load()
    for section in (config, *(getattr(config, item.name) for item in dataclasses.fields(config))):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(section, dataclasses.fields(section)[0].name, None)


@given(st.text(max_size=40))
def test_any_override_is_taken_or_answered(text: str) -> None:
    try:
        parse({}, [text])
    except ConfigError as error:
        assert error.message


@given(st.sampled_from(["engine.threads", "model.served_name", "server.port", "sampling.rule"]), st.text(max_size=20))
def test_any_value_is_taken_or_answered(key: str, text: str) -> None:
    try:
        parse({}, [f"{key}={text}"])
    except ConfigError as error:
        assert error.message
