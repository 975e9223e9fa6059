"""Where a pair's models lie: the target's folder, and the head's beside it or inside it.

Owns: the layout of a run's output. Must never know how models are trained.
"""

from __future__ import annotations

from pathlib import Path

from speculator.heads.base import DraftHead
from speculator.heads.load import load_head
from speculator.heads.mtp import MtpHead
from speculator.heads.mtp_save import save_mtp
from speculator.heads.save import save_head
from target.decoder import Decoder
from target.save import save_target


def target_folder(out: Path) -> Path:
    return out / "target"


def head_folder(out: Path, kind: str) -> Path:
    """MTP modules lie among the target's own tensors, as they are published."""
    return target_folder(out) if kind == "mtp" else out / kind


def save_trained_head(head: DraftHead, model: Decoder, out: Path) -> None:
    """Write a head in bfloat16 where it belongs; over an older one."""
    folder = head_folder(out, head.record.kind)
    if isinstance(head, MtpHead):
        save_target(model, folder)  # without the modules that may be there
        save_mtp(head, folder)
    else:
        save_head(head, folder)


def load_trained_head(kind: str, model: Decoder, out: Path) -> DraftHead:
    """The head of a run, in the target's dtype and on its device."""
    return load_head(head_folder(out, kind), model, model.embed.weight.dtype, model.embed.weight.device)
