"""How families name the MTP modules inside a target's folder.

Owns: prefixes, spellings, and finding the modules by name. Must never know values or what a config claims of them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from speculator.heads.record import HeadRecord
from target.config import FAMILIES, ModelConfig
from target.names import FUSED_EXPERTS, layer_slots
from target.weights import Slot

COMMON_CLAIM = "num_nextn_predict_layers"


class MtpLayout(NamedTuple):
    """One family's spelling. A module's other tensors are named as those of the target's layers are."""

    family: str
    prefix: str  # before the number of a module
    own: Mapping[str, str]  # published name below the prefix -> our parameter, in every module
    tables: Mapping[str, str]  # the same for tables over the vocabulary, which may be left out
    numbered_on: bool  # modules are numbered on from the target's layers, not from 0
    hidden_first: bool
    outer: str = ""  # prefix of `own` where all modules would share those, so that a folder can hold one module only
    claim: str = COMMON_CLAIM  # the config's key for the number of modules

    def at(self, module: int, config: ModelConfig) -> str:
        """The prefix of a module, with its dot."""
        return f"{self.prefix}{module + self.first(config)}."

    def first(self, config: ModelConfig) -> int:
        return config.num_layers if self.numbered_on else 0

    def own_names(self, module: int, config: ModelConfig) -> dict[str, str]:
        """Published name -> our parameter, of what a module holds beside its layer."""
        prefix = self.outer or self.at(module, config)
        return {f"{prefix}{name}": parameter for name, parameter in self.own.items()}

    def in_common(self, names: Collection[str]) -> set[str]:
        """Those of `names` that modules share."""
        return {f"{self.outer}{name}" for name in self.own} & set(names) if self.outer else set()


_DEEPSEEK = {
    "enorm.weight": "embedding_norm.weight",
    "hnorm.weight": "hidden_norm.weight",
    "eh_proj.weight": "eh_proj.weight",
    "shared_head.norm.weight": "norm.weight",
}
_MIMO = {
    "token_layernorm.weight": "embedding_norm.weight",
    "hidden_layernorm.weight": "hidden_norm.weight",
    "input_proj.weight": "eh_proj.weight",
    "final_layernorm.weight": "norm.weight",
}
_HYBRID = {
    "pre_fc_norm_embedding.weight": "embedding_norm.weight",
    "pre_fc_norm_hidden.weight": "hidden_norm.weight",
    "fc.weight": "eh_proj.weight",
    "norm.weight": "norm.weight",
}
_COPIES = {"embed_tokens.weight": "embed.weight", "shared_head.head.weight": "lm_head.weight"}

LAYOUTS = (
    MtpLayout("DeepSeek-V3 and GLM-4.5", "model.layers.", _DEEPSEEK, _COPIES, True, False),
    MtpLayout("MiMo-7B", "model.mtp_layers.", _MIMO, {}, False, True),
    MtpLayout("Qwen3-Next and Qwen3.5", "mtp.layers.", _HYBRID, {}, False, False, "mtp.", "mtp_num_hidden_layers"),
)


class Modules(NamedTuple):
    """The MTP modules of a folder; `names` are all published names below their prefixes."""

    layout: MtpLayout
    number: int
    names: frozenset[str]


def find_modules(names: Collection[str], config: ModelConfig) -> Modules | None:
    """The modules that a target's folder holds, whole or in part; None when it holds none."""
    for layout in LAYOUTS:
        numbers = _numbers(names, layout.prefix)
        modules = {name: number - layout.first(config) for name, number in numbers.items()}
        held = {name: module for name, module in modules.items() if module >= 0}
        shared = layout.in_common(names) if layout is layout_of(config) else set()
        if held or shared:
            return Modules(layout, 1 + max(held.values(), default=0), frozenset(held) | shared)
    return None


def layout_of(config: ModelConfig) -> MtpLayout | None:
    """The layout that a target's family is published in."""
    prefix = FAMILIES[config.architecture].mtp
    return next((layout for layout in LAYOUTS if prefix in (layout.prefix, layout.outer) and prefix), None)


def _numbers(names: Iterable[str], prefix: str) -> dict[str, int]:
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    matches = ((name, pattern.match(name)) for name in names)
    return {name: int(match[1]) for name, match in matches if match and not name.endswith("rotary_emb.inv_freq")}


def mtp_slots(modules: Modules, config: ModelConfig, record: HeadRecord) -> dict[str, Slot]:
    """Published name -> our parameter, for every tensor that the modules of this record hold."""
    tables = {"embed.weight": record.own_embed, "lm_head.weight": record.own_lm_head}
    held = {name: place for name, place in modules.layout.tables.items() if tables[place]}
    fused = any(name.endswith(FUSED_EXPERTS) for name in modules.names)
    if not modules.names:
        fused = FAMILIES[config.architecture].moe == "qwen3_5"
    slots: dict[str, Slot] = {}
    for i in range(record.modules):
        theirs, ours = modules.layout.at(i, config), f"later.{i - 1}." if i else ""
        own = modules.layout.own_names(i, config) | {f"{theirs}{name}": place for name, place in held.items()}
        slots |= {name: Slot(f"{ours}{parameter}") for name, parameter in own.items()}
        slots |= layer_slots(config, config.num_layers + i, theirs, f"{ours}layer.", fused)
    return slots
