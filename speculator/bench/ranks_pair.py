"""A pair of random models on disk whose sizes four ranks divide, for what needs a start-up and no text.

Must never be used where acceptance or text matters.
"""

from __future__ import annotations

from pathlib import Path

import torch

from speculator.bench.synthetic import eagle3_record, random_weights
from speculator.bundled import Pair
from speculator.heads.load import build_head
from speculator.heads.save import save_head
from target.config import parse_config
from target.decoder import Decoder
from target.save import save_target

CPU = torch.device("cpu")
SIZES = dict(
    architectures=["LlamaForCausalLM"],
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=5,
    num_attention_heads=8,
    num_key_value_heads=4,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    max_position_embeddings=512,
    torch_dtype="float32",
)


def write_pair(folder: Path, seed: int = 0) -> Pair:
    """Writes a target, without a tokenizer, and an EAGLE-3 head below `folder`."""
    torch.manual_seed(seed)
    target = random_weights(Decoder(parse_config(SIZES)), torch.float32, CPU)
    record = eagle3_record(target.config, target.config.vocab_size // 2)
    head = build_head(record, target, torch.arange(record.draft_vocab_size))
    head = random_weights(head, torch.float32, CPU)
    head.target_ids = torch.arange(record.draft_vocab_size)
    save_target(target, folder / "target", torch.float32)
    save_head(head, folder / "eagle3", dtype=torch.float32)
    return Pair(folder.name, folder / "target", folder / "eagle3")
