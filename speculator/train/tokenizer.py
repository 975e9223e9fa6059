"""A byte-level BPE with a chat template, and how conversations become ids.

Owns: the special ids, training the merges, the files that transformers loads. Must never know models.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|pad|>")
END, USER, ASSISTANT, SYSTEM, PAD = range(len(SPECIAL))
ROLES = {"user": USER, "assistant": ASSISTANT, "system": SYSTEM}
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# contractions, words with one leading space or sign, single digits, runs of signs, line breaks with their indentation
PIECES = r"'(?:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+[ \t]*(?=\S)|\s+(?!\S)|\s+"


class ChatTokenizer:
    """Text and conversations to ids and back; text that spells a special token stays text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokenizer.encode_special_tokens = True

    @property
    def vocab_size(self) -> int:
        return int(self._tokenizer.get_vocab_size())

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def prompt(self, messages: Iterable[Mapping[str, str]]) -> list[int]:
        """What the chat template makes of a conversation, ready for the assistant's answer."""
        ids: list[int] = []
        for message in messages:
            ids += [ROLES[message["role"]], *self.encode(message["content"]), END]
        return [*ids, ASSISTANT]

    def save(self, folder: Path, max_length: int) -> None:
        """Write tokenizer.json and tokenizer_config.json for transformers' AutoTokenizer."""
        folder.mkdir(parents=True, exist_ok=True)
        self._tokenizer.encode_special_tokens = False
        self._tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
        self._tokenizer.encode_special_tokens = True
        (folder / "tokenizer_config.json").write_text(json.dumps(_config(max_length), indent=2) + "\n", "utf-8")


def _config(max_length: int) -> dict[str, object]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL[END],
        "pad_token": SPECIAL[PAD],
        "additional_special_tokens": [SPECIAL[USER], SPECIAL[ASSISTANT], SPECIAL[SYSTEM]],
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "chat_template": TEMPLATE,
    }


def load_tokenizer(folder: Path) -> ChatTokenizer:
    return ChatTokenizer(Tokenizer.from_file(str(folder / "tokenizer.json")))


def train_bpe(texts: Iterable[str], vocab_size: int) -> ChatTokenizer:
    """Learn the merges; ids 0..4 are the special tokens, 5..260 the bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return ChatTokenizer(tokenizer)
