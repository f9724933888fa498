"""From a checkpoint and a plan to a smaller checkpoint: shards, index, config, and everything that comes along.

The new directory is built beside its final name (`NAME.partial`) and renamed when it is whole. Every finished shard
has a record there, so a killed rewrite goes on with the shards that are missing. The source is only read.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from sparkray.errors import InputError, UnavailableError, UsageError
from sparkray.pruning.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint
from sparkray.pruning.config_edit import edited_config
from sparkray.pruning.layout import Layout, read_layout
from sparkray.pruning.plan import PLAN_NAME, PrunePlan, check_plan, read_plan
from sparkray.pruning.surgery import ShardCut, ShardRecord, plan_shard, write_shard
from sparkray.pruning.whole_files import fsync_directory, write_atomically

MANIFEST_NAME = "checksums.json"
_MARK_NAME = ".rewrite.json"
_SPARE_BYTES = 64 * 1024 * 1024

# Weights in other formats do not come along: they would still hold all experts.
_OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
_KEPT_FOLDERS = ("additional_chat_templates",)

# Runs shard writers; `map` here, tasks of a cluster elsewhere.
ShardRunner = Callable[[Callable[[ShardCut], ShardRecord], Iterable[ShardCut]], Iterable[ShardRecord]]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class RewriteSummary:
    """What a rewrite wrote, or would write.

    Attributes:
        directory: the pruned checkpoint.
        num_bytes: its tensor bytes.
        num_bytes_before: those of the source.
        num_shards: shards of the new checkpoint.
        num_reused: shards that an earlier, interrupted run had finished.
    """

    directory: Path
    num_bytes: int
    num_bytes_before: int
    num_shards: int
    num_reused: int


def rewrite(
    checkpoint: Checkpoint,
    plan: PrunePlan,
    target: Path,
    *,
    dry_run: bool = False,
    run: ShardRunner = map,
    progress: Progress | None = None,
) -> RewriteSummary:
    """Write the pruned checkpoint to `target`.

    A `target` that this plan already wrote is left as it is.

    Raises:
        InputError: the plan is another model's, or the checkpoint has tensors that are not known.
        UsageError: `target` exists and is something else, or lies inside the source.
        UnavailableError: there is not enough space.
    """
    layout = read_layout(checkpoint)
    check_plan(plan, checkpoint, layout)
    _check_target(checkpoint, target)
    building = target.with_name(f"{target.name}.partial")
    cuts = [cut for cut in _shard_cuts(checkpoint, layout, plan, building) if cut.tensors]
    num_bytes = sum(cut.num_bytes for cut in cuts)
    before = sum(tensor.num_bytes for tensor in checkpoint.tensors.values())
    if dry_run:
        return RewriteSummary(target, num_bytes, before, len(cuts), 0)
    if target.exists():
        _check_finished(target, plan)
        _remove_marks(target)
        return RewriteSummary(target, num_bytes, before, len(cuts), len(cuts))
    _open_building(building, plan)
    done = {record.name: record for record in _finished(building, cuts)}
    missing = [cut for cut in cuts if cut.target.name not in done]
    _check_space(building, sum(cut.num_bytes for cut in missing))
    num_reused = len(done)
    for record in run(write_shard, missing):
        write_atomically(_record_path(building, record.name), json.dumps(asdict(record)).encode())
        done[record.name] = record
        if progress is not None:
            progress(len(done), len(cuts))
    _write_rest(checkpoint, layout, plan, building, cuts, done)
    building.replace(target)
    fsync_directory(target.parent)
    _remove_marks(target)
    return RewriteSummary(target, num_bytes, before, len(cuts), num_reused)


def _shard_cuts(checkpoint: Checkpoint, layout: Layout, plan: PrunePlan, building: Path) -> Iterator[ShardCut]:
    for name, header in checkpoint.headers.items():
        yield plan_shard(header, layout, plan.kept, checkpoint.directory / name, building / name)


def _write_rest(
    checkpoint: Checkpoint,
    layout: Layout,
    plan: PrunePlan,
    building: Path,
    cuts: list[ShardCut],
    records: dict[str, ShardRecord],
) -> None:
    """Config, index, plan, checksums and the source's other files."""
    _copy_others(checkpoint.directory, building)
    config = edited_config(checkpoint.config, checkpoint.family, layout, plan)
    _write_json(building / "config.json", config)
    names = [cut.target.name for cut in cuts]
    if names != [SINGLE_NAME]:
        weight_map = {tensor.name: cut.target.name for cut in cuts for tensor in cut.tensors}
        total = sum(cut.num_bytes for cut in cuts)
        _write_json(building / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
    plan.write(building / PLAN_NAME)
    _write_json(building / MANIFEST_NAME, {name: asdict(records[name]) for name in names})


def _copy_others(source: Path, target: Path) -> None:
    written_anew = {"config.json", INDEX_NAME, PLAN_NAME, MANIFEST_NAME}
    for path in sorted(source.iterdir()):
        if path.is_dir():
            if path.name in _KEPT_FOLDERS:
                shutil.copytree(path, target / path.name, dirs_exist_ok=True)
        elif path.name not in written_anew and path.suffix not in _OTHER_WEIGHTS and not path.name.startswith("."):
            write_atomically(target / path.name, path.read_bytes())


def _check_target(checkpoint: Checkpoint, target: Path) -> None:
    source, resolved = checkpoint.directory.resolve(), target.resolve()
    if resolved == source or source in resolved.parents:
        raise UsageError(f"the output {target} lies in the source {checkpoint.directory}, which is never written to.")


def _check_finished(target: Path, plan: PrunePlan) -> None:
    if (target / PLAN_NAME).is_file() and read_plan(target).digest == plan.digest:
        return
    raise UsageError(
        f"the output directory {target} exists and does not hold this plan's checkpoint.",
        hint="Name another one with --out, or remove it.",
    )


def _open_building(building: Path, plan: PrunePlan) -> None:
    mark = building / _MARK_NAME
    if building.exists() and not mark.is_file() and any(building.iterdir()):
        raise UsageError(f"{building} exists and is no interrupted rewrite.", hint="Remove it, or name another --out.")
    if mark.is_file() and json.loads(mark.read_text(encoding="utf-8")).get("plan") != plan.digest:
        raise UsageError(
            f"{building} holds the interrupted rewrite of another plan.", hint="Remove it, or finish that plan first."
        )
    building.mkdir(parents=True, exist_ok=True)
    for torn in building.glob(".*.tmp"):
        torn.unlink()  # of a run that was killed: it may be as large as a shard
    write_atomically(mark, json.dumps({"plan": plan.digest}).encode())


def _finished(building: Path, cuts: list[ShardCut]) -> Iterator[ShardRecord]:
    for cut in cuts:
        path = _record_path(building, cut.target.name)
        if not path.is_file() or not cut.target.is_file():
            continue
        record = ShardRecord(**json.loads(path.read_text(encoding="utf-8")))
        if cut.target.stat().st_size == record.num_bytes:
            yield record


def _remove_marks(target: Path) -> None:
    for path in [target / _MARK_NAME, *target.glob(".*.record.json"), *target.glob(".*.tmp")]:
        path.unlink(missing_ok=True)


def _record_path(building: Path, shard: str) -> Path:
    return building / f".{shard}.record.json"


def _check_space(building: Path, needed: int) -> None:
    free = shutil.disk_usage(building).free
    if free < needed + _SPARE_BYTES:
        raise UnavailableError(
            f"{needed / 1e9:.2f} GB are to be written to {building.parent}, and {free / 1e9:.2f} GB are free.",
            hint="Free space, or name another --out.",
        )


def _write_json(path: Path, data: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(data, indent=2) + "\n").encode())


def verify_checksums(directory: Path) -> int:
    """Compare every shard with `checksums.json`; returns the number of shards.

    Raises:
        InputError: a shard differs, by its name.
    """
    manifest = json.loads((directory / MANIFEST_NAME).read_text(encoding="utf-8"))
    for name, record in manifest.items():
        with (directory / name).open("rb") as file:
            if hashlib.file_digest(file, xxhash.xxh3_128).hexdigest() != record["xxh3_128"]:
                raise InputError(
                    f"{directory / name} does not have the XXH3 checksum of {MANIFEST_NAME}: it was changed."
                )
    return len(manifest)
