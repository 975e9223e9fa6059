"""One process of a gang, from its place among the ranks to its end.

Owns: who starts whom, in which order a rank meets the others, and that it ends when the gang does. Must never know the
service. Ends this process by itself when a rank was lost, since its main thread may wait inside a collective for ever.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from speculator.config import Config
from speculator.engine import Engine
from speculator.errors import ConfigError, SpeculatorError
from speculator.heads.shard import shard_record
from speculator.load import check_graphs, head_record
from speculator.ranks.data import check_data_parallel, follower
from speculator.ranks.engine import LeadEngine
from speculator.ranks.errors import RankLostError, sentence
from speculator.ranks.faults import fault_of
from speculator.ranks.gang import Hub, Limits, Member, Watch
from speculator.ranks.identity import check_same, exchanged, identity
from speculator.ranks.launch import ADDRESS, TOKEN, Children, Place, kill_leader, own_command, variables
from speculator.ranks.pulse import Pulse
from speculator.ranks.team import Team
from target.config import load_config
from target.errors import CheckpointError, PlanError
from target.experts import EXPERTS, check_experts
from target.parallel import TENSOR, check_divides
from target.pipeline import check_stages

log = logging.getLogger(__name__)

RENDEZVOUS = timedelta(seconds=120)
GRACE = 3.0  # seconds for rank 0 to tell its sessions that a rank was lost
PATIENCE = 5.0  # and for the other ranks to end by themselves
LONGEST_WAIT = 3600.0  # seconds for a rank that goes on, however slowly; the watch ends waits for one that does not
KEY = "speculator/gang"

Progress = Callable[[str, int, int], None]


class Process:
    """This process among the ranks; a context manager. `team` is what engines are built with, `pulse` its progress.

    The process that nobody started as a rank starts the others and is rank 0.
    """

    def __init__(self, config: Config) -> None:
        check(config)
        self.config, self._children = config, Children()
        self._limits = Limits(config.parallel.silent_s, config.parallel.stalled_s, config.parallel.starting_s)
        place = Place.of(os.environ, config.parallel.ranks)
        self.rank = place.rank if place else 0
        self.pulse = Pulse(fault=fault_of(self.rank, os.environ))
        self._engine: LeadEngine | None = None
        self._serving = False
        self._watch: Watch | None = None
        self._place = place or self._launch()

    def _launch(self) -> Place:
        size, token = self.config.parallel.ranks, secrets.token_hex(16)
        hub = Hub(size, self.pulse, self._lost, token, describe=self._children.describe, limits=self._limits)
        shared = variables(size, hub.address, token)
        os.environ.update(shared, RANK="0", LOCAL_RANK="0")
        self._children.start(own_command(), shared)
        self._watch = hub
        hub.start()
        return Place(0, size, 0)

    def __enter__(self) -> Self:
        try:
            self.team = self._meet()
        except BaseException as error:
            self._close(error)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close(error)

    def _meet(self) -> Team:
        """The watch first: everything after it may wait for a rank that is gone."""
        place = self._place
        if place.rank and ADDRESS in os.environ:
            self._join(os.environ[ADDRESS], os.environ[TOKEN])
        with self.pulse.waiting():
            store, _, _ = next(iter(rendezvous("env://", timeout=RENDEZVOUS)))
            if self._watch is None:
                self._watch_by(store)
            dist.init_process_group("gloo", store=store, rank=place.rank, world_size=place.size, timeout=RENDEZVOUS)
        device = self._device()
        self.pulse.tick("meeting")
        own = identity(self.config, device)
        with self.pulse.waiting():
            check_same(exchanged(store, place, own))
            return self._team(device)

    def _team(self, device: torch.device) -> Team:
        parallel = self.config.parallel
        axis = EXPERTS if parallel.attention_data else TENSOR
        notes = (self.failed, self.pulse)
        return Team.build(parallel.tensor, device, LONGEST_WAIT, *notes, parallel.pipeline, axis)

    def _watch_by(self, store: Any) -> None:
        """Ranks that were started from outside find rank 0 through torch's store."""
        if self.rank == 0:
            token = secrets.token_hex(16)
            host, size = os.environ["MASTER_ADDR"], self._place.size
            hub = Hub(size, self.pulse, self._lost, token, host=host, limits=self._limits)
            store.set(KEY, f"{hub.address} {token}")
            self._watch = hub
            hub.start()
        else:
            self._join(*store.get(KEY).decode().split())

    def _join(self, address: str, token: str) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # rank 0 drains, and says when it is over
        self._watch = Member(self.rank, address, token, self.pulse, self._lost, self._limits)
        self._watch.start()

    def _device(self) -> torch.device:
        if not on_gpu(self.config):
            if not self.config.engine.threads:  # ranks of one machine share its cores
                torch.set_num_threads(max(1, (os.cpu_count() or 1) // self._place.size))
            return torch.device("cpu")
        device = torch.device("cuda", self._place.local)
        torch.cuda.set_device(device)
        return device

    def noting(self, shown: Progress) -> Progress:
        """The progress `shown`, which the watch hears too."""

        def tick(what: str, done: int, total: int) -> None:
            self.pulse.tick(what)
            shown(what, done, total)

        return tick

    # ---- rank 0

    def lead(self, engine: Engine) -> None:
        """From here on `engine` serves, and its sessions hear of a loss before this process ends."""
        assert isinstance(engine, LeadEngine)
        self._engine, self._serving = engine, True
        self.pulse.rest("serving")
        if self._watch is not None:
            self._watch.serving()

    def failed(self, why: str) -> str:
        """Rank 0 cannot go on; why the gang ends."""
        return self._watch.fail(why) if isinstance(self._watch, Hub) else why

    # ---- the others

    def follow(self, engine: Engine) -> None:
        """Run what rank 0 tells until the gang ends."""
        follower(engine, self.team).run()

    # ---- the end

    def _lost(self, why: str) -> None:
        """On the watch's thread: a rank was lost."""
        alone = self.rank == 1 and isinstance(self._watch, Member) and not self._watch.told  # it was rank 0
        if self.rank == 0 or alone:
            print(f"speculator: {why}; all ranks end", file=sys.stderr, flush=True)
        if alone:
            kill_leader()
        if self._engine is not None:
            self._engine.give_up(why)
        if self._serving:
            os.kill(os.getpid(), signal.SIGTERM)  # drains: sessions hear that they have to go
            threading.Event().wait(GRACE)
        self._children.kill()
        os._exit(1)

    def _close(self, error: BaseException | None) -> None:
        if error is not None and not isinstance(error, SystemExit):
            self._say(error)
        elif self._engine is not None:
            self._engine.end()
        if self._watch is not None:
            self._watch.end()
        self._children.end(PATIENCE)
        if self._watch is not None and self._watch.why:
            os._exit(1)
        if error is None:
            logging.shutdown()
            sys.stdout.flush()
            os._exit(0)  # without the farewell of process groups, which waits for ranks that have gone

    def _say(self, error: BaseException) -> None:
        """Tell the others why; an error that a lost rank may have caused gives way to the watch's own verdict."""
        why = f"rank {self.rank} failed in {self.pulse.beat.phase}: {sentence(error)}"
        if isinstance(self._watch, Member):
            self._watch.fail(why)
            os._exit(1)
        if isinstance(self._watch, Hub):
            clear = isinstance(error, SpeculatorError) and not isinstance(error, RankLostError)
            self._watch.end() if clear else self._watch.fail(why)


def on_gpu(config: Config) -> bool:
    return config.model.device == "cuda" or (config.model.device == "auto" and torch.cuda.is_available())


def check(config: Config) -> None:
    """ConfigError for ranks that cannot be, before any of them starts."""
    size = config.parallel.ranks
    if ":" in config.model.device:
        raise ConfigError(f"model.device {config.model.device} is one device, and {size} ranks need one each: say cuda")
    here = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if on_gpu(config) and here > torch.cuda.device_count():
        raise ConfigError(f"{here} ranks need {here} CUDA devices, and this machine has {torch.cuda.device_count()}")
    if config.engine.invariant:
        raise ConfigError("engine.invariant needs sums of one order, which ranks do not give: serve it on one device")
    if not config.model.target:
        raise ConfigError("model.target is empty: name the folder of the target model")
    divides = check_experts if config.parallel.attention_data else check_divides
    if config.parallel.attention_data:
        check_data_parallel(config)
    try:
        whole = load_config(Path(config.model.target))
        divides(whole, config.parallel.tensor)
        check_stages(whole, config.parallel.pipeline)
    except (PlanError, CheckpointError) as error:
        raise ConfigError(str(error)) from None
    if config.parallel.pipeline > 1:
        check_graphs(config)
    record = head_record(config)
    if record is not None and config.parallel.head == "shard":
        shard_record(record, config.parallel.tensor)
