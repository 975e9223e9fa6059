"""The commands on real models: the bundled pair where it is there, else a tiny random one made on the spot."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from rich.console import Console

from speculator import cli
from speculator.bundled import Pair, find_pairs
from speculator.client import Client, Sampling, Stats, Stopping
from speculator.config import Config
from speculator.demo import PROMPTS, Plan, plan, show, total
from speculator.errors import CheckpointError
from speculator.text import TextStream
from speculator.tokenizer import load_tokenizer
from speculator.types import Step, StepResult
from tests.e2e.tiny_pair import make_pair
from tests.fakes import FakeEngine, FakeTokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def pair(tiny: Pair) -> Pair:
    """The pair to show: the first bundled one, if there is one."""
    return next(iter(find_pairs(ROOT / "deploy" / "models")), tiny)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    told = capsys.readouterr()
    return ended.value.code, told.out, told.err  # type: ignore[return-value]


def models(pair: Pair) -> list[str]:
    return ["--target", str(pair.target), "--head", str(pair.head), "--device", "cpu"]


# ---- demo


@pytest.mark.parametrize("shape", [[], ["--depth", "3", "--branching", "3", "--nodes", "12"]])
def test_demo_shows_and_checks(capsys: pytest.CaptureFixture[str], pair: Pair, shape: list[str]) -> None:
    code, out, err = run(capsys, "demo", *models(pair), "-n", "24", *shape)
    assert code == 0, err
    assert all(f"> {prompt[:40]}" in out for prompt in PROMPTS)
    assert "accept" in out and "[in brackets]" in out
    assert "All 5 texts are those of plain decoding" in out
    assert "\x1b" not in out  # capsys is no terminal


def test_demo_accepts_what_a_trained_head_drafts(capsys: pytest.CaptureFixture[str], pair: Pair, tiny: Pair) -> None:
    if pair is tiny:
        pytest.skip("no bundled pair in deploy/models")
    _, out, _ = run(capsys, "demo", *models(pair), "-n", "48")
    row = re.search(r"^ *all +(.*)$", out, re.MULTILINE)
    assert row is not None
    assert float(row[1].split()[2]) > 1.8  # a head that drafts at random stays at 1
    assert re.search(r"\[[^\]]+\]", out.partition("> ")[2])


class LyingEngine(FakeEngine):
    """Commits a wrong token in one of many rounds, when speculating only."""

    def step(self, steps: Sequence[Step]) -> list[StepResult]:
        results = super().step(steps)
        for i, step in enumerate(steps):
            if self.rows[step.row].speculate and step.draft is not None and step.cached > 15:
                tokens = (*results[i].tokens[:-1], 1 + results[i].tokens[-1] % 100)
                self.rows[step.row].pending = tokens[-1]
                results[i] = results[i]._replace(tokens=tokens, draft=None)
        return results


@pytest.mark.parametrize(("engine", "code"), [(FakeEngine(), 0), (LyingEngine(), 1)])
async def test_the_verdict(engine: FakeEngine, code: int) -> None:
    file = io.StringIO()
    wanted = Plan(("one", "two"), ((1, 2, 3), (4, 5, 6)), 30, Sampling())
    assert await show(engine, FakeTokenizer(), Config(), wanted, Console(file=file, width=100)) == code
    assert ("token for token" in file.getvalue()) is (code == 0)
    assert ("in the answer to: one" in file.getvalue()) is (code == 1)


async def test_colours_on_a_terminal_and_none_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for plain in (False, True):
        if plain:
            monkeypatch.setenv("NO_COLOR", "1")
        console = Console(file=(file := io.StringIO()), force_terminal=True, color_system="standard")
        assert (
            await show(FakeEngine(), FakeTokenizer(), Config(), Plan(("one",), ((1, 2),), 20, Sampling()), console) == 0
        )
        assert ("\x1b[32m" in file.getvalue()) is not plain


def test_total_adds_up() -> None:
    one = Stats(2, 4, 2, 5, {0: 1, 2: 1}, (1, 1), (2, 2))
    two = Stats(1, 3, 3, 4, {3: 1}, (1, 1, 1), (1, 1, 1))
    assert total([one, two]) == Stats(3, 7, 5, 9, {0: 1, 2: 1, 3: 1}, (2, 2, 1), (3, 3, 1))
    assert total([]).accept_length == 0.0


# ---- generate


def test_generate_is_the_same_with_and_without_drafts(capsys: pytest.CaptureFixture[str], pair: Pair) -> None:
    words = ["generate", PROMPTS[0], *models(pair), "-n", "24", "--temperature", "0.8", "--seed", "3", "--stats"]
    drafted, plain = run(capsys, *words), run(capsys, *words, "--plain")
    assert drafted[0] == plain[0] == 0
    assert drafted[1] == plain[1] != ""
    assert "accept length" in drafted[2]


def test_generate_reads_a_file(capsys: pytest.CaptureFixture[str], pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text(PROMPTS[0])
    words = [*models(pair), "-n", "8", "--raw"]
    from_file = run(capsys, "generate", "--file", str(tmp_path / "prompt.txt"), *words)
    assert from_file[:2] == run(capsys, "generate", PROMPTS[0], *words)[:2]
    assert from_file[0] == 0


def test_a_prompt_beyond_the_context(capsys: pytest.CaptureFixture[str], tiny: Pair) -> None:
    code, _, err = run(capsys, "generate", "word " * 600, *models(tiny))
    assert code == 2
    assert "512" in err or "511" in err


# ---- tokenizer


def test_the_tokenizer_of_a_folder(tiny: Pair) -> None:
    tokenizer = load_tokenizer(tiny.target)
    assert len(tokenizer.sha256) == 64
    assert tokenizer.eos_ids == (0,)
    for text in ("def add(a, b):\n    return a + b\n", "caf\u00e9 \U0001f98a", "\n\n  "):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    asked = tokenizer.encode_chat("Why?")
    assert asked == tokenizer.encode_chat([{"role": "user", "content": "Why?"}])
    assert len(asked) > len(tokenizer.encode("Why?"))
    assert tokenizer.has_chat


def test_text_comes_in_whole_characters(tiny: Pair) -> None:
    tokenizer = load_tokenizer(tiny.target)
    ids = tokenizer.encode("a\U0001f98ab")
    stream = TextStream(tokenizer)
    pieces = [stream.push([token], last=i == len(ids) - 1) for i, token in enumerate(ids)]
    assert "".join(pieces) == "a\U0001f98ab"
    assert "\ufffd" not in "".join(pieces)


def test_a_folder_without_a_usable_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_tokenizer(tmp_path)


def test_plan_asks_questions(tiny: Pair) -> None:
    made = plan(load_tokenizer(tiny.target), new_tokens=5)
    assert len(made.prompts) == len(PROMPTS) and made.new_tokens == 5
    assert made.sampling.temperature == 0.0


# ---- serve, as its own process


@pytest.fixture(scope="module")
def served(pair: Pair) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """A `speculator serve` with what it printed first, and its address."""
    words = ["serve", *models(pair), "--port", "0", "--set", "server.metrics_port=0", "--set", "engine.max_sessions=4"]
    process = subprocess.Popen(
        [sys.executable, "-m", "speculator", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    lines = [process.stdout.readline()]
    if "listening on" not in lines[0]:
        process.kill()
        pytest.fail(f"the server did not start: {lines[0]}{process.stderr.read()}")
    while not lines[-1].startswith("  record"):
        lines.append(process.stdout.readline())
    yield process, "".join(lines), lines[0].split()[-1]
    process.kill()
    process.communicate()


def test_serve_and_the_client_commands(
    capsys: pytest.CaptureFixture[str], served: tuple[subprocess.Popen[str], str, str], pair: Pair
) -> None:
    address = served[2]
    code, out, _ = run(capsys, "client", "info", "--server", address)
    assert code == 0
    assert re.search(rf"target model +{pair.target.name}", out) and re.search(r"tokenizer sha256 +[0-9a-f]{64}", out)
    code, out, _ = run(capsys, "client", "propose", "Once upon a time", "--server", address, "--depth", "4")
    assert code == 0 and re.search(r"tokens +\d+ \d+ \d+ \d+\n", out)
    plain = run(capsys, "client", "generate", "Once upon a time", "-n", "16", "--server", address, "--plain")
    assert run(capsys, "client", "generate", "Once upon a time", "-n", "16", "--server", address) == plain
    assert run(capsys, "generate", "Once upon a time", "-n", "16", "--raw", *models(pair))[1] == plain[1]
    assert run(capsys, "generate", PROMPTS[0], "-n", "16", "--server", address, "--target", str(pair.target))[0] == 0


def test_serve_drains_when_told_to(served: tuple[subprocess.Popen[str], str, str]) -> None:
    process, out, address = served
    with Client(address, patience=0.0) as client, client.draft_stream() as stream:
        with stream.session("Once", stopping=Stopping(max_new_tokens=8)) as session:
            assert len([token for part in session for token in part.tokens]) == len(session.output)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    assert "4 sessions" in out and "boundaries=" in out and "plain text" in out
    assert "Traceback" not in err
