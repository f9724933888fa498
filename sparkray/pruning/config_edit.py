"""config.json after a cut: every spelling of the expert count that is there, and none that is not."""

from __future__ import annotations

import copy
from typing import Any

from sparkray.pruning.families import EXPERT_COUNT_KEYS, Family
from sparkray.pruning.layout import Layout, TensorRole, layer_id, layer_of
from sparkray.pruning.plan import PrunePlan
from sparkray.pruning.surgery import renumbered

# Lists of module names that a quantiser leaves alone; single experts may be named there.
_MODULE_LISTS = ("ignore", "ignored_layers", "modules_to_not_convert", "exclude_modules")


def edited_config(config: dict[str, Any], family: Family, layout: Layout, plan: PrunePlan) -> dict[str, Any]:
    """A copy of `config` for `plan.num_experts_after` experts a layer.

    transformers lets an alias win over the main key, so a spelling that kept the old number would be believed.
    """
    edited = copy.deepcopy(config)
    parts = [edited] if family.text_config is None else [edited, edited[family.text_config]]
    for part in parts:
        for key in EXPERT_COUNT_KEYS:
            if isinstance(part.get(key), int):
                part[key] = plan.num_experts_after
        # Ernie's remote code keeps one capacity a phase, equal to the number of experts.
        if isinstance(part.get("moe_capacity"), list):
            part["moe_capacity"] = [
                plan.num_experts_after if value == layout.num_experts else value for value in part["moe_capacity"]
            ]
        for quantisation in (part.get("quantization_config"), part.get("compression_config")):
            if isinstance(quantisation, dict):
                _renumber_modules(quantisation, family, plan)
    return edited


def _renumber_modules(quantisation: dict[str, Any], family: Family, plan: PrunePlan) -> None:
    for key in _MODULE_LISTS:
        names = quantisation.get(key)
        if isinstance(names, list):
            moved = [_renumber(name, family, plan) if isinstance(name, str) else name for name in names]
            quantisation[key] = [name for name in moved if name is not None]


def _renumber(name: str, family: Family, plan: PrunePlan) -> str | None:
    place = layer_of(name)
    prefix = f"{family.block}.experts."
    if place is None or not place[2].startswith(prefix):
        return name
    number = place[2].removeprefix(prefix).split(".", 1)[0]
    layer = layer_id(place[0], place[1])
    if not number.isdigit() or layer not in plan.kept:
        return name
    return renumbered(name, TensorRole("expert", layer, expert=int(number)), plan.kept)
