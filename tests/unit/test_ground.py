"""The ground everything stands on: what importing costs, what is public, what the wheel holds.

Owns: promises about packages and imports. Must never look at what the modules do.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import inspect
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import speculator
from speculator import errors

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("speculator", "target", "graphs")
# beyond the standard library and itself; flash_mla where somebody installed it, pytest for the conformance kit alone
ALLOWED = {"graphs": {"torch", "pytest"}, "target": {"torch", "safetensors", "triton", "flash_mla"}}
WITHOUT_TORCH = [
    "speculator",
    "speculator.types",
    "speculator.errors",
    "speculator.config",
    "speculator.v1.drafter_pb2_grpc",
    "speculator.v1.admin_pb2_grpc",
    "speculator.session",
    "speculator.scheduler",
    "speculator.worker",
    "speculator.server",
    "speculator.client",
    "speculator.cli",
]
PUBLIC = """
AsyncClient CheckpointError Client ConfigError DeadlineExceededError DraftNotFoundError DrainingError EngineFailedError
InvalidArgumentError InvalidTreeError NumericalError PositionMismatchError PromptTooLongError ServerFullError
SessionBusyError SessionExistsError SessionFinishedError SessionForbiddenError SessionNotFoundError
SpeculationDisabledError SpeculatorError StepCancelledError UnauthenticatedError __version__
""".split()


def loaded_by(statement: str) -> set[str]:
    """Top-level modules in a fresh interpreter after `statement`."""
    code = f"{statement}; import sys; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def modules(package: str) -> set[str]:
    """Python files of a package, as paths inside the wheel."""
    return {str(path.relative_to(ROOT)) for path in (ROOT / package).rglob("*.py")}


def imported_by(path: Path) -> set[str]:
    """Top-level names of everything a file imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_imports_without_torch(module: str) -> None:
    assert not loaded_by(f"import {module}") & {"torch", "transformers", "target", "graphs"}


def test_importing_speculator_is_cheap() -> None:
    assert not loaded_by("import speculator") & {"grpc", "google", "numpy", "rich", "typer"}


@pytest.mark.parametrize("package", ALLOWED)
def test_package_imports_only_what_it_may(package: str) -> None:
    allowed = ALLOWED[package] | {package} | sys.stdlib_module_names
    foreign = {path: imported_by(ROOT / path) - allowed for path in modules(package)}
    assert {path: names for path, names in foreign.items() if names} == {}


def test_public_names_are_frozen() -> None:
    assert list(speculator.__all__) == sorted(speculator.__all__)
    assert sorted(speculator.__all__) == sorted(PUBLIC)


def test_every_public_name_resolves() -> None:
    assert [name for name in speculator.__all__ if getattr(speculator, name, None) is None] == []


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Drafter'"):
        speculator.Drafter  # noqa: B018


def test_every_error_is_public_and_complete() -> None:
    tree = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.SpeculatorError)]
    assert {kind.__name__ for kind in tree} <= set(speculator.__all__)
    assert all(kind.status.isupper() and kind.reason.isupper() for kind in tree)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel as `pip` would build it."""
    folder, here = tmp_path_factory.mktemp("wheel"), Path.cwd()
    backend = importlib.import_module("hatchling.build")
    os.chdir(ROOT)  # the build interface works on the current directory
    try:
        return zipfile.ZipFile(folder / backend.build_wheel(str(folder)))
    finally:
        os.chdir(here)


def test_wheel_holds_every_module_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    held = {name for name in wheel.namelist() if name.endswith(".py")}
    assert held == set().union(*(modules(package) for package in PACKAGES))


def test_wheel_is_typed(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    assert "speculator/v1/drafter_pb2.pyi" in names


def test_wheel_base_install_is_the_light_client(wheel: zipfile.ZipFile) -> None:
    text = wheel.read(next(name for name in wheel.namelist() if name.endswith("/METADATA"))).decode()
    metadata = Parser().parsestr(text)
    base = [need for need in metadata.get_all("Requires-Dist", []) if "extra ==" not in need]
    names = {need.split(">")[0].split("<")[0].strip() for need in base}
    assert names == {"googleapis-common-protos", "grpcio", "grpcio-status", "protobuf"}
    assert metadata["Version"] == speculator.__version__
    assert {"server", "gpu", "flash-attn", "train", "bench", "dev"} <= set(metadata.get_all("Provides-Extra", []))


def test_readme_maps_every_file() -> None:
    mapped = re.findall(r"^- `([\w/]+\.py)` \S", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    written = {path for package in PACKAGES for path in modules(package) if not path.startswith("speculator/v1/")}
    assert sorted(mapped) == sorted(written)


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    """Paths under version control."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a checkout: git does not know these files")
    return [path for path in listed.stdout.split("\0") if (ROOT / path).is_file()]


def test_readme_maps_what_is_no_module(tracked: list[str]) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Map")[2]
    lines = re.findall(r"^- ((?:`[^`]+`, )*`[^`]+`) \S", text, re.MULTILINE)
    mapped = [path.rstrip("/") for line in lines for path in re.findall("`([^`]+)`", line)]
    assert [path for path in mapped if not (ROOT / path).exists()] == []
    others = [path for path in tracked if not path.startswith(PACKAGES) or not path.endswith((".py", ".pyi", ".typed"))]
    beside = {"README.md", ".gitignore"}
    assert [p for p in others if p not in beside and not any(f"{p}/".startswith(f"{m}/") for m in mapped)] == []


def test_tracked_files_stay_small(tracked: list[str]) -> None:
    """A clone has to be quick, with three bundled pairs in it."""
    assert sum((ROOT / path).stat().st_size for path in tracked) < 40 * 2**20


def test_version_is_in_one_place() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "version" not in project
    assert f"## {speculator.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
