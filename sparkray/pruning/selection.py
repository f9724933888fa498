"""Which experts stay: how many, guarded by what routers and engines need, and which by their scores."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sparkray.config.pruning import PlanConfig, ProtectRule
from sparkray.errors import InputError, UsageError
from sparkray.pruning.criteria import expert_scores
from sparkray.pruning.sizes import CheckpointSize
from sparkray.pruning.statistics import Array, LayerStatistics, Statistics

_SUPER_QUANTILE = 0.995
_SUPER_LAYERS = 0.75  # super experts are looked for in this first share of the sparse layers, outliers in all


@dataclass(frozen=True, slots=True)
class RouterLimits:
    """What a router needs of the number of experts.

    Attributes:
        top_k: experts a token is routed to.
        num_groups: expert groups, which must stay equal; 1 without groups.
        open_groups: groups that one token may use.
        group_score_experts: best experts of a group that are summed into its score.
    """

    top_k: int
    num_groups: int = 1
    open_groups: int = 1
    group_score_experts: int = 1


def experts_to_keep(config: PlanConfig, size: CheckpointSize, limits: RouterLimits) -> tuple[int, list[str]]:
    """(experts of a layer that stay, notes on rounding).

    Raises:
        UsageError: nothing would be cut, or fewer experts would stay than the router needs.
    """
    total = size.num_experts
    multiple = math.lcm(limits.num_groups, config.multiple_of)
    notes: list[str] = []
    if config.num_experts is not None:
        asked = config.num_experts
        if asked % multiple:
            raise UsageError(
                f"{asked} experts were asked for, and a multiple of {multiple} is needed"
                f" ({limits.num_groups} router groups, expert parallelism {config.multiple_of})."
            )
        keep = asked
    elif config.ratio is not None:
        asked = total - math.floor(total * config.ratio + 1e-9)
        keep = -(-asked // multiple) * multiple
    else:
        assert config.target_gb is not None
        asked = size.experts_within(config.target_gb * 1e9)
        keep = asked // multiple * multiple
        _check_target(config.target_gb, keep, size, limits)
    if keep != asked:
        notes.append(f"{asked} experts were rounded to {keep}, a multiple of {multiple}.")
    _check_count(keep, total, limits)
    return keep, notes


def choose_experts(
    statistics: Statistics, keep: int, config: PlanConfig, limits: RouterLimits
) -> dict[str, tuple[int, ...]]:
    """Layer id -> the experts that stay, ascending. Ties are cut from the lowest number on."""
    protected = protected_experts(statistics, config.protect)
    kept = {}
    for layer, sums in statistics.items():
        scores = expert_scores(sums, config.criterion, layer=layer, seed=config.seed)
        for expert in protected.get(layer, ()):
            scores[expert] = np.inf
        kept[layer] = _keep_highest(scores, keep, limits.num_groups, layer)
    return kept


def protected_experts(statistics: Mapping[str, LayerStatistics], rule: ProtectRule) -> dict[str, tuple[int, ...]]:
    """Layer id -> experts whose largest absolute activation stands out.

    The threshold is that of REAP's super experts, the larger of the 99.5 % quantile over all experts and a tenth of
    the largest; it looks at absolute values, and layers are named by their id.
    """
    if rule == "none":
        return {}
    layers = list(statistics)
    looked_at = layers if rule == "outliers" else layers[: max(1, math.floor(len(layers) * _SUPER_LAYERS))]
    everything = np.concatenate([statistics[layer].values["max_absolute"] for layer in layers])
    threshold = max(float(np.quantile(everything, _SUPER_QUANTILE)), float(everything.max()) / 10)
    found = {}
    for layer in looked_at:
        experts = np.flatnonzero(statistics[layer].values["max_absolute"] > threshold)
        if len(experts):
            found[layer] = tuple(int(expert) for expert in experts)
    return found


def zero_count_experts(statistics: Mapping[str, LayerStatistics]) -> dict[str, tuple[int, ...]]:
    """Layer id -> experts that no token was routed to: their score says nothing."""
    found = {}
    for layer, sums in statistics.items():
        experts = np.flatnonzero(sums.values["count"] == 0)
        if len(experts):
            found[layer] = tuple(int(expert) for expert in experts)
    return found


def _keep_highest(scores: Array, keep: int, num_groups: int, layer: str) -> tuple[int, ...]:
    group_size, kept_in_group = len(scores) // num_groups, keep // num_groups
    kept: list[int] = []
    for group in range(num_groups):
        first = group * group_size
        part = scores[first : first + group_size]
        if int(np.isinf(part).sum()) > kept_in_group:
            raise UsageError(
                f"layer {layer} has {int(np.isinf(part).sum())} protected experts and room for {kept_in_group}.",
                hint="Cut less, or protect none.",
            )
        order = np.argsort(part, kind="stable")
        kept += sorted(first + int(expert) for expert in order[group_size - kept_in_group :])
    return tuple(kept)


def _check_target(target_gb: float, keep: int, size: CheckpointSize, limits: RouterLimits) -> None:
    least = max(limits.top_k, limits.num_groups)
    if keep < least:
        raise UsageError(
            f"{target_gb:g} GB was asked for, and the checkpoint has {size.bytes_with(least) / 1e9:.2f} GB with"
            f" {least} experts a layer, the fewest that its router can use."
        )
    if keep >= size.num_experts:
        raise UsageError(
            f"{target_gb:g} GB was asked for, and the checkpoint has {size.bytes_with(size.num_experts) / 1e9:.2f} GB"
            " already: there is nothing to cut."
        )


def _check_count(keep: int, total: int, limits: RouterLimits) -> None:
    if total % limits.num_groups:
        raise InputError(f"{total} experts do not divide into the router's {limits.num_groups} groups.")
    if keep >= total:
        raise UsageError(f"{keep} of {total} experts would stay: nothing is cut.", hint="Ask for a larger ratio.")
    if keep < limits.top_k:
        raise UsageError(f"{keep} of {total} experts would stay, and the router picks {limits.top_k} for every token.")
    in_group = keep // limits.num_groups
    if in_group < limits.group_score_experts:
        raise UsageError(
            f"{in_group} experts would stay in a group, and the router scores a group by its best"
            f" {limits.group_score_experts}."
        )
    if in_group * limits.open_groups < limits.top_k:
        raise UsageError(
            f"{in_group} experts would stay in each of {limits.num_groups} groups; a token may use"
            f" {limits.open_groups} groups and is routed to {limits.top_k} experts."
        )
