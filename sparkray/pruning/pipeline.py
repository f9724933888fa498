"""All stages in order: observe, plan, rewrite, check. Each goes on where a killed run left it.

WORK/observations/KEY/shard-00000.npz     partial sums
WORK/pruned_models/reap-seed_42-0.25/     the pruned checkpoint, with reap_plan.json, reap_report.json and
                                          reap_heatmap.png
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from sparkray.config.pruning import CalibrationConfig, ObserveConfig, PlanConfig, PruneConfig, ValidateConfig
from sparkray.pruning.calibration import CalibrationSet, read_calibration
from sparkray.pruning.checkpoint import Checkpoint
from sparkray.pruning.families import text_config
from sparkray.pruning.heatmap import write_heatmap
from sparkray.pruning.layout import read_layout
from sparkray.pruning.observation import Progress, observation_key, observe
from sparkray.pruning.partials import PartialStore
from sparkray.pruning.plan import PrunePlan, make_plan, plan_summary, router_limits
from sparkray.pruning.rewrite import ShardRunner, rewrite
from sparkray.pruning.selection import experts_to_keep
from sparkray.pruning.sizes import checkpoint_size
from sparkray.pruning.statistics import Statistics
from sparkray.pruning.tokenize import tokenizer_of
from sparkray.pruning.validate import Comparison, broken_bounds, check_structure, compare, require_bounds
from sparkray.pruning.whole_files import write_atomically

REPORT_NAME = "reap_report.json"
HEATMAP_NAME = "reap_heatmap.png"

# Opens a progress bar with a description; gives the function that moves it.
Bar = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]
# Observes what a store lacks: `observe` in this process, `actors.cluster_observe(...)` over a cluster.
Observe = Callable[[Checkpoint, CalibrationSet, ObserveConfig, PartialStore, Progress | None], Statistics]


def default_work(model: Path, source: str) -> Path:
    """`artifacts/MODEL/DATA`: where partial sums and results go when no folder is named."""
    name = Path(source).stem if Path(source).is_file() else re.sub(r"[^\w.+-]+", "_", source).strip("_")
    return Path("artifacts") / model.resolve().name / name


def load_data(checkpoint: Checkpoint, source: Path | str, config: CalibrationConfig) -> CalibrationSet:
    """A calibration set, read with the model's own tokenizer and cut, where it is cut, to the model's context."""
    context = text_config(checkpoint.config, checkpoint.family).get("max_position_embeddings")
    if config.long_text != "refuse" and isinstance(context, int) and context < config.max_sequence_tokens:
        config = config.model_copy(update={"max_sequence_tokens": context})
    return read_calibration(source, config, tokenizer_of(checkpoint.directory))


def observe_stage(
    checkpoint: Checkpoint,
    data: CalibrationSet,
    config: ObserveConfig,
    work: Path,
    bar: Bar,
    run: Observe = observe,
) -> list[Statistics]:
    """Statistics of every shard, observed now or before."""
    store = PartialStore(work / "observations", observation_key(checkpoint, data, config))
    with bar("observe") as progress:
        run(checkpoint, data, config, store, progress)
    return [store.read(shard.number) for shard in data.shards(config.shard_sequences)]


def check_request(checkpoint: Checkpoint, config: PlanConfig) -> None:
    """Refuse an impossible cut before hours are spent on observing."""
    experts_to_keep(config, checkpoint_size(checkpoint, read_layout(checkpoint)), router_limits(checkpoint))


def plan_stage(
    checkpoint: Checkpoint, parts: Sequence[Statistics], data: CalibrationSet, config: PruneConfig
) -> PrunePlan:
    """The plan for these statistics."""
    return make_plan(checkpoint, parts, config.plan, data=data.identity, gate_source=config.observe.gate_source)


def validate_stage(
    before: Checkpoint, after: Path, data: CalibrationSet, config: ValidateConfig, bar: Bar
) -> Comparison:
    """Structure first, then both models over the same tokens."""
    check_structure(after)
    picked = CalibrationSet(data.sequences[: config.max_sequences])
    with bar("check") as progress:
        if config.engine == "vllm":
            from sparkray.pruning.vllm_compare import compare_by_vllm

            return compare_by_vllm(before, Checkpoint(after), picked, config, progress)
        return compare(before, Checkpoint(after), picked, config, progress)


def write_report(
    directory: Path, plan: PrunePlan, comparison: Comparison | None, config: ValidateConfig
) -> dict[str, Any]:
    """`reap_report.json`, and the heat map where matplotlib is installed; returns the report."""
    report: dict[str, Any] = {
        "plan": plan_summary(plan),
        "routed_share_lost": routed_share_lost(plan),
        "check": None if comparison is None else comparison.to_json(),
        "broken_bounds": [] if comparison is None else broken_bounds(comparison, config),
        "heatmap": None,
    }
    if importlib.util.find_spec("matplotlib") is not None:
        write_heatmap(plan, directory / HEATMAP_NAME)
        report["heatmap"] = HEATMAP_NAME
    write_atomically(directory / REPORT_NAME, (json.dumps(report, indent=1) + "\n").encode())
    return report


def routed_share_lost(plan: PrunePlan) -> dict[str, float]:
    """Layer id -> share of routed (token, expert) pairs that went to experts which are cut."""
    lost = {}
    for layer, counts in plan.frequency.items():
        kept = sum(counts[expert] for expert in plan.kept[layer])
        lost[layer] = 1 - kept / max(1, sum(counts))
    return lost


def prune_experts(
    model: Path,
    source: Path | str,
    config: PruneConfig,
    *,
    work: Path,
    out: Path | None,
    bar: Bar,
    check: bool = True,
    dry_run: bool = False,
    run_observe: Observe = observe,
    run_shards: ShardRunner = map,
) -> dict[str, Any]:
    """From a checkpoint to a pruned and checked one.

    Args:
        model: the source directory, which is only read.
        source: calibration file, or sets named as in calibration_sources.py.
        config: all settings.
        work: folder of the partial sums; the same folder lets a killed run go on.
        out: directory of the pruned checkpoint; WORK/pruned_models/NAME when None.
        bar: progress bars.
        check: compare both models at the end.
        dry_run: observe and plan, and write no checkpoint.
        run_observe: how shards of the calibration set are observed.
        run_shards: how shards of the checkpoint are written.

    Returns:
        The report with `directory`, `num_bytes` and `num_bytes_before`.

    Raises:
        CheckFailedError: a bound of `config.check` is broken; the checkpoint and its report are kept.
    """
    checkpoint = Checkpoint(model)
    check_request(checkpoint, config.plan)
    data = load_data(checkpoint, source, config.calibration)
    parts = observe_stage(checkpoint, data, config.observe, work, bar, run_observe)
    plan = plan_stage(checkpoint, parts, data, config)
    target = out or work / "pruned_models" / plan.directory_name
    if not dry_run:
        target.parent.mkdir(parents=True, exist_ok=True)
    with bar("rewrite") as progress:
        summary = rewrite(checkpoint, plan, target, dry_run=dry_run, run=run_shards, progress=progress)
    place = {
        "directory": str(target),
        "num_bytes": summary.num_bytes,
        "num_bytes_before": summary.num_bytes_before,
    }
    if dry_run:
        return place | {"plan": plan_summary(plan)}
    comparison = validate_stage(checkpoint, target, data, config.check, bar) if check else None
    report = write_report(target, plan, comparison, config.check)
    if comparison is not None:
        require_bounds(comparison, config.check)
    return place | report
