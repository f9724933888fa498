"""Where calibration rows come from: `file.jsonl`, `reasoning-gym[chain_sum]:64`, `org/name[subset](split):1024`.

Several are joined by commas, as in REAP's own composite sets, each with a number of rows of its own:

    prompts.json,reasoning-gym[chain_sum+gcd]:128,theblackcat102/evol-codealpaca-v1(train):512

A file, or a folder of a dataset, is local. Any other name is asked for at the model hub, where one is reached.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from sparkray.errors import InputError, MissingExtraError, NotFoundError, UnavailableError, UsageError

GYM = "reasoning-gym"
_DEFAULT_ROWS = 256
_SPEC = re.compile(r"^(?P<name>[^\[\]():]+)(\[(?P<subset>[^\]]+)\])?(\((?P<split>[^)]+)\))?(:(?P<rows>\d+))?$")
_ASKED = ("prompt", "question", "problem", "instruction")
_ANSWERED = ("response", "answer", "output", "completion", "solution")


@dataclass(frozen=True, slots=True)
class CalibrationSource:
    """One part of a calibration set.

    Attributes:
        name: a file, a folder, `reasoning-gym`, or a name at the hub.
        subset: configuration of the dataset; tasks joined by `+` for reasoning-gym.
        split: split of the dataset.
        num_rows: rows that are taken; None for all of a file.
    """

    name: str
    subset: str | None = None
    split: str = "train"
    num_rows: int | None = None

    @property
    def is_file(self) -> bool:
        return Path(self.name).suffix in (".json", ".jsonl", ".txt")


def parse_sources(text: str) -> list[CalibrationSource]:
    """The parts of `a.json,name[subset](split):N,...`.

    Raises:
        UsageError: a part that is not of this form.
    """
    if Path(text).is_file():  # a path may hold any character
        return [CalibrationSource(text)]
    sources = []
    for part in re.split(r",(?![^\[(]*[\])])", text):
        match = _SPEC.match(part.strip())
        if match is None:
            raise UsageError(
                f"{part.strip()!r} is no calibration set: FILE, {GYM}[TASK]:N or NAME[SUBSET](SPLIT):N is expected."
            )
        rows = match["rows"]
        sources.append(
            CalibrationSource(match["name"], match["subset"], match["split"] or "train", int(rows) if rows else None)
        )
    return sources


def dataset_rows(source: CalibrationSource, seed: int) -> Iterator[Any]:
    """Rows of a source that is no file.

    Raises:
        MissingExtraError: the library that reads it is not installed.
        NotFoundError, UnavailableError: no such task or dataset, or no hub is reached.
    """
    return _gym_rows(source, seed) if source.name == GYM else _hub_rows(source)


def _gym_rows(source: CalibrationSource, seed: int) -> Iterator[Any]:
    if importlib.util.find_spec("reasoning_gym") is None:
        raise MissingExtraError.for_module("reasoning_gym", "search")
    import reasoning_gym

    tasks = (source.subset or "chain_sum").split("+")
    total = source.num_rows or _DEFAULT_ROWS
    for place, task in enumerate(tasks):
        size = total // len(tasks) + (place < total % len(tasks))
        if size == 0:
            continue
        try:
            dataset = reasoning_gym.create_dataset(task, size=size, seed=seed)
        except ValueError as failure:
            raise NotFoundError(f"{GYM} has no task {task!r}: {failure}.") from failure
        for row in dataset:
            yield _joined(row)


def _hub_rows(source: CalibrationSource) -> Iterator[Any]:
    if importlib.util.find_spec("datasets") is None:
        raise MissingExtraError.for_module("datasets", "train")
    import datasets

    try:
        dataset = datasets.load_dataset(source.name, source.subset, split=source.split, streaming=True)
        rows = list(islice(dataset, source.num_rows or _DEFAULT_ROWS))
    except (FileNotFoundError, ConnectionError, OSError) as failure:
        raise UnavailableError(
            f"the calibration set {source.name!r} is no local file or folder, and no hub gave it: {failure}.",
            hint="Check the name and the network, or give a local file.",
        ) from failure
    except ValueError as failure:
        raise NotFoundError(f"the calibration set {source.name!r} cannot be read: {failure}.") from failure
    if not rows:
        raise InputError(f"the split {source.split!r} of {source.name!r} is empty.")
    yield from (_joined(row) for row in rows)


def _joined(row: Mapping[str, Any]) -> Any:
    """A question and its answer as one text, so that the experts of answering are seen too; other rows as they are."""
    asked = next((row[key] for key in _ASKED if isinstance(row.get(key), str) and row[key]), None)
    answered = next((row[key] for key in _ANSWERED if isinstance(row.get(key), str) and row[key]), None)
    if asked is None or answered is None or row.get("messages"):
        return dict(row)
    return {"text": f"{asked}\n{answered}"}
