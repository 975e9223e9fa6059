"""The depth policy at start-up: from a cost table that is read, or measured on the engine before it serves.

Owns: when there is a policy at all. Must never be needed after the start.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from speculator.config import Config
from speculator.costs import CostTable, measure_costs, read_costs, save_costs
from speculator.drafts import fitted
from speculator.engine import Engine
from speculator.errors import ConfigError
from speculator.load import graph_mode
from speculator.policy import DepthPolicy, menu
from speculator.types import DraftShape

log = logging.getLogger(__name__)


def depth_policy(config: Config, engine: Engine) -> DepthPolicy | None:
    """The policy over what rounds cost on this engine, which must serve nobody yet; None where there is none to be.

    ConfigError for a cost table that cannot be read or written, or is of other models.
    """
    chosen, shape = config.policy, fitted(config.draft.shape, engine.info)
    known = bool(chosen.costs) or _measures(config, engine.device)
    known = known and not engine.info.rank_pages  # a round of all ranks takes as long as the slowest one's
    if chosen.mode == "off" or engine.info.draft_method == "none" or not shape.depth or not known:
        return None
    shapes = menu(shape, _recorded_depths(config, engine))
    try:
        costs = _costs(config, engine, shapes)
    except ConfigError as error:
        if chosen.measure == "on" or chosen.costs:
            raise
        log.warning("drafts are always as deep as configured: %s", error.message)
        return None
    log.info("drafts by cost: %s", ", ".join(f"depth {s.depth} {costs.seconds(1, s, 0) * 1e3:.2f} ms" for s in shapes))
    return DepthPolicy(shapes, costs)


def _measures(config: Config, device: torch.device) -> bool:
    """`auto` measures where a round is short enough to be timed often: on a GPU."""
    return config.policy.measure == "on" or (config.policy.measure == "auto" and device.type == "cuda")


def _recorded_depths(config: Config, engine: Engine) -> tuple[int, ...] | None:
    """Depths of chains that have graphs of their own; None where every draft runs at its own size."""
    if engine.rounds is not None:
        return config.graphs.round_depths
    return None if graph_mode(config, engine.device) == "off" or config.draft.shape.is_chain else ()


def _costs(config: Config, engine: Engine, shapes: Sequence[DraftShape]) -> CostTable:
    """From the file that the configuration names if it is there, else measured, and written there."""
    info, path = engine.info, Path(config.policy.costs)
    device = torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else engine.device.type
    subject = {"target": info.target_model, "head": info.draft_model, "device": device}
    subject["graphs"] = graph_mode(config, engine.device)
    if config.policy.costs and path.exists():
        return read_costs(path, subject)
    if config.policy.measure == "off":
        raise ConfigError(f"The cost table {path} is not there, and policy.measure is off.")
    with engine.recurrent.anywhere():
        costs = measure_costs(engine, shapes, subject, seconds=config.policy.measure_seconds)
    if config.policy.costs:
        save_costs(costs, path)
    return costs
