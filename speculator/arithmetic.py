"""Which products the models of an engine multiply by, and what output that no draft can change asks of them.

Owns: the choice at start-up and its refusals. Must never be needed after it.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from speculator.config import Config
from speculator.errors import ConfigError
from speculator.heads.base import DraftHead
from speculator.types import Rule
from target.decoder import Decoder
from target.errors import PlanError
from target.packed import pack_products
from target.products import Table, choose_products, fast_product, fixed_product, library

log = logging.getLogger(__name__)


def choose_arithmetic(config: Config, target: Decoder, head: DraftHead | None, device: torch.device, mode: str) -> None:
    """Give target and head their products; `mode` is that of the graphs. ConfigError for what cannot be had.

    In invariant mode the target multiplies in fixed order, and its passes attend in fixed order too. The head may do as
    it likes: what it drafts decides how many tokens a round commits, never which.
    """
    try:
        table = Table.read(Path(config.engine.product_table) if config.engine.product_table else None)
        _say_where_it_holds(config, table, device)
        product = fast_product(device, table) if config.engine.products == "auto" else library
        for model in (target, head):
            if model is not None:
                choose_products(model, product)
        packs = config.engine.products == "auto" and device.type == "cpu"
        if packs and head is not None:
            pack_products(head, head.lm_table)
        if config.engine.invariant:
            _check_invariant(config, target, device, mode)
            choose_products(target, fixed_product(device, table))
        elif packs:
            pack_products(target, target.head_weight)
    except PlanError as error:
        raise ConfigError(str(error)) from None


def _say_where_it_holds(config: Config, table: Table, device: torch.device) -> None:
    """Log which device the choices are for, where it is another one and they would have been asked."""
    asked = config.engine.products == "auto" or config.engine.invariant
    if not asked or device.type != "cuda" or table.holds_for(device):
        return
    name = torch.cuda.get_device_name(device)
    where = config.engine.product_table or "the table that comes along"
    (log.warning if config.engine.product_table else log.info)(
        "products were measured on %s in %s and not on %s: `speculator bench skinny` measures them", table.device,
        where, name,
    )  # fmt: skip


def _check_invariant(config: Config, target: Decoder, device: torch.device, mode: str) -> None:
    """ConfigError where something of a pass has no fixed order, or a draft decides what is committed."""
    c = target.config
    kinds = {"latent attention": c.mla, "routed experts": c.moe, "recurrent layers": c.delta}
    if found := [kind for kind, there in kinds.items() if there is not None]:
        raise ConfigError(f"engine.invariant serves dense targets with grouped-query attention, not {found[0]}")
    if config.sampling.rule is not Rule.COUPLED:
        rule = config.sampling.rule.value
        raise ConfigError(f'engine.invariant needs sampling.rule "coupled": under "{rule}" drafts choose among tokens')
    if device.type == "cpu" and mode != "off":
        raise ConfigError(
            "engine.invariant on a CPU runs one token at a time, which graphs cannot record: set them off"
        )
