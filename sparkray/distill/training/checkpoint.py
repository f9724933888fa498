"""Checkpoints of one process: everything that decides the next step, written whole or not at all.

A checkpoint counts once its folder has its final name; a kill while writing leaves a `.building` folder that nobody
reads and the next write replaces.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from sparkray.errors import UsageError

_NAME = re.compile(r"step-(\d{8})")


def checkpoint_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lies."""
    return folder / f"step-{step:08d}"


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None."""
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)]
    return max(found, key=lambda path: path.name, default=None)


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], run: dict[str, Any], keep: int) -> Path:
    """Write the state after `step` steps and drop the oldest checkpoints above `keep`.

    Args:
        folder: of all checkpoints.
        step: steps done.
        state: tensors and plain values, as `torch.load(weights_only=True)` accepts them.
        run: what the run is; a checkpoint is only resumed by the same one.
        keep: checkpoints that stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = checkpoint_folder(folder, step)
    building = folder / f"{target.name}.building"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    torch.save({**state, "step": step}, building / "state.pt")
    (building / "run.json").write_text(json.dumps(run, indent=1, sort_keys=True), encoding="utf-8")
    if target.exists():
        shutil.rmtree(target)
    building.rename(target)
    for old in sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name))[:-keep]:
        shutil.rmtree(old)
    return target


def load_checkpoint(path: Path, run: dict[str, Any]) -> dict[str, Any]:
    """The state of a checkpoint.

    Raises:
        UsageError: another run's; the message names what differs.
    """
    found = json.loads((path / "run.json").read_text(encoding="utf-8"))
    differing = sorted(key for key in {*found, *run} if found.get(key) != run.get(key))
    if differing:
        raise UsageError(
            f"the checkpoint {path} belongs to another run: {', '.join(differing)} differ.",
            hint="Give another output folder, or the settings it was made with.",
            param="out",
        )
    state: dict[str, Any] = torch.load(path / "state.pt", weights_only=True, map_location="cpu")
    return state
