"""From a configuration to an engine: reads the models, sizes the cache.

Owns: device, dtype and memory decisions at start-up. Must never be needed after it.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path

import torch

from speculator.config import Config
from speculator.engine import Engine
from speculator.errors import CheckpointError, ConfigError
from speculator.heads.base import DraftHead
from speculator.heads.load import load_head
from speculator.types import EngineInfo
from target.cache import PagedCache, bytes_per_token
from target.errors import CheckpointError as TargetCheckpointError
from target.llama import Llama
from target.weights import load_llama

log = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]  # what is loaded, tensors done, tensors in all

CPU_CACHE_BYTES = 2 << 30
GPU_CACHE_SHARE = 0.8  # of what is free once the weights are in
SCRATCH_TOKENS = 64 + 16 + 17  # an expansion of the deepest tree after the longest accepted path


def load_engine(config: Config, progress: Progress | None = None) -> Engine:
    """Load target and head by path; CheckpointError or ConfigError say in one sentence what is wrong."""
    device = resolve_device(config.model.device)
    if config.engine.threads:
        torch.set_num_threads(config.engine.threads)
    target = load_target(config, device, progress)
    head = _load_head(config, target, device, progress)
    info = engine_info(config, target, head, device)
    groups = [target.cache_layers] + ([head.cache_layers] if head else [])
    dtype = next(target.parameters()).dtype
    cache = PagedCache(groups, info.total_pages, info.page_size, dtype, device)
    log.info("KV cache: %d pages of %d tokens, %.1f MiB", cache.pages, cache.page_size, cache.bytes / 2**20)
    return Engine(info, target, head, cache)


def resolve_device(name: str) -> torch.device:
    """`auto` takes the first GPU when there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"model.device {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def load_target(config: Config, device: torch.device, progress: Progress | None = None) -> Llama:
    """The target in the dtype that `model.dtype` names; `auto` is float32 on a CPU, as stored on a GPU."""
    if not config.model.target:
        raise ConfigError("model.target is empty: name the folder of the target model")
    folder = Path(config.model.target)
    try:
        dtype = _dtype(config.model.dtype, folder, device)
        tick = (lambda done, total: progress("target", done, total)) if progress else None
        return load_llama(folder, dtype, device, tick)
    except TargetCheckpointError as error:
        raise CheckpointError(str(error)) from None


def _dtype(name: str, folder: Path, device: torch.device) -> torch.dtype:
    from target.config import load_config

    if name == "auto":
        name = "float32" if device.type == "cpu" else load_config(folder).dtype
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _load_head(config: Config, target: Llama, device: torch.device, progress: Progress | None) -> DraftHead | None:
    if not config.model.head:
        return None
    dtype = next(target.parameters()).dtype
    tick = (lambda done, total: progress("head", done, total)) if progress else None
    return load_head(Path(config.model.head), target, dtype, device, config.model.head_overrides, tick)


def engine_info(config: Config, target: Llama, head: DraftHead | None, device: torch.device) -> EngineInfo:
    """Limits and names of the engine about to be built."""
    context = config.engine.max_context or target.config.max_position
    tokens = config.engine.kv_tokens or _affordable_tokens(config, target, head, device, context)
    page = config.engine.page_size
    name = config.model.served_name or Path(config.model.target).resolve().name
    return EngineInfo(
        target_model=name,
        draft_model=Path(config.model.head).resolve().name if head else "",
        draft_method=head.record.kind if head else "none",
        vocab_size=target.config.vocab_size,
        eos_token_ids=target.config.eos_token_ids,
        max_context=context,
        max_rows=config.engine.max_sessions,
        page_size=page,
        total_pages=-(-tokens // page) + 1,
        scratch_tokens=SCRATCH_TOKENS,
        prefill_chunk=config.engine.prefill_chunk,
        default_shape=config.draft.shape,
        default_rule=config.sampling.rule,
    )


def _affordable_tokens(
    config: Config, target: Llama, head: DraftHead | None, device: torch.device, context: int
) -> int:
    """Tokens of cache: all sessions at full length, or what memory allows."""
    groups = [target.cache_layers] + ([head.cache_layers] if head else [])
    each = bytes_per_token(groups, next(target.parameters()).dtype)
    budget = CPU_CACHE_BYTES
    if device.type == "cuda":
        budget = int(torch.cuda.mem_get_info(device)[0] * GPU_CACHE_SHARE)
    wanted = config.engine.max_sessions * (context + SCRATCH_TOKENS + config.engine.page_size)
    return min(wanted, budget // each)


def fingerprint(folder: Path) -> str:
    """First 16 hex digits of a hash over the weight files' names, sizes and headers: the revision clients see."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.bin")) + [folder / "config.json"]:
        digest.update(f"{path.name}:{path.stat().st_size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 16))
    return digest.hexdigest()[:16]
