"""What stands beside every figure: commit, device, versions, arguments.

Must never measure anything.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "transformers", "grpcio", "protobuf", "triton")


def provenance(device: str | None = None) -> dict[str, object]:
    """Values for a report; a missing package or repository is left out or named unknown.

    The device is torch's, unless the caller names what it ran on.
    """
    return {
        "commit": commit(),
        "device": device or _torch_device(),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "argv": sys.argv[1:],
    }


def commit() -> str:
    """Short hash of the checkout the package lies in, with + when files differ from it.

    A copy without its repository takes the hash from the environment, SPECULATOR_COMMIT.
    """
    if named := os.environ.get("SPECULATOR_COMMIT"):
        return named
    here = Path(__file__).parent
    try:
        name = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
        dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return name.stdout.strip() + ("+" if dirty.stdout.strip() else "") if name.returncode == 0 else "unknown"


def _torch_device() -> str:
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return gpu or f"{cpu_name()}, {torch.get_num_threads()} threads"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
