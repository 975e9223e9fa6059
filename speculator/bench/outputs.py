"""Files that a bench is asked to write: what cannot be written is said before the run, not after it.

Must never know what goes into them.
"""

from __future__ import annotations

import os
from pathlib import Path

from speculator.errors import ConfigError


def check_files(*paths: Path | None) -> None:
    """ConfigError for the first of the paths that no file can be written to; None is no wish."""
    for path in paths:
        if path is not None and (why := _obstacle(path)):
            raise ConfigError(f"{path} cannot be written: {why}.")


def _obstacle(path: Path) -> str:
    if path.is_dir():
        return "it is a folder"
    if not path.parent.is_dir():
        return f"there is no folder {path.parent}"
    return "" if os.access(path if path.exists() else path.parent, os.W_OK) else "writing there is not permitted"
