"""Options and fixtures of the kit: which backend, on which device.

Owns: pytest's side of the kit. Must never know a rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch

from graphs.conformance.backend import Backend
from graphs.conformance.harness import Kit
from graphs.conformance.rules import Wrong
from graphs.errors import GraphError
from graphs.recorder import CudaRecorder, Recorder
from graphs.tape import TapeRecorder

FIRST = ("_share_nothing", "test_numbers", "test_r2", "test_r3", "test_r1", "test_r5", "test_r4", "test_rules")
ORDER = (
    "one mistake fails many tests: wrong numbers explain everything after them, shared states and stale addresses too"
)
USAGE = "pytest --pyargs graphs.conformance --backend package.module:Backend [--device cpu|cuda]"


def pytest_configure(config: pytest.Config) -> None:
    """Wrong options end the run with a sentence, before anything is collected."""
    if not config.option.help:
        _maker(config)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("conformance", "conformance of an attention backend")
    group.addoption("--backend", help="the backend to test, as package.module:Backend")
    group.addoption("--device", default="cpu", help="cpu (a tape plays the recorder) or cuda; default cpu")


def _device(config: pytest.Config) -> torch.device:
    name = config.getoption("--device")
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise pytest.UsageError(f"--device is cpu or cuda, got {name}")
    if name != "cpu" and not torch.cuda.is_available():
        raise pytest.UsageError(f"--device {name}: torch sees no CUDA device here")
    return torch.device(name)


def _maker(config: pytest.Config) -> Callable[[], Backend]:
    """Makes the backend that the command line names; UsageError where there is none."""
    name = config.getoption("--backend")
    module, _, attribute = (name or "").partition(":")
    if not module or not attribute:
        raise pytest.UsageError(f"name the backend to test: {USAGE}")
    try:
        kind: Any = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise pytest.UsageError(f"--backend {name}: {error}") from None
    return partial(kind, _device(config))


@pytest.fixture(scope="session")
def kit(pytestconfig: pytest.Config) -> Kit:
    make, device = _maker(pytestconfig), _device(pytestconfig)

    def recorder() -> Recorder:
        return TapeRecorder(poison_between_replays=True) if device.type == "cpu" else CudaRecorder(device)

    return Kit(make, make, recorder, device)


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Page sizes and query lengths of the backend under test."""
    wanted = [name for name in ("page_size", "query_len") if name in metafunc.fixturenames]
    if wanted:
        traits = _maker(metafunc.config)().traits
        for name in wanted:
            metafunc.parametrize(name, getattr(traits, f"{name}s"))


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call() -> Iterator[None]:
    """What is wrong is told in its own words, without a traceback through the kit."""
    wrong = ""
    try:
        return (yield)
    except Wrong as error:
        wrong = str(error)
    except GraphError as error:
        wrong = f"{type(error).__name__}: {error}"
    pytest.fail(wrong, pytrace=False)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    failed = [report.nodeid for report in terminalreporter.stats.get("failed", [])]
    if failed:
        terminalreporter.section(f"conformance of {config.getoption('--backend')}")
        terminalreporter.line(ORDER)
        terminalreporter.line(f"start with {min(failed, key=_rank)}")


def _rank(test: str) -> int:
    """Tests whose failure explains others come first."""
    return next((place for place, name in enumerate(FIRST) if name in test), len(FIRST))
