"""The tokenizer of a model folder: text to token ids and back.

Owns: the Hugging Face tokenizer behind the service's Tokenizer protocol, the chat template, the fingerprint clients
compare. Must never know sessions or gRPC; importing it is cheap, the library comes with the first folder.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from speculator.errors import CheckpointError

Message = Mapping[str, str]  # role and content


class FolderTokenizer:
    """Encodes and decodes with a folder's tokenizer; threads may share it."""

    def __init__(self, backend: Any, sha256: str) -> None:
        self._backend = backend
        self._lock = threading.Lock()  # fast tokenizers refuse to be used by two threads at once
        self.sha256 = sha256

    @property
    def has_chat(self) -> bool:
        """Whether the folder says how a conversation is written."""
        return bool(self._backend.chat_template)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        end = self._backend.eos_token_id
        return () if end is None else (end,)

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, with the special tokens that the folder puts around it."""
        with self._lock:
            return list(self._backend.encode(text))

    def encode_chat(self, messages: str | Sequence[Message]) -> list[int]:
        """Token ids of a conversation (a text is its only question) up to where the answer begins.

        Plain text where the folder has no chat template.
        """
        if isinstance(messages, str):
            if not self.has_chat:
                return self.encode(messages)
            messages = [{"role": "user", "content": messages}]
        with self._lock:
            ids = self._backend.apply_chat_template(
                list(messages), add_generation_prompt=True, tokenize=True, return_dict=False
            )
        return list(ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids without the special ones; bytes that are no whole character come as U+FFFD."""
        with self._lock:
            text: str = self._backend.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def load_tokenizer(folder: str | Path) -> FolderTokenizer:
    """The tokenizer of a model folder; CheckpointError when there is none that works."""
    folder = Path(folder)
    if not has_tokenizer(folder):
        raise CheckpointError(f"{folder} has no tokenizer.json nor tokenizer.model")
    from transformers import AutoTokenizer

    try:
        backend = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the library raises whatever its parsers raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"the tokenizer in {folder} cannot be read: {reason}") from error
    return FolderTokenizer(backend, fingerprint(folder))


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def fingerprint(folder: Path) -> str:
    """SHA-256 of the folder's tokenizer.json, "" when it has none."""
    path = folder / "tokenizer.json"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
