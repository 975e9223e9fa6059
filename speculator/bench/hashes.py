"""Fingerprints of model folders, so that a report says which weights it speaks of.

Must never load a model.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

WHOLE = 1 << 26  # bytes; of larger files the size, the start and the end are hashed
PIECE = 1 << 20


def model_hash(folder: Path) -> str:
    """SHA-256 (16 hex digits) over config.json and the weight files of a folder; "" where there are none."""
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors")), *sorted(folder.glob("*.bin"))]
    found = hashlib.sha256()
    present = [file for file in files if file.is_file()]
    for file in present:
        found.update(f"{file.name} {file.stat().st_size}\n".encode())
        found.update(_content(file))
    return found.hexdigest()[:16] if present else ""


def _content(file: Path) -> bytes:
    if file.stat().st_size <= WHOLE:
        return file.read_bytes()
    with file.open("rb") as stream:
        start = stream.read(PIECE)
        stream.seek(-PIECE, 2)
        return start + stream.read()
