"""Files that a bench reads and writes: why one cannot be, in words, and before the run where it is to be written.

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


def unreadable(path: Path, error: Exception) -> str:
    """One sentence for what reading a file as UTF-8 text raised."""
    why = "it is no UTF-8 text" if not isinstance(error, OSError) else error.strerror or str(error)
    return f"{path} cannot be read: {why}."
