"""From a configuration to an engine: reads the models, sizes the cache.

Owns: device, dtype and memory decisions at start-up. Must never be needed after it.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from graphs.memory import NO_GRAPHS, CacheSizeError, Reading, cuda_meter
from speculator.arithmetic import choose_arithmetic
from speculator.capture import record_passes
from speculator.chains import WHY as TREES_REFUSED
from speculator.chains import is_tree
from speculator.config import Config
from speculator.drafts import filled
from speculator.engine import Engine
from speculator.errors import CheckpointError, ConfigError
from speculator.heads.base import DraftHead
from speculator.heads.formats import read_head
from speculator.heads.load import load_head
from speculator.heads.reading import TargetFacts
from speculator.heads.record import HeadRecord
from speculator.passes import EagerPasses, eager_passes
from speculator.ranks.data import agreed_sizes, check_data_parallel, join_passes, shared_engine
from speculator.ranks.engine import LeadEngine
from speculator.ranks.link import Loopback
from speculator.ranks.stages import EarlyStage, LastStage, LeadStage
from speculator.ranks.team import Team
from speculator.recorded import Sizes
from speculator.recurrent import state_bytes, state_cache
from speculator.sampling import gumbel_of
from speculator.sizing import Load, MakePasses, Sized, cache_groups, measure
from speculator.staged import staged_passes
from speculator.types import EngineInfo
from target.cache import PagedCache, bytes_per_token
from target.config import load_config
from target.decoder import Decoder
from target.errors import CheckpointError as TargetCheckpointError
from target.errors import PlanError
from target.experts import ExpertDecoder
from target.fused import fuse_where_possible
from target.load import load_target as read_target
from target.model import Target
from target.parallel import ALONE, Axis, ParallelDecoder
from target.pipeline import WHOLE, Stage
from target.products import kernels_need
from target.readout import choose_readers
from target.states import StateCache

log = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]  # what is loaded, tensors done, tensors in all

CPU_CACHE_BYTES = 2 << 30
SCRATCH_TOKENS = 64 + 16 + 17  # an expansion of the deepest tree after the longest accepted path


def load_engine(config: Config, progress: Progress | None = None, team: Team | None = None) -> Engine:
    """Load target and head by path; CheckpointError or ConfigError say in one sentence what is wrong.

    With a `team` of ranks every one of them calls this, and gets an engine over its own shard.
    """
    device = team.device if team else resolve_device(config.model.device)
    if team is not None and team.experts is not None:
        check_data_parallel(config)
    if config.engine.threads:
        torch.set_num_threads(config.engine.threads)

    stage = team.stage if team else WHOLE
    axis = (team.experts or team.mesh.tensor) if team else ALONE
    record = head_record(config) if stage.size > 1 else None

    def build() -> tuple[Decoder, DraftHead | None]:
        embeds = stage.last and record is not None and not record.own_embed
        target = load_target(config, device, progress, axis, stage, embeds)
        return target, _load_head(config, target, device, progress) if stage.last else None

    return build_engine(config, device, build, progress, team, record)


Build = Callable[[], tuple[Decoder, DraftHead | None]]


def build_engine(
    config: Config,
    device: torch.device,
    build: Build,
    progress: Progress | None = None,
    team: Team | None = None,
    record: HeadRecord | None = None,
) -> Engine:
    """An engine around the models that `build` puts on the device: cache sized, passes recorded.

    On a stage of a pipeline `record` is that of the head, which the last one has.
    """
    config = with_page_size(config, device)
    before = cuda_meter(device)() if device.type == "cuda" else None
    target, head = build()
    if team is not None:
        team.heed(target, head)
    if isinstance(target, ParallelDecoder):
        target.noise = gumbel_of
    choose_arithmetic(config, target, head, device, graph_mode(config, device))
    _fuse(device, target, head)
    if target.state_layers and is_tree(config.draft.shape):
        raise ConfigError(f"draft.branching {config.draft.branching}: {TREES_REFUSED}; set draft.branching to 1")
    states = _states(config, target)
    mode, sizes = graph_mode(config, device), graph_sizes(config, target)
    passes = _passes_for(team, record)
    sized = _measured(target, head, _load(config, target, sizes, mode), before, states, passes) if before else None
    pages = sized.plan.pages if sized else _cpu_pages(config, target, head)
    if team is not None and team.experts is None:  # one cache in shards, not one for each rank
        pages = team.smallest(pages, "pages of the KV cache")
    info = engine_info(config, target, head.record if head else record, pages)
    info = replace(info, pipeline_parallel=team.stage.size if team else 1)
    dtype = next(target.parameters()).dtype
    cache = PagedCache(cache_groups(target, head), info.total_pages, info.page_size, dtype, device)
    log.info("KV cache: %d pages of %d tokens, %.1f MiB", cache.pages, cache.page_size, cache.bytes / 2**20)
    if team is not None and team.link is not None:
        engine: Engine = _stage_engine(info, target, head, cache, team, record)
    else:
        engine = _engine(info, target, head, cache, states, team)
    if mode != "off" and team is not None and team.experts is not None:
        sizes = agreed_sizes(team, sizes, info)
    if mode != "off" and sizes.rows:
        depths = config.graphs.round_depths if mode == "round" else None
        record_passes(engine, sizes, sized.graphs if sized else NO_GRAPHS, progress, depths, team)
    if team is not None and isinstance(target, ExpertDecoder):
        join_passes(engine, target.exchange, team)
    return engine


def _fuse(device: torch.device, target: Decoder, head: DraftHead | None) -> None:
    try:
        taken = fuse_where_possible(device, target, head)
        choose_readers(device, target, head)
    except PlanError as error:
        raise ConfigError(str(error)) from None
    if taken:
        log.info("%d modules of the layers run on fused kernels", taken)
    if device.type == "cuda" and (need := kernels_need(device)):
        log.warning("torch's own operations serve in place of kernels, slower: the kernels need %s", need)


def _states(config: Config, target: Decoder) -> StateCache | None:
    """A slot for every session that may be open, taken before the KV cache is sized; None without recurrent layers."""
    rows = config.engine.max_sessions
    try:
        states = state_cache(target, rows)
    except RuntimeError as error:
        size = state_bytes(target, rows) / 2**30
        text = f"the recurrent states of {rows} sessions take {size:.2f} GiB, which cannot be had"
        raise ConfigError(f"{text}: lower engine.max_sessions ({str(error).splitlines()[0]})") from None
    if states is not None:
        log.info("recurrent states: %d slots, %.1f MiB", states.slots, states.bytes / 2**20)
    return states


def _measured(
    target: Decoder,
    head: DraftHead | None,
    load: Load,
    before: Reading,
    states: StateCache | None = None,
    passes: MakePasses = eager_passes,
) -> Sized:
    try:
        return measure(target, head, load, before, states, passes)
    except (CacheSizeError, PlanError) as error:
        raise ConfigError(str(error)) from None


def _engine(
    info: EngineInfo,
    target: Decoder,
    head: DraftHead | None,
    cache: PagedCache,
    states: StateCache | None = None,
    team: Team | None = None,
) -> Engine:
    try:
        if team is not None and isinstance(target, ExpertDecoder):
            return shared_engine(team, info, target, head, cache)
        if team is not None and team.rank == 0:
            return LeadEngine(team.channel, team.lost, team.pulse, info, target, head, cache, states=states)
        return Engine(info, target, head, cache, states=states)
    except PlanError as error:  # an attention backend that cannot run here
        raise ConfigError(str(error)) from None


def _stage_engine(
    info: EngineInfo,
    target: Decoder,
    head: DraftHead | None,
    cache: PagedCache,
    team: Team,
    record: HeadRecord | None,
) -> Engine:
    assert team.link is not None
    try:
        passes = staged_passes(team.link, _taps(record), target, head, cache)
    except PlanError as error:  # an attention backend that cannot run here
        raise ConfigError(str(error)) from None
    parts = (team.link, info, target, head, cache, passes)
    if team.rank == 0:
        return LeadStage(team.channel, team.lost, team.pulse, *parts)
    return (LastStage if team.stage.last else EarlyStage)(*parts)


def _taps(record: HeadRecord | None) -> tuple[int, ...]:
    return record.boundaries if record else ()


def _passes_for(team: Team | None, record: HeadRecord | None) -> MakePasses:
    """How the passes of this rank are made to be measured: a stage by itself."""
    if team is None or team.link is None:
        return eager_passes
    alone = Loopback(team.stage, team.device)

    def staged(target: Target, head: DraftHead | None, cache: PagedCache, states: object = None) -> EagerPasses:
        assert isinstance(target, Decoder)
        return staged_passes(alone, _taps(record), target, head, cache)

    return staged


def check_graphs(config: Config) -> None:
    """ConfigError for graphs that stages of a pipeline cannot have."""
    if config.graphs.mode in ("piecewise", "round"):
        text = f"graphs.mode {config.graphs.mode} records what no stage of a pipeline has to itself"
        raise ConfigError(f'{text}: set it to "split", which records each stage\'s passes of a round')


def head_record(config: Config) -> HeadRecord | None:
    """What the head is, read before any weights are kept; None without one. CheckpointError where it does not fit."""
    if not config.model.head:
        return None
    try:
        facts = TargetFacts.of(load_config(Path(config.model.target)))
    except TargetCheckpointError as error:
        raise CheckpointError(str(error)) from None
    return read_head(head_folder(config), facts, config.model.head_overrides).record


def with_page_size(config: Config, device: torch.device) -> Config:
    """The configuration with the page size that suits the device where none is given."""
    size = config.engine.page_size or (64 if device.type == "cuda" else 16)
    return replace(config, engine=replace(config.engine, page_size=size))


def graph_mode(config: Config, device: torch.device) -> str:
    """`auto` records where launching costs more than computing, on a GPU, and there the most that the ranks can."""
    if config.graphs.mode != "auto":
        return config.graphs.mode
    if device.type != "cuda":
        return "off"
    if config.parallel.pipeline > 1:
        return "split"
    return "piecewise" if config.parallel.attention_data else "round"


def graph_sizes(config: Config, target: Decoder) -> Sizes:
    """The shapes that recorded passes come in."""
    page = config.engine.page_size
    context = config.engine.max_context or target.config.max_position
    return Sizes(
        rows=config.graphs.rows or min(config.engine.max_sessions, 32),
        pages=-(-(context + SCRATCH_TOKENS) // page),
        page_size=page,
        shape=filled(config.draft.shape),  # as sessions ask for it
        prompt_tokens=config.graphs.prompt_tokens if config.graphs.mode != "split" else 0,
        every_rule=config.graphs.every_rule,
    )


def _load(config: Config, target: Decoder, sizes: Sizes, mode: str) -> Load:
    engine = config.engine
    rounds = config.graphs.round_depths if mode == "round" and target.config.delta is None else None
    return Load(sizes, engine.max_sessions, engine.prefill_chunk, mode != "off", rounds, engine.memory_share)


def resolve_device(name: str) -> torch.device:
    """`auto` takes the first GPU when there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"model.device {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def load_target(
    config: Config,
    device: torch.device,
    progress: Progress | None = None,
    axis: Axis = ALONE,
    stage: Stage = WHOLE,
    embeds: bool = False,
) -> Decoder:
    """The target in the dtype that `model.dtype` names; `auto` is float32 on a CPU, as stored on a GPU."""
    if not config.model.target:
        raise ConfigError("model.target is empty: name the folder of the target model")
    folder = Path(config.model.target)
    try:
        dtype = _dtype(config.model.dtype, folder, device)
        tick = (lambda done, total: progress("target", done, total)) if progress else None
        return read_target(folder, dtype, device, tick, axis, stage, embeds)
    except TargetCheckpointError as error:
        raise CheckpointError(str(error)) from None
    except PlanError as error:  # ranks that do not divide it
        raise ConfigError(str(error)) from None


def _dtype(name: str, folder: Path, device: torch.device) -> torch.dtype:
    if name == "auto":
        name = "float32" if device.type == "cpu" else load_config(folder).dtype
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _load_head(config: Config, target: Decoder, device: torch.device, progress: Progress | None) -> DraftHead | None:
    if not config.model.head:
        return None
    dtype = next(target.parameters()).dtype
    tick = (lambda done, total: progress("head", done, total)) if progress else None
    shard = config.parallel.head == "shard"
    return load_head(head_folder(config), target, dtype, device, config.model.head_overrides, tick, shard=shard)


def head_folder(config: Config) -> Path:
    """`mtp` names the modules inside the target's own folder."""
    return Path(config.model.target if config.model.head == "mtp" else config.model.head)


def engine_info(config: Config, target: Decoder, head: HeadRecord | None, pages: int) -> EngineInfo:
    """Limits and names of the engine about to be built; `pages` is what memory allows."""
    context = config.engine.max_context or target.config.max_position
    page = config.engine.page_size
    wanted = config.engine.kv_tokens or config.engine.max_sessions * (context + SCRATCH_TOKENS + page)
    if config.engine.kv_tokens > pages * page:
        log.warning("engine.kv_tokens asks for %d tokens, memory holds %d", config.engine.kv_tokens, pages * page)
    info = EngineInfo(
        target_model=config.model.served_name or Path(config.model.target).resolve().name,
        draft_model=head_folder(config).resolve().name if head else "",
        draft_method=head.kind if head else "none",
        vocab_size=target.config.vocab_size,
        eos_token_ids=target.config.eos_token_ids,
        max_context=context,
        max_rows=config.engine.max_sessions,
        page_size=page,
        total_pages=max(2, min(-(-wanted // page) + 1, pages)),
        scratch_tokens=SCRATCH_TOKENS,
        prefill_chunk=config.engine.prefill_chunk,
        default_shape=config.draft.shape,
        default_rule=config.sampling.rule,
        tensor_parallel=config.parallel.tensor,
        invariant=config.engine.invariant,
    )
    return replace(info, max_branching=1) if target.state_layers else info


def _cpu_pages(config: Config, target: Decoder, head: DraftHead | None) -> int:
    """What a fixed budget holds, or the tokens that were asked for."""
    each = bytes_per_token(cache_groups(target, head), next(target.parameters()).dtype)
    left = CPU_CACHE_BYTES - state_bytes(target, config.engine.max_sessions)
    tokens = max(left // each, config.engine.kv_tokens, config.engine.page_size)
    return -(-tokens // config.engine.page_size) + 1


def fingerprint(folder: Path) -> str:
    """First 16 hex digits of a hash over the weight files' names, sizes and beginnings: the revision clients see."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.bin")) + [folder / "config.json"]:
        digest.update(f"{path.name}:{path.stat().st_size}".encode())
        with path.open("rb") as file:
            digest.update(start := file.read(1 << 16))
            header = int.from_bytes(start[:8], "little") if path.suffix == ".safetensors" else 0
            if header > 1 << 15:  # names of many tensors, which other revisions have too: what follows tells them apart
                file.seek(8 + header)
                digest.update(file.read(1 << 16))
    return digest.hexdigest()[:16]
