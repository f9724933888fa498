"""Recorded entropies on disk: a folder that `jobs/watch_prompts.py` wrote, or JSONL with `entropies` in each line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparkray.errors import InputError, NotFoundError, UsageError

Stream = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Recording:
    """Answers, an entropy stream each, and how they were made as far as the recording says.

    Attributes:
        streams: bits, in the order of the tokens; a token without entropy ends one stream and begins another.
        model, temperature: None where unknown.
    """

    streams: tuple[Stream, ...]
    model: str | None = None
    temperature: float | None = None


def read_recording(path: Path) -> Recording:
    """Read a folder of Parquet parts or a JSONL file.

    Raises:
        NotFoundError: there is no such file or folder.
        UsageError: it cannot be read as one, or the boost acted while it was recorded.
        InputError: a line's `entropies` are not a list of numbers.
    """
    if path.is_dir():
        return _read_folder(path)
    if path.is_file():
        return Recording(tuple(_streams(_json_lines(path))))
    raise NotFoundError(
        f"there is no recording {str(path)!r}.", hint="Give a folder of jobs/watch_prompts.py or a JSONL file."
    )


def _read_folder(folder: Path) -> Recording:
    import pyarrow as pa
    import pyarrow.parquet as pq

    parts = sorted(folder.glob("part-*.parquet"))
    if not parts:
        raise UsageError(f"{folder} holds no part-*.parquet.", hint="Give the output folder of jobs/watch_prompts.py.")
    settings = _settings(folder / "_run.json")
    if settings.get("boost", "off") != "off":
        raise UsageError(
            f"{folder} was recorded with the boost {settings['boost']!r}, which changes what a model writes.",
            hint="Record the reference with boost=off.",
        )
    try:
        columns = [pq.read_table(part, columns=["entropies"])["entropies"].to_pylist() for part in parts]
    except (pa.ArrowException, OSError, KeyError) as failure:
        raise UsageError(f"the parts in {folder} cannot be read: {failure}.") from failure
    rows = (row for column in columns for row in column if row is not None)
    return Recording(tuple(_streams(rows)), settings.get("model"), settings.get("temperature"))


def _settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as failure:
        raise UsageError(f"{path} cannot be read: {failure}.") from failure
    return settings


def _json_lines(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)["entropies"]
            except (ValueError, KeyError, TypeError) as failure:
                raise UsageError(
                    f"line {number} of {path} is not an object with `entropies`: {failure!r}."
                ) from failure


def _streams(rows: Iterable[Any]) -> Iterator[Stream]:
    for number, row in enumerate(rows, start=1):
        try:
            entropies = np.asarray(row, dtype=np.float64)
        except (TypeError, ValueError) as failure:
            raise InputError(f"the entropies of answer {number} are not a list of numbers: {failure}.") from failure
        if entropies.ndim != 1:
            raise InputError(f"the entropies of answer {number} are not a list of numbers.")
        gaps = np.flatnonzero(np.isnan(entropies))
        yield from (piece[~np.isnan(piece)] for piece in np.split(entropies, gaps) if np.isfinite(piece).any())
