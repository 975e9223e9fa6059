"""The commands: what their help costs, what a wrong word costs, and where each of them leads."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console

from speculator import cli, errors
from speculator.bundled import find_pairs
from speculator.cli.models import Flags, configure
from speculator.cli.paint import Painter, Piece, Speech
from speculator.client import ConnectionLostError
from speculator.train.recipe import recipe_names
from target.errors import CheckpointError as TargetCheckpointError
from tests.fakes import FakeTokenizer, plain
from tests.rpc.client_hosts import Host

cli_bench = import_module("speculator.cli.bench")  # the package's own `bench` and `client` are its commands
cli_client = import_module("speculator.cli.client")

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("serve", "generate", "demo", "inspect", "train", "client", "bench")


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    told = capsys.readouterr()
    return ended.value.code, told.out, told.err  # type: ignore[return-value]


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Host() as host:
        yield host


# ---- help


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert all(command in out for command in COMMANDS)


@pytest.mark.parametrize(
    "command", ["serve", "generate", "demo", "inspect", "train", "client generate", "client propose"]
)
def test_help_teaches_by_example(capsys: pytest.CaptureFixture[str], command: str) -> None:
    code, out, _ = run(capsys, *command.split(), "--help")
    assert code == 0
    assert f"speculator {command}" in out.partition("Example")[2]


@pytest.mark.parametrize("command", ["serve", "generate", "demo", "train"])
def test_examples_name_what_is_there(capsys: pytest.CaptureFixture[str], command: str) -> None:
    _, out, _ = run(capsys, command, "--help")
    examples = out.partition("Example")[2].partition("╭")[0]
    assert set(re.findall(r"--pair (\S+)", examples)) <= {pair.name for pair in find_pairs(ROOT / "deploy" / "models")}
    assert set(re.findall(r"--recipe (\S+)", examples)) <= set(recipe_names())


@pytest.mark.parametrize("words", ["--help", "client --help", "serve --help", "--version"])
def test_help_loads_no_heavy_library(words: str) -> None:
    code = (
        f"import sys\nfrom speculator import cli\ntry:\n    cli.main({words.split()!r})\nexcept SystemExit as end:\n"
        "    assert end.code == 0\nfound = {'torch', 'transformers', 'grpc', 'google'} & set(sys.modules)\n"
        "sys.exit(f'loaded {found}' if found else 0)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


# ---- wrong input

WRONG = {
    "no such command": "fly",
    "no such flag": "serve --wings",
    "port is no number": "serve --port high",
    "port out of range": "serve --port 99999",
    "no such key": "serve --set engine.wings=2",
    "no such section": "serve --set wings.engine=2",
    "not an override": "serve --set depth",
    "no such file": "serve --config {tmp}/none.toml",
    "not TOML": "serve --config {tmp}/bad.toml",
    "an open address": "serve --host 0.0.0.0",
    "a device of fancy": "serve --device abacus",
    "a depth too deep": "serve --depth 40",
    "no target there": "serve --target {tmp}/none",
    "a head alone": "serve --head {tmp}",
    "an empty folder": "serve --target {tmp}",
    "a prompt twice": "generate hello --file {tmp}/latin.txt",
    "an empty prompt": "generate --file {tmp}/empty.txt",
    "a prompt in no encoding": "generate --file {tmp}/latin.txt",
    "a missing prompt file": "generate --file {tmp}/none.txt",
    "no tokens asked": "generate hello -n 0",
    "a seed of 65 bits": "generate hello --seed 18446744073709551616",
    "inspect nothing": "inspect {tmp}/none",
    "inspect a file": "inspect {tmp}/latin.txt",
    "probe without target": "inspect {tmp} --probe",
    "an override without value": "inspect {tmp} --override norm_before_residual",
    "no such stage": "train wings --data {tmp} --out {tmp}/out",
    "a head of another kind": "train mtp --data {tmp} --out {tmp}/out --recipe toy",
    "no data flag": "train all --out {tmp}/out",
    "no such recipe": "train all --data {tmp} --out {tmp}/out --recipe wings",
    "ids in words": "client propose five,six --ids",
    "no such CA": "client info --ca {tmp}/none.pem",
    "no such token file": "client info --token-file {tmp}/none.txt",
    "a certificate without key": "client info --cert {tmp}/bad.toml",
    "no such benchmark": "bench wings",
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_input_gets_one_sentence_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, what: str
) -> None:
    (tmp_path / "bad.toml").write_text("[engine\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_text("\n")
    code, out, err = run(capsys, *WRONG[what].format(tmp=tmp_path).split())
    assert code == 2, err
    assert out == ""
    assert err.startswith("speculator: ") or err.startswith("error: ")
    assert len(err.strip().splitlines()) == 1 and "Traceback" not in err
    assert len(err) > len("speculator: ") + 10


BROKEN = b"caf\xc3\xa9 \xff"


@pytest.mark.parametrize("command", ["generate", "generate --server 127.0.0.1:1", "client generate", "client propose"])
def test_an_argument_that_is_not_utf8(capsys: pytest.CaptureFixture[str], command: str) -> None:
    code, out, err = run(capsys, *command.split(), os.fsdecode(BROKEN))
    assert (code, out) == (2, "")
    assert err == "speculator: the prompt is not UTF-8 text: byte 6 is 0xff\n"


@pytest.mark.parametrize("command", ["generate", "generate --server 127.0.0.1:1"])
def test_a_prompt_on_stdin_or_in_a_file_that_is_not_utf8(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes(BROKEN)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(BROKEN), encoding="utf-8"))
    for name, words in (("stdin", ()), (str(file), ("--file", str(file)))):
        code, out, err = run(capsys, *command.split(), *words)
        assert (code, out) == (2, "")
        assert err == f"speculator: {name} is not UTF-8 text: byte 6 is 0xff\n"


def test_debug_shows_where(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "serve", "--set", "depth", "--debug")
    assert code == 2
    assert "Traceback" in err and err.strip().splitlines()[-1].startswith("speculator: ")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ConfigError("no"), 2),
        (errors.CheckpointError("no"), 2),
        (errors.PromptTooLongError("no"), 2),
        (TargetCheckpointError("no"), 2),
        (FileNotFoundError(2, "No such file", "x"), 2),
        (ConnectionLostError("no"), 1),
        (errors.ServerFullError("no"), 1),
        (errors.EngineFailedError("no"), 1),
        (RuntimeError("no"), 1),
        (ExceptionGroup("several", [errors.ConfigError("no")]), 2),
        (OSError("no"), 1),
    ],
)
def test_exit_codes(error: Exception, code: int) -> None:
    assert cli.explain(error)[0] == code
    assert cli.explain(error)[1]


def test_nobody_listens(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_client, "REACH_SECONDS", 0.1)
    for words in ("client info", "generate hello"):
        code, out, err = run(capsys, *words.split(), "--server", "127.0.0.1:1")
        assert (code, out) == (1, "")
        assert "127.0.0.1:1" in err and len(err.splitlines()) == 1


# ---- configuration


def test_flags_win_over_set_and_set_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "my.toml"
    file.write_text('[model]\ntarget = "t"\n[draft]\ndepth = 3\nbranching = 2\n[server]\nport = 1\n')
    config = configure(Flags(config=file, depth=7, port=9, insecure=True, sets=("draft.depth=5", "server.port=2")))
    assert (config.draft.depth, config.draft.branching, config.server.port) == (7, 2, 9)
    assert (config.model.target, config.server.insecure) == ("t", True)
    assert configure(Flags(config=file, sets=("draft.depth=5",))).draft.depth == 5
    assert configure(Flags(config=file)).draft.depth == 3


def make_folders(root: Path, *names: str) -> None:
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / "config.json").write_text("{}")


def test_the_bundled_pair_stands_in_for_a_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = tmp_path / "deploy" / "models"
    make_folders(models, "b/target", "c/target", "c/eagle3", "half/target", "other/eagle3")
    (models / "b" / "target" / "config.json").write_text('{"num_nextn_predict_layers": 1}')
    monkeypatch.chdir(tmp_path)
    assert [pair.name for pair in find_pairs()] == ["c", "b"]
    config = configure(Flags())
    assert (config.model.target, config.model.head) == ("deploy/models/c/target", "deploy/models/c/eagle3")
    assert configure(Flags(target="mine")).model.head == ""
    config = configure(Flags(pair="b"))  # its head is in the target's folder
    assert (config.model.target, config.model.head) == ("deploy/models/b/target", "deploy/models/b/target")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (Flags(pair="half"), r"no bundled pair 'half'; known: b, c\."),
        (Flags(pair="b", target="mine"), "--pair b names target and head, but mine is named too"),
        (Flags(pair="b", head="mine"), "--pair b names target and head, but mine is named too"),
    ],
)
def test_a_pair_that_cannot_be_taken(
    flags: Flags, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_folders(tmp_path / "deploy" / "models", "b/target", "b/eagle3", "c/target", "c/eagle", "half/target")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(errors.ConfigError, match=message):
        configure(flags)


@pytest.mark.parametrize("command", ["demo", "serve", "generate hello"])
def test_every_command_that_loads_models_takes_a_pair(
    command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_folders(tmp_path / "deploy" / "models", "b/target", "b/eagle3")
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *command.split(), "--pair", "c", "--graphs", "off")
    assert (code, err) == (2, "speculator: There is no bundled pair 'c'; known: b.\n")


def test_without_a_bundled_pair_a_target_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("speculator.bundled.find_pairs", lambda: [])
    with pytest.raises(errors.ConfigError, match="--target"):
        configure(Flags())


# ---- routes


def test_bench_hands_its_arguments_over(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("fake_bench")
    module.main = lambda: print(*sys.argv)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake_bench", module)
    monkeypatch.setitem(cli_bench.BENCHES, "rpc", ("fake_bench", ""))
    code, out, _ = run(capsys, "bench", "rpc", "--exchanges", "3", "--help")
    assert code == 0
    assert out.strip() == "speculator bench rpc --exchanges 3 --help"


def test_train_runs_the_stages_in_turn(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[list[str]] = []

    def main(arguments: list[str]) -> int:
        calls.append(arguments)
        return 0

    monkeypatch.setattr("speculator.train.__main__.main", main)
    code, _, _ = run(capsys, *f"train target eagle3 --data {tmp_path} --out o --recipe toy --force --pace 0.5".split())
    assert code == 0
    assert [call[-1] for call in calls] == ["target", "eagle3"]
    assert calls[0][0] == "toy" and "--force" in calls[0] and "0.5" in calls[0]


# ---- client commands, against a server


def test_client_info_and_stats(capsys: pytest.CaptureFixture[str], host: Host) -> None:
    code, out, _ = run(capsys, "client", "info", "--server", host.address)
    assert code == 0
    assert "fake-target" in out and "limits context" in out
    code, out, _ = run(capsys, "client", "info", "--server", host.address, "--json")
    assert json.loads(out)["vocab size"] == 101
    code, out, _ = run(capsys, "client", "stats", "--server", host.address, "--json")
    assert code == 0 and "accept length" in json.loads(out)


def test_client_propose(capsys: pytest.CaptureFixture[str], host: Host) -> None:
    words = ["client", "propose", "5,6,7", "--ids", "--depth", "3", "--server", host.address, "--json"]
    code, out, _ = run(capsys, *words)
    answer = json.loads(out)
    assert code == 0
    assert answer["committed"] == [5, 6, 7, *plain((5, 6, 7), 1)]
    assert len(answer["tokens"]) == 3 and answer["parents"] == [-1, 0, 1]
    assert host.core.usage().active == 0


@pytest.mark.parametrize("command", ["generate", "client generate"])
def test_generate_from_a_server(capsys: pytest.CaptureFixture[str], host: Host, command: str) -> None:
    code, out, _ = run(capsys, *command.split(), "hello", "-n", "12", "--server", host.address)
    ids = FakeTokenizer().encode("hello")
    assert code == 0
    assert out.rstrip("\n") == FakeTokenizer().decode(plain(ids, 12)).rstrip("\n")


def test_the_server_refuses(capsys: pytest.CaptureFixture[str], host: Host) -> None:
    code, out, err = run(capsys, "client", "generate", "x" * 500, "--server", host.address)
    assert (code, out) == (2, "")
    assert "tokens" in err and len(err.splitlines()) == 1


# ---- paint


def speech() -> list[Piece]:
    tokenizer = FakeTokenizer()
    ids = tokenizer.encode("ab\u00e9cd")
    made = Speech(tokenizer)
    return [*made.say(ids[:1], 0, False), *made.say(ids[1:3], 1, False), *made.say(ids[3:], 3, True)]


def test_speech_says_everything_once_and_holds_back_half_a_character() -> None:
    pieces = speech()
    assert "".join(piece.text for piece in pieces) == "ab\u00e9cd"
    assert pieces[:2] == [Piece("a", False), Piece("b", True)]


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({"force_terminal": True, "color_system": "standard"}, "\x1b[33ma\x1b[0m\x1b[32mb\x1b[0m"),
        ({"force_terminal": True, "no_color": True}, "a[b]"),
        ({}, "a[b]"),
    ],
)
def test_two_colours_or_plain_marks(options: dict, shown: str) -> None:
    file = io.StringIO()
    painter = Painter(Console(file=file, **options))
    for piece in (Piece("a", False), Piece("b", True)):
        painter.paint(piece)
    assert file.getvalue() == shown


def test_markup_in_text_is_text() -> None:
    file = io.StringIO()
    Painter(Console(file=file), marks=False).paint(Piece("[bold]x[/bold] :smile:", True))
    assert file.getvalue() == "[bold]x[/bold] :smile:"
