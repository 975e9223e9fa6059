"""Tokenizer, held-out split, mixing and packing."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from speculator.train.data import (
    ANSWER,
    QUESTION,
    SKIP,
    Document,
    Mixture,
    build_streams,
    group_key,
    held_out,
    load_stream,
    pack,
    save_stream,
)
from speculator.train.recipe import RecipeError
from speculator.train.tokenizer import ASSISTANT, END, PAD, USER, ChatTokenizer, load_tokenizer, train_bpe

TEXTS = ["The cat sat on the mat.\n\ndef f(x):\n    return x + 1\n" * 3, "It is 12345 o'clock, said the cat. " * 5]


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return train_bpe(TEXTS, 320)


@pytest.mark.parametrize("text", ["", " two  spaces\t\n\n  x", "é 漢字 🙂", "<|end|> is text here", TEXTS[0]])
def test_round_trip(tokenizer: ChatTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & {END, USER, ASSISTANT}
    assert tokenizer.encode_many([text, "x"])[0] == ids


def test_digits_stand_alone(tokenizer: ChatTokenizer) -> None:
    assert len(tokenizer.encode("12345")) == 5


def test_files_load_in_transformers_with_the_same_template(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path, 256)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [
        {"role": "user", "content": "The cat?"},
        {"role": "assistant", "content": "Sat."},
        {"role": "user", "content": "def f(x):\n    return 12"},
    ]
    text = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = theirs(text, add_special_tokens=True)["input_ids"]
    assert ids == tokenizer.prompt(messages) == load_tokenizer(tmp_path).prompt(messages)
    assert (theirs.eos_token_id, theirs.pad_token_id) == (END, PAD)


def write_source(folder: Path, name: str, records: list[dict[str, object]]) -> Path:
    path = folder / f"{name}.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as out:
        out.writelines(json.dumps(r) + "\n" for r in records)
    return path


def chat(number: int) -> dict[str, object]:
    turns = [{"role": "user", "content": f"cat {number}?"}, {"role": "assistant", "content": "The cat sat."}]
    return {"id": f"c{number}", "messages": turns}


def test_streams_hold_every_document_once(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    path = write_source(tmp_path, "a", [chat(i) for i in range(60)])
    train, heldout = build_streams(path, tokenizer, 20.0, chunk=7)
    assert len(train.starts) + len(heldout.starts) == 60
    assert len(heldout.starts) == sum(held_out(f"c{i}", 20.0) for i in range(60)) > 0
    ends = [*train.starts[1:], len(train.tokens)]
    for start, end in zip(train.starts, ends, strict=True):
        where = start + int(np.flatnonzero(train.tokens[start:end] == ASSISTANT)[0])
        assert set(train.marks[start : where + 1]) == {QUESTION}
        assert set(train.marks[where + 1 : end]) == {ANSWER}
        assert train.tokens[end - 1] == END
    save_stream(train, tmp_path / "x.npz")
    again = load_stream(tmp_path / "x.npz")
    assert again.chat and np.array_equal(again.tokens, train.tokens)


def test_one_origin_stays_on_one_side() -> None:
    assert group_key("asp/en/0001_x/qa") == group_key("asp/en/0001_x")
    assert group_key("m90378/rag0") == group_key("osbooks-american-government/m90378")
    assert group_key("a/b.py:f") == group_key("a/b.py")
    assert group_key("Book#3") == group_key("Book#4")
    assert group_key("gsm8k/train/1") != group_key("gsm8k/train/2")


def test_mixture_is_deterministic_and_follows_the_weights(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    paths = {n: write_source(tmp_path, n, [{"id": f"{n}{i}", "text": n * 40} for i in range(20)]) for n in "ab"}
    streams = {n: build_streams(p, tokenizer, 0.0)[0] for n, p in paths.items()}
    cpu = torch.device("cpu")

    def draw(seed: int, weights: dict[str, float]) -> torch.Tensor:
        return Mixture(streams, weights, 8, cpu, seed).batch(200)[0]

    assert torch.equal(draw(1, {"a": 1.0, "b": 1.0}), draw(1, {"a": 1.0, "b": 1.0}))
    assert not torch.equal(draw(1, {"a": 1.0, "b": 1.0}), draw(2, {"a": 1.0, "b": 1.0}))
    b = set(streams["b"].tokens.tolist()) - {END}
    share = [np.mean([bool(b & set(r)) for r in draw(1, {"a": 1.0, "b": w}).tolist()]) for w in (0.0, 1.0, 9.0)]
    assert share[0] == 0 and 0.35 < share[1] < 0.65 and share[2] > 0.8
    with pytest.raises(RecipeError, match="not there: c"):
        draw(1, {"a": 1.0, "c": 1.0})


def test_pack_keeps_documents_apart() -> None:
    documents = [Document(np.full(n, n, np.uint16), np.full(n, ANSWER, np.uint8)) for n in (5, 40, 10, 60)]
    packed = pack(documents, 50, shortest=8)
    assert packed.tokens.shape[1] == 50
    assert packed.documents[0].tolist() == [0] * 5 + [1] * 40 + [-1] * 5
    assert packed.positions[0, 5:45].tolist() == list(range(40))
    assert (packed.marks[packed.documents < 0] == SKIP).all()
    assert (packed.tokens[1, 10:] == 60).all() and (packed.tokens[1, :10] == 10).all()


def test_what_is_said_to_everybody_is_counted() -> None:
    from speculator.train.repetition import shared_share

    stock = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert shared_share([stock, stock]) == 1.0
    assert shared_share([stock, list(range(20, 29))]) == 0.0
    assert shared_share([stock, [*stock, 30, 31]]) == pytest.approx(4 / 6)
    assert shared_share([[1, 2]]) == 0.0


def test_a_word_may_not_follow_itself() -> None:
    from speculator.train.repetition import stuttered

    assert stuttered([5, 5, 6, 6, 5], words={5}) == [False, True, False, False, False]
