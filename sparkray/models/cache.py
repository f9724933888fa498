"""A folder that is made once from one file: under a lock, whole or not at all, and checked by hash.

The folder is built beside its place under another name and renamed, so a process that dies midway leaves nothing
that looks finished. `MANIFEST` in it lists the SHA-256 of every file and of the source; whatever does not agree
with it is made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from sparkray.errors import UnavailableError, WaitTimeoutError

MANIFEST = "sparkray-manifest.json"
LOCK_TIMEOUT_SECONDS = 600.0

_logger = logging.getLogger(__name__)


def cache_root() -> Path:
    """The folder of everything that can be made again: `SPARKRAY_CACHE`, or `sparkray` under the XDG cache."""
    if chosen := os.environ.get("SPARKRAY_CACHE"):
        return Path(chosen).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "sparkray"


def ensure_folder(
    target: Path,
    source: Path,
    build: Callable[[Path], None],
    *,
    lock_timeout_seconds: float = LOCK_TIMEOUT_SECONDS,
) -> Path:
    """`target`, made by `build(folder)` unless it is there and whole.

    Args:
        target: the folder's final place.
        source: the file that it is made from; another content means another folder.
        build: fills an empty folder that it is given.
        lock_timeout_seconds: how long another process may be busy making the same folder.

    Raises:
        UnavailableError: the cache cannot be written.
        WaitTimeoutError: the lock was not free in time.
    """
    source_sha256 = file_sha256(source)
    if damage_of(target, source_sha256) is None:
        return target
    lock = target.with_name(f"{target.name}.lock")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock, timeout=lock_timeout_seconds):
            damage = damage_of(target, source_sha256)
            if damage is None:  # another process made it while this one waited
                return target
            if target.exists():
                _logger.warning("%s is damaged (%s) and is made again", target, damage)
            _replace(target, source_sha256, build)
    except Timeout:
        raise WaitTimeoutError(
            f"another process has held {lock} for {lock_timeout_seconds:g} s while preparing {target.name}.",
            hint="Wait for it, or end it; a lock whose owner is gone is free by itself.",
        ) from None
    except OSError as failure:
        raise UnavailableError(
            f"the model cache {target.parent} cannot be written: {failure.strerror or failure}.",
            hint="Set SPARKRAY_CACHE to a folder that you may write, with about 300 MB free.",
        ) from failure
    return target


def damage_of(folder: Path, source_sha256: str | None = None) -> str | None:
    """What is wrong with a made folder, or None if every file has the hash that was noted when it was made.

    Args:
        folder: a folder that `ensure_folder` made, or none.
        source_sha256: hash of the file that it should have been made from; None leaves this out.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        noted_source, noted_files = manifest["source_sha256"], dict(manifest["files"])
    except FileNotFoundError:
        return "not prepared"
    except (OSError, ValueError, KeyError, TypeError) as failure:
        return f"{MANIFEST} cannot be read: {failure}"
    if source_sha256 not in (None, noted_source):
        return "made from another file"
    for name, sha256 in noted_files.items():
        try:
            if file_sha256(folder / name) != sha256:
                return f"{name} has changed"
        except OSError:
            return f"{name} is missing"
    return None


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _replace(target: Path, source_sha256: str, build: Callable[[Path], None]) -> None:
    # The lock is held, so whatever stands under these names was left by a process that died.
    building = target.with_name(f"{target.name}.building")
    discarded = target.with_name(f"{target.name}.discarded")
    for leftover in (building, discarded):
        if leftover.exists():
            shutil.rmtree(leftover)
    building.mkdir()
    build(building)
    files = {path.name: file_sha256(path) for path in sorted(building.iterdir())}
    manifest = {"source_sha256": source_sha256, "files": files}
    (building / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    if target.exists():
        target.rename(discarded)
    building.rename(target)
    if discarded.exists():
        shutil.rmtree(discarded)
