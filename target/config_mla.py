"""The sizes of multi-head latent attention, read from a published config.

Must never know tensors or other parts of the config.
"""

from __future__ import annotations

from dataclasses import dataclass

from target.errors import CheckpointError
from target.keys import Raw, read_int, require


@dataclass(frozen=True)
class MlaConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): a token caches `rank + rope_dim` values a layer."""

    q_rank: int | None  # q_lora_rank; None projects the queries at once
    rank: int  # kv_lora_rank
    nope_dim: int  # of a query or key head, without position
    rope_dim: int  # of a query head, and of the one key that all heads share
    value_dim: int
    interleaved: bool = True  # the rotary pairs are (2i, 2i + 1), not the two halves

    @property
    def query_dim(self) -> int:
        return self.nope_dim + self.rope_dim

    @property
    def latent_dim(self) -> int:
        return self.rank + self.rope_dim


def parse_mla(raw: Raw, where: str) -> MlaConfig:
    """CheckpointError names the key that is missing or unusable."""
    require(raw, "attention_bias", where, False)
    if "q_lora_rank" not in raw:
        raise CheckpointError(f"{where}: q_lora_rank is missing; it is null where queries have no low rank")
    mla = MlaConfig(
        q_rank=None if raw["q_lora_rank"] is None else read_int(raw, "q_lora_rank", where),
        rank=read_int(raw, "kv_lora_rank", where),
        nope_dim=read_int(raw, "qk_nope_head_dim", where),
        rope_dim=read_int(raw, "qk_rope_head_dim", where),
        value_dim=read_int(raw, "v_head_dim", where),
        interleaved=bool(raw.get("rope_interleave", True)),
    )
    if mla.rope_dim % 2:
        raise CheckpointError(f"{where}: qk_rope_head_dim must be even for rotary embeddings, got {mla.rope_dim}")
    return mla
