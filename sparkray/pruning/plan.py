"""`reap_plan.json`: which experts of which layer stay, why, and for which model this was decided."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparkray.config.pruning import PlanConfig
from sparkray.errors import InputError, NotFoundError
from sparkray.pruning.checkpoint import Checkpoint
from sparkray.pruning.criteria import expert_scores
from sparkray.pruning.families import group_limits, top_k
from sparkray.pruning.layout import Layout, read_layout
from sparkray.pruning.selection import (
    RouterLimits,
    choose_experts,
    experts_to_keep,
    protected_experts,
    zero_count_experts,
)
from sparkray.pruning.sizes import checkpoint_size
from sparkray.pruning.statistics import Statistics
from sparkray.pruning.whole_files import write_atomically

PLAN_NAME = "reap_plan.json"
_VERSION = 1
_RESAMPLES = 16

# Group-limited routers that score a group by the sum of its best two experts.
_TWO_EXPERT_GROUPS = frozenset({"deepseek_v3", "dots1", "glm4_moe", "glm4_moe_lite"})

Experts = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class PrunePlan:
    """What is cut from one model.

    Attributes:
        model: identity of the checkpoint that this plan was made for.
        data: identity of the calibration set.
        kept: layer id -> experts that stay, ascending; prediction layers (MTP) included.
        scores: layer id -> score of every expert.
        frequency: layer id -> tokens routed to every expert.
        zero_count: layer id -> experts that no token was routed to.
        super_experts: layer id -> experts with outlying activations, whether or not they are protected.
        stability: mean Jaccard index between the kept sets and those of resampled shards, or None for one shard.
        bytes_before, bytes_after: tensor bytes of the checkpoint.
    """

    model: str
    data: str
    family: str
    criterion: str
    gate_source: str
    protect: str
    seed: int
    ratio: float
    num_experts_before: int
    num_experts_after: int
    kept: Experts
    scores: dict[str, tuple[float, ...]]
    frequency: dict[str, tuple[int, ...]]
    zero_count: Experts
    super_experts: Experts
    stability: float | None
    bytes_before: int
    bytes_after: int
    num_tokens: int
    notes: tuple[str, ...] = ()
    version: int = _VERSION

    @property
    def directory_name(self) -> str:
        """Name of the pruned directory, in the style of REAP's own: `reap-seed_42-0.25`."""
        # `perserve` is upstream's spelling, kept so that names can be compared.
        mark = {"none": "", "super": "-perserve_super", "outliers": "-perserve_outlier"}[self.protect]
        return f"{self.criterion}{mark}-seed_{self.seed}-{self.ratio:.2f}"

    @property
    def digest(self) -> str:
        """Hex digest of what a rewrite depends on."""
        relevant = [self.model, self.num_experts_after, sorted(self.kept.items())]
        return hashlib.sha256(json.dumps(relevant).encode()).hexdigest()

    def write(self, path: Path) -> None:
        write_atomically(path, (json.dumps(asdict(self), indent=1) + "\n").encode())


def make_plan(
    checkpoint: Checkpoint, parts: Sequence[Statistics], config: PlanConfig, *, data: str, gate_source: str = "model"
) -> PrunePlan:
    """Decide what is cut.

    Args:
        checkpoint: the model that was observed.
        parts: statistics of the shards, in order.
        config: criterion and size.
        data: identity of the calibration set.
        gate_source: how the statistics were taken.
    """
    layout = read_layout(checkpoint)
    statistics = Statistics.merged(parts)
    _check_layers(layout, statistics)
    size = checkpoint_size(checkpoint, layout)
    limits = router_limits(checkpoint)
    keep, notes = experts_to_keep(config, size, limits)
    kept = choose_experts(statistics, keep, config, limits)
    stability = _stability(parts, kept, keep, config, limits)
    zero_count = zero_count_experts(statistics)
    if any(len(experts) > size.num_experts - keep for experts in zero_count.values()):
        notes.append("more experts than are cut got no token in some layer: the calibration set is too small to rank.")
    if layout.mtp_layers:
        # The forward does not visit prediction layers; they draft tokens and do not change answers.
        kept |= dict.fromkeys(layout.mtp_layers, kept[layout.layers[-1]])
        notes.append(f"prediction layers {', '.join(layout.mtp_layers)} keep the experts of layer {layout.layers[-1]}.")
    return PrunePlan(
        model=checkpoint.identity,
        data=data,
        family=checkpoint.family.model_type,
        criterion=config.criterion,
        gate_source=gate_source,
        protect=config.protect,
        seed=config.seed,
        ratio=1 - keep / size.num_experts,
        num_experts_before=size.num_experts,
        num_experts_after=keep,
        kept=kept,
        scores={
            layer: tuple(expert_scores(sums, config.criterion, layer=layer, seed=config.seed).tolist())
            for layer, sums in statistics.items()
        },
        frequency={layer: tuple(int(count) for count in sums.values["count"]) for layer, sums in statistics.items()},
        zero_count=zero_count,
        super_experts=protected_experts(statistics, "outliers"),
        stability=stability,
        bytes_before=size.bytes_with(size.num_experts),
        bytes_after=size.bytes_with(keep),
        num_tokens=next(iter(statistics.values())).num_tokens,
        notes=tuple(notes),
    )


def read_plan(path: Path) -> PrunePlan:
    """A plan from its file, or from the directory that holds it.

    Raises:
        NotFoundError, InputError: no such file, or not a plan of this version.
    """
    path = path / PLAN_NAME if path.is_dir() else path
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as failure:
        raise NotFoundError(f"the plan {path} does not exist.", hint="`sparkray prune plan` makes one.") from failure
    except ValueError as failure:
        raise InputError(f"{path} is not a plan: it is not JSON ({failure}).") from failure
    if not isinstance(data, dict) or data.get("version") != _VERSION:
        raise InputError(
            f"{path} is not a plan of version {_VERSION}.", hint="Make it again with `sparkray prune plan`."
        )
    for field in ("kept", "scores", "frequency", "zero_count", "super_experts"):
        data[field] = {layer: tuple(values) for layer, values in data[field].items()}
    data["notes"] = tuple(data["notes"])
    try:
        return PrunePlan(**data)
    except TypeError as failure:
        raise InputError(f"{path} is not a plan of version {_VERSION}: {failure}.") from failure


def check_plan(plan: PrunePlan, checkpoint: Checkpoint, layout: Layout) -> None:
    """Refuse a plan that was made for another model, or that does not cover this one.

    Raises:
        InputError: says what differs.
    """
    if plan.model != checkpoint.identity:
        raise InputError(
            f"the plan was made for another model (a {plan.family} model with {plan.num_experts_before} experts,"
            f" identity {plan.model[:12]}) than {checkpoint.directory} (identity {checkpoint.identity[:12]}).",
            hint="Observe and plan again with this model.",
        )
    if set(plan.kept) != {*layout.layers, *layout.mtp_layers}:
        raise InputError(
            f"the plan names the layers {sorted(plan.kept)}, and the model has experts in {layout.layers}."
        )
    for layer, experts in plan.kept.items():
        valid = list(experts) == sorted(set(experts)) and all(0 <= expert < layout.num_experts for expert in experts)
        if len(experts) != plan.num_experts_after or not valid:
            raise InputError(
                f"the plan keeps {list(experts)} in layer {layer}, and {plan.num_experts_after} different experts"
                f" below {layout.num_experts}, ascending, are expected."
            )


def router_limits(checkpoint: Checkpoint) -> RouterLimits:
    """What this model's router needs."""
    num_groups, open_groups = group_limits(checkpoint.config, checkpoint.family)
    needed = 2 if checkpoint.family.model_type in _TWO_EXPERT_GROUPS else 1
    return RouterLimits(top_k(checkpoint.config, checkpoint.family), num_groups, open_groups, needed)


def _check_layers(layout: Layout, statistics: Statistics) -> None:
    if set(statistics) != set(layout.layers):
        raise InputError(
            f"the statistics are of layers {sorted(statistics)}, and the model has experts in {list(layout.layers)}."
        )


def _stability(
    parts: Sequence[Statistics], kept: Experts, keep: int, config: PlanConfig, limits: RouterLimits
) -> float | None:
    """Mean Jaccard index of the kept sets when whole shards are drawn again with replacement (bootstrap)."""
    if len(parts) < 2:
        return None
    generator = np.random.default_rng(config.seed)
    indices = []
    for _ in range(_RESAMPLES):
        drawn = Statistics.merged(parts[place] for place in generator.integers(0, len(parts), len(parts)))
        for layer, experts in choose_experts(drawn, keep, config, limits).items():
            both, either = len(set(experts) & set(kept[layer])), len(set(experts) | set(kept[layer]))
            indices.append(both / either)
    return float(np.mean(indices))


def plan_summary(plan: PrunePlan) -> dict[str, Any]:
    """The plan without its long tables, for a command's output."""
    return {
        "directory": plan.directory_name,
        "family": plan.family,
        "criterion": plan.criterion,
        "ratio": plan.ratio,
        "num_experts_before": plan.num_experts_before,
        "num_experts_after": plan.num_experts_after,
        "gb_before": plan.bytes_before / 1e9,
        "gb_after": plan.bytes_after / 1e9,
        "stability": plan.stability,
        "num_tokens": plan.num_tokens,
        "num_zero_count": sum(len(experts) for experts in plan.zero_count.values()),
        "super_experts": plan.super_experts,
        "notes": list(plan.notes),
    }
