"""What a model's name means: `embedded`, a local directory, or a hub id. Light: nothing is loaded or fetched."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from sparkray.errors import InputError, NotFoundError
from sparkray.models.embedded import MODEL_ID, embedded_path
from sparkray.models.hub import cached_hub_ids, cached_snapshot, is_offline

EMBEDDED = "embedded"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_ACCEPTED = f"Accepted: '{EMBEDDED}', a directory that holds config.json, or a hub id such as 'org/name'."


class ModelKind(StrEnum):
    """Where a model comes from."""

    EMBEDDED = "embedded"
    LOCAL = "local"
    HUB = "hub"


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model that was found.

    Attributes:
        name: what the user gave.
        path_or_id: the directory (for `embedded` where it lies once prepared), or the hub id.
        kind: where it comes from.
        model_id: the name that clients of a server use.
    """

    name: str
    path_or_id: str
    kind: ModelKind
    model_id: str


def resolve_model(name: str) -> ModelSource:
    """Say what `name` is. An existing directory wins over a hub id of the same spelling.

    Raises:
        NotFoundError: no such directory, a word that is neither, or a hub id that is not in the local cache while
            the hub is switched off; the message names close matches.
        InputError: a file, or a directory without config.json.
        MissingExtraError: `embedded` without its wheel.
    """
    if name == EMBEDDED:
        return ModelSource(name, str(embedded_path()), ModelKind.EMBEDDED, MODEL_ID)
    path = Path(name).expanduser()
    # os.path and not Path.is_dir: a name that is too long or not allowed to be read is simply no directory.
    if name and os.path.isdir(path):  # noqa: PTH112
        _check_directory(name, path)
        return ModelSource(name, str(path.resolve()), ModelKind.LOCAL, path.resolve().name)
    if os.path.isfile(path):  # noqa: PTH113
        raise InputError(f"model {name!r} is a file, and a directory is expected. {_ACCEPTED}", param="model")
    if name.startswith(("/", "./", "../", "~")):
        raise _not_found(f"model {name!r} was given, and there is no such directory.", name, _siblings(path))
    if not _HUB_ID.fullmatch(name):
        raise _not_found(f"model {name!r} is not known.", name, [EMBEDDED, *cached_hub_ids()])
    if is_offline() and cached_snapshot(name) is None:
        raise _not_found(
            f"model {name!r} reads as a hub id, but the hub is switched off (HF_HUB_OFFLINE=1) and the local cache "
            "does not hold it; there is no directory of that name either.",
            name,
            [EMBEDDED, *cached_hub_ids(), *_siblings(path)],
        )
    return ModelSource(name, name, ModelKind.HUB, name)


def _check_directory(name: str, path: Path) -> None:
    if (path / "config.json").is_file():
        return
    held = sorted(entry.name for entry in path.iterdir())
    shown = ", ".join(held[:6]) + (", ..." if len(held) > 6 else "") if held else "nothing"
    raise InputError(f"model directory {name!r} holds no config.json (it holds {shown}). {_ACCEPTED}", param="model")


def _siblings(path: Path) -> list[str]:
    parent = path.parent
    return [str(entry) for entry in parent.iterdir() if entry.is_dir()] if parent.is_dir() else []


def _not_found(message: str, name: str, candidates: list[str]) -> NotFoundError:
    close = difflib.get_close_matches(name, candidates, n=3, cutoff=0.6)
    meant = f"Did you mean {' or '.join(map(repr, close))}? " if close else ""
    return NotFoundError(message, hint=meant + _ACCEPTED, param="model")
