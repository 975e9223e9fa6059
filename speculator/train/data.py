"""Corpora to token streams, and streams to batches.

Owns: reading records, the held-out split, packing and mixing. Must never know models.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from speculator.train.recipe import RecipeError
from speculator.train.tokenizer import ASSISTANT, END, PAD, ROLES, SYSTEM, USER, ChatTokenizer

Ids = NDArray[np.uint16]
Marks = NDArray[np.uint8]
QUESTION, ANSWER, REPEATED, SKIP = 0, 1, 2, 3  # what a token is to the loss
SYSTEM_LINES = ("You are a helpful assistant.", "You are a friendly assistant. Answer briefly.", "Be brief and clear.")


class Document(NamedTuple):
    """Ids of one text or conversation and, for each, what it is to the loss."""

    tokens: Ids
    marks: Marks


class Stream(NamedTuple):
    """All documents of a source, one after another."""

    tokens: Ids  # [N]
    marks: Marks  # [N]
    starts: NDArray[np.int64]  # [D]
    chat: bool


def source_files(folder: Path) -> dict[str, Path]:
    """Source name -> file; RecipeError when there are none."""
    files = {p.name.removesuffix(".jsonl.gz"): p for p in sorted(folder.glob("*.jsonl.gz"))}
    if not files:
        raise RecipeError(f"{folder} holds no *.jsonl.gz corpora")
    return files


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def group_key(identity: str) -> str:
    """What records of one origin (a book, module, story, file) share, so that all fall on one side of the split."""
    module = re.search(r"\bm\d{5}\b", identity)
    return module.group() if module else re.sub(r"(/qa$)|(:.*$)|(#.*$)", "", identity)


def held_out(identity: str, percent: float) -> bool:
    digest = hashlib.blake2b(group_key(identity).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 10000 < percent * 100


def record_texts(record: Mapping[str, Any]) -> list[str]:
    """The pieces of a record that are tokenized, in order."""
    return [m["content"] for m in record["messages"]] if "messages" in record else [record["text"]]


def sample_texts(folder: Path, megabytes: float, weights: Mapping[str, float], percent: float) -> Iterator[str]:
    """About `megabytes` of training text, each source in proportion to its size times its weight."""
    files = source_files(folder)
    sizes = {name: path.stat().st_size * weights.get(name, 1.0) for name, path in files.items()}
    for name, path in files.items():
        budget = megabytes * 1e6 * sizes[name] / sum(sizes.values())
        yield from _until(path, budget, percent)


def _until(path: Path, budget: float, percent: float) -> Iterator[str]:
    records = [r for r in read_records(path) if not held_out(str(r["id"]), percent)]
    # every k-th record first, so that a small sample spans the file
    for text in chain.from_iterable(record_texts(r) for k in range(16) for r in records[k::16]):
        if budget <= 0:
            return
        budget -= len(text.encode())
        yield text


def build_streams(path: Path, tokenizer: ChatTokenizer, percent: float, chunk: int = 4096) -> tuple[Stream, Stream]:
    """Tokenize a source into (training stream, held-out stream)."""
    records = sorted(read_records(path), key=lambda r: hashlib.blake2b(str(r["id"]).encode()).digest())
    chat = "messages" in records[0]
    parts: tuple[list[Document], list[Document]] = ([], [])
    for start in range(0, len(records), chunk):
        some = records[start : start + chunk]
        for record, document in zip(some, encode_records(some, tokenizer), strict=True):
            parts[held_out(str(record["id"]), percent)].append(document)
    return _join(parts[0], chat), _join(parts[1], chat)


def encode_records(records: Sequence[Mapping[str, Any]], tokenizer: ChatTokenizer) -> Iterator[Document]:
    encoded = iter(tokenizer.encode_many([t for r in records for t in record_texts(r)]))
    for record in records:
        if "messages" in record:
            yield _chat_document(record, encoded, tokenizer)
        else:
            yield text_document(next(encoded))


def text_document(ids: Sequence[int]) -> Document:
    tokens = np.fromiter((END, *ids), np.uint16)
    return Document(tokens, np.full(len(tokens), ANSWER, np.uint8))


def _chat_document(record: Mapping[str, Any], encoded: Iterator[list[int]], tokenizer: ChatTokenizer) -> Document:
    turns = [(ROLES[m["role"]], next(encoded)) for m in record["messages"]]
    return chat_document([*_system_turn(str(record["id"]), tokenizer), *turns])


def chat_document(turns: Sequence[tuple[int, Sequence[int]]]) -> Document:
    """[(role id, content ids)] -> the template's ids; the assistant's words and its end mark are the answer."""
    tokens = np.fromiter(chain.from_iterable((role, *ids, END) for role, ids in turns), np.uint16)
    marks = [(QUESTION, *[ANSWER if role == ASSISTANT else QUESTION] * (len(ids) + 1)) for role, ids in turns]
    return Document(tokens, np.fromiter(chain.from_iterable(marks), np.uint8))


def _system_turn(identity: str, tokenizer: ChatTokenizer) -> list[tuple[int, Sequence[int]]]:
    """One conversation in 32 gets a system line, so that the role means something."""
    number = int.from_bytes(hashlib.blake2b(f"system {identity}".encode(), digest_size=4).digest(), "big")
    if number % 32:
        return []
    return [(SYSTEM, tokenizer.encode(SYSTEM_LINES[number // 32 % len(SYSTEM_LINES)]))]


def _join(documents: Sequence[Document], chat: bool) -> Stream:
    lengths = np.array([len(d.tokens) for d in documents], np.int64)
    starts = np.concatenate((np.zeros(1, np.int64), lengths.cumsum()))[: len(documents)]
    empty = Document(np.zeros(0, np.uint16), np.zeros(0, np.uint8))
    tokens = np.concatenate([d.tokens for d in (empty, *documents)])
    return Stream(tokens, np.concatenate([d.marks for d in (empty, *documents)]), starts, chat)


def save_stream(stream: Stream, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **stream._asdict())


def load_stream(path: Path) -> Stream:
    with np.load(path) as arrays:
        return Stream(arrays["tokens"], arrays["marks"], arrays["starts"], bool(arrays["chat"]))


def load_streams(folder: Path, split: str) -> dict[str, Stream]:
    """Source name -> stream of one split ("train" or "heldout")."""
    return {p.name.removesuffix(f".{split}.npz"): load_stream(p) for p in sorted(folder.glob(f"*.{split}.npz"))}


class Mixture:
    """Rows of `length` + 1 tokens drawn from several streams, all on the device, the same for the same seed.

    A source is drawn in proportion to its tokens times its weight; text rows start anywhere, chats at a document.
    """

    def __init__(
        self, streams: Mapping[str, Stream], weights: Mapping[str, float], length: int, device: torch.device, seed: int
    ) -> None:
        used = [s for name, s in streams.items() if weights.get(name, 0) > 0 and len(s.tokens)]
        if unknown := sorted(set(weights) - set(streams)):
            raise RecipeError(f"weights name sources that are not there: {', '.join(unknown)}")
        if not used:
            raise RecipeError("no source has a positive weight")
        names = [name for name, s in streams.items() if weights.get(name, 0) > 0 and len(s.tokens)]
        sizes = np.array([len(s.tokens) for s in used], np.int64)
        first = sizes.cumsum() - sizes
        self._length, self._device = length, device
        self._generator = torch.Generator(device).manual_seed(seed)
        share = np.array([weights[n] for n in names]) * sizes
        self.passes_per_token = {n: weights[n] / float(share.sum()) for n in names}
        self._share = torch.tensor(share / share.sum(), dtype=torch.float32, device=device)
        self._tokens = _on_device(np.concatenate([s.tokens for s in used]).view(np.int16), length, device)
        self._marks = _on_device(np.concatenate([s.marks for s in used]), length, device)
        self._first, self._size = (torch.tensor(a, device=device) for a in (first, sizes))
        self._chat = torch.tensor([s.chat for s in used], device=device)
        counts = np.array([len(s.starts) for s in used], np.int64)
        self._documents = torch.tensor(counts, device=device)
        self._first_document = torch.tensor(counts.cumsum() - counts, device=device)
        self._starts = torch.tensor(
            np.concatenate([s.starts + f for s, f in zip(used, first, strict=True)]), device=device
        )

    def batch(self, rows: int) -> tuple[Tensor, Tensor]:
        """tokens [rows, length + 1] int64 and the marks of the last `length` of them."""
        source = torch.multinomial(self._share, rows, replacement=True, generator=self._generator)
        draw = torch.rand(rows, generator=self._generator, device=self._device, dtype=torch.float64)
        anywhere = self._first[source] + (draw * self._size[source]).long()
        document = self._first_document[source] + (draw * self._documents[source]).long()
        start = torch.where(self._chat[source], self._starts[document], anywhere)
        index = start[:, None] + torch.arange(self._length + 1, device=self._device)
        return self._tokens[index].long(), self._marks[index[:, 1:]]


def _on_device(values: NDArray[Any], length: int, device: torch.device) -> Tensor:
    """The array with its first `length` + 1 entries repeated at the end, so that no row runs out."""
    copies = -(-(length + 1) // len(values))
    return torch.from_numpy(np.concatenate([values, *[values[: length + 1]] * copies])).to(device)


class Packed(NamedTuple):
    """Rows filled with whole documents; `documents` numbers them within a row, -1 is padding."""

    tokens: Ids  # [R, L]
    marks: Marks  # [R, L]
    documents: NDArray[np.int16]  # [R, L]
    positions: NDArray[np.int16]  # [R, L] from 0 in every document


def pack(documents: Sequence[Document], length: int, shortest: int = 32) -> Packed:
    """Fill rows in order; a document that does not fit is cut, but never to fewer than `shortest` tokens."""
    rows: list[list[Document]] = [[]]
    room = length
    for document in documents:
        if room < min(shortest, len(document.tokens)):
            rows.append([])
            room = length
        rows[-1].append(Document(document.tokens[:room], document.marks[:room]))
        room -= len(rows[-1][-1].tokens)
    return Packed(*(np.stack(part) for part in zip(*(_row(r, length) for r in rows), strict=True)))


def _row(documents: Sequence[Document], length: int) -> tuple[NDArray[Any], ...]:
    tokens, marks = np.full(length, PAD, np.uint16), np.full(length, SKIP, np.uint8)
    number, positions = np.full(length, -1, np.int16), np.zeros(length, np.int16)
    at = 0
    for i, document in enumerate(documents):
        here = slice(at, at + len(document.tokens))
        tokens[here], marks[here], number[here] = document.tokens, document.marks, i
        positions[here] = np.arange(len(document.tokens))
        at = here.stop
    return tokens, marks, number, positions


def user_prompt(ids: Sequence[int]) -> list[int]:
    """A question as the chat template writes it, ready for the answer."""
    return [USER, *ids, END, ASSISTANT]
