"""Recorded entropies on disk: a folder that `jobs/watch_prompts.py` wrote, or JSONL with `entropies` in each line.

`sparkray metis record` writes such lines; theirs say the model and the temperature too.
"""

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
        UsageError: it cannot be read as one, or its answers were made in different ways, or under the boost.
        InputError: a line's `entropies` are not a list of numbers.
    """
    if path.is_dir():
        return _read_folder(path)
    if path.is_file():
        return _read_lines(path)
    raise NotFoundError(
        f"there is no recording {str(path)!r}.", hint="Make one with `sparkray metis record` or jobs/watch_prompts.py."
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


def _read_lines(path: Path) -> Recording:
    rows, models, temperatures = [], set(), set()
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                answer = json.loads(line)
                rows.append(answer["entropies"])
                models.add(answer.get("model"))
                temperatures.add(answer.get("temperature"))
            except (ValueError, KeyError, TypeError, AttributeError) as failure:
                raise UsageError(
                    f"line {number} of {path} is not an object with `entropies`: {failure!r}."
                ) from failure
    for name, values in (("models", models), ("temperatures", temperatures)):
        if len(values) > 1:
            raise UsageError(
                f"{path} holds answers of several {name}: {', '.join(sorted(map(str, values)))}.",
                hint="A profile is of one model at one temperature: give each a file of its own.",
            )
    return Recording(tuple(_streams(rows)), *models, *temperatures)


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
