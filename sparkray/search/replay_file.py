"""A search kept as a file: its events with their times, to be shown again on the page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparkray.errors import InputError, NotFoundError

_FORMAT = "sparkray-search-events"
_VERSION = 1


def write_replay(path: Path, question: str, events: Sequence[Mapping[str, Any]]) -> None:
    """Write the events of one search as JSON, to a temporary file first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    data = {"format": _FORMAT, "version": _VERSION, "question": question, "events": list(events)}
    temporary.write_text(json.dumps(data, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_replay(path: Path) -> dict[str, Any]:
    """What `write_replay` wrote.

    Raises:
        NotFoundError: no such file.
        InputError: not such a file, or one of another version.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as failure:
        raise NotFoundError(f"there is no recorded search {str(path)!r}.") from failure
    except (OSError, ValueError) as failure:
        raise InputError(f"the recorded search {str(path)!r} cannot be read: {failure}.") from failure
    if not isinstance(data, dict) or data.get("format") != _FORMAT or data.get("version") != _VERSION:
        raise InputError(f"{str(path)!r} is not a recorded search of version {_VERSION}.")
    return data
