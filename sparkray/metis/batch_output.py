"""The Parquet parts of a batch run: written once and whole, and read back to see what is done.

A part is written under a hidden temporary name and renamed, so a part that has its name is complete, and the ids in
all parts are exactly the work that is done. A folder belongs to one run at a time (a file lock) and to one set of
settings (`_run.json`): rows that were made in different ways do not get mixed.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from sparkray.errors import BusyError, InputError, UnavailableError, UsageError
from sparkray.metis.batch_input import PromptRow
from sparkray.metis.fields import COLUMN, Action

# One row a prompt, which stands under `prompt`, or as JSON under `messages`. The lists have one entry a token.
SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("digest", pa.string(), nullable=False),
        pa.field("prompt", pa.string()),
        pa.field("messages", pa.string()),
        pa.field("text", pa.string()),
        pa.field("token_ids", pa.list_(pa.int32())),
        pa.field("finish_reason", pa.string()),
        pa.field("num_prompt_tokens", pa.int32()),
        pa.field("num_tokens", pa.int32()),
        pa.field("entropies", pa.list_(pa.float32())),
        pa.field("confidences", pa.list_(pa.float32())),
        pa.field("max_probs", pa.list_(pa.float32())),
        pa.field("z", pa.list_(pa.float32())),
        pa.field("hedge_statistics", pa.list_(pa.float32())),
        pa.field("refuse_statistics", pa.list_(pa.float32())),
        pa.field("actions", pa.list_(pa.int8())),
        pa.field("boosted", pa.list_(pa.bool_())),
        pa.field("mean_entropy", pa.float64()),
        pa.field("num_hedge", pa.int32()),
        pa.field("num_refuse", pa.int32()),
        pa.field("error", pa.string()),
    ]
)


def answered_row(
    prompt: PromptRow,
    *,
    text: str,
    token_ids: Sequence[int],
    finish_reason: str,
    num_prompt_tokens: int,
    tokens_TF: np.ndarray[Any, np.dtype[np.float32]],
) -> dict[str, Any]:
    """A row of an answered prompt.

    Args:
        prompt: what was asked.
        text: the answer.
        token_ids: its tokens.
        finish_reason: "stop", "length" or "abort".
        num_prompt_tokens: tokens of the prompt, the chat template's included.
        tokens_TF: what was recorded of each token, in the order of `TOKEN_FIELDS`.
    """
    entropy_T = tokens_TF[:, COLUMN["entropy"]]
    # A token that was never recorded is NaN in every column: no alarm, no boost.
    action_T = np.nan_to_num(tokens_TF[:, COLUMN["action"]])
    known = entropy_T[~np.isnan(entropy_T)]
    return {
        **_asked(prompt),
        "text": text,
        "token_ids": list(token_ids),
        "finish_reason": finish_reason,
        "num_prompt_tokens": num_prompt_tokens,
        "num_tokens": len(token_ids),
        "entropies": entropy_T.tolist(),
        "confidences": tokens_TF[:, COLUMN["confidence"]].tolist(),
        "max_probs": tokens_TF[:, COLUMN["max_prob"]].tolist(),
        "z": tokens_TF[:, COLUMN["z"]].tolist(),
        "hedge_statistics": tokens_TF[:, COLUMN["hedge_statistic"]].tolist(),
        "refuse_statistics": tokens_TF[:, COLUMN["refuse_statistic"]].tolist(),
        "actions": action_T.astype(np.int8).tolist(),
        "boosted": np.nan_to_num(tokens_TF[:, COLUMN["boosted"]]).astype(bool).tolist(),
        "mean_entropy": float(known.mean(dtype=np.float64)) if known.size else None,
        "num_hedge": int((action_T == Action.HEDGE).sum()),
        "num_refuse": int((action_T == Action.REFUSE).sum()),
        "error": None,
    }


def refused_row(prompt: PromptRow, error: str) -> dict[str, Any]:
    """A row of a prompt that the engine would not take: it is done, and says why there is no answer."""
    return {**_asked(prompt), "error": error}


def _asked(prompt: PromptRow) -> dict[str, Any]:
    return {"id": prompt.id, "digest": prompt.digest, "prompt": prompt.prompt, "messages": prompt.messages_json}


class PartWriter:
    """The output folder of one run.

    Args:
        folder: is created where it does not exist.
        settings: what all its rows have in common.
        rows_per_part: a part is written at this many rows at the latest.
        part_seconds: or when its first row is this old.

    Raises:
        UnavailableError: the folder cannot be created or written to.
        BusyError: another run is writing there.
        UsageError: its rows were made with other settings, or a part is damaged.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], *, rows_per_part: int = 64, part_seconds: float = 30.0
    ) -> None:
        self.folder = folder
        self._rows_per_part = rows_per_part
        self._part_seconds = part_seconds
        self._rows: list[Mapping[str, Any]] = []
        self._oldest = 0.0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(folder / ".lock")
            self._lock.acquire(timeout=0)
        except Timeout as held:
            raise BusyError(f"another run is writing to {folder}.", hint="Wait for it, or stop it.") from held
        except OSError as failure:
            raise UnavailableError(
                f"output {folder} cannot be written to: {failure.strerror or failure}.",
                hint="Give a folder of this node that the job may create or write to.",
            ) from failure
        try:
            for leftover in folder.glob(".*.tmp"):
                leftover.unlink()
            self._check_settings(settings)
            self.done = self._read_done()
        except BaseException:
            self._lock.release()
            raise

    def missing(self, prompts: Sequence[PromptRow]) -> list[PromptRow]:
        """The prompts that no part holds, in their order.

        Raises:
            InputError: a prompt has the id of a row that answers another prompt.
        """
        for prompt in prompts:
            if self.done.get(prompt.id, prompt.digest) != prompt.digest:
                raise InputError(
                    f"id {prompt.id!r} is done in {self.folder}, but for another prompt.",
                    hint="Give the changed input a folder of its own, or new ids.",
                    param="input",
                )
        return [prompt for prompt in prompts if prompt.id not in self.done]

    def add(self, row: Mapping[str, Any]) -> None:
        """Take a row, and write a part where it is time."""
        if not self._rows:
            self._oldest = time.monotonic()
        self._rows.append(row)
        if len(self._rows) >= self._rows_per_part or time.monotonic() - self._oldest >= self._part_seconds:
            self.flush()

    def flush(self) -> None:
        """Write the rows that wait as one part, if there are any."""
        if not self._rows:
            return
        path = self._next_path()
        partial = path.with_name(f".{path.name}.tmp")
        with partial.open("wb") as file:
            pq.write_table(pa.Table.from_pylist(self._rows, schema=SCHEMA), file, compression="zstd")
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
        self.done.update((row["id"], row["digest"]) for row in self._rows)
        self._rows.clear()

    def close(self) -> None:
        """Write what waits, and let another run have the folder."""
        try:
            self.flush()
        finally:
            self._lock.release()

    def _next_path(self) -> Path:
        numbers = (path.stem.removeprefix("part-") for path in self.folder.glob("part-*.parquet"))
        last = max((int(number) for number in numbers if number.isdigit()), default=-1)
        return self.folder / f"part-{last + 1:06d}.parquet"

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        path = self.folder / "_run.json"
        if not path.exists():
            partial = path.with_name("._run.json.tmp")
            partial.write_text(json.dumps(settings, indent=1), encoding="utf-8")
            partial.rename(path)
            return
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            differing = sorted(key for key in before | dict(settings) if before.get(key) != settings.get(key))
        except (ValueError, TypeError) as failure:
            raise UsageError(f"{path} is damaged: {failure}.", hint="Give another output folder.") from failure
        if differing:
            said = ", ".join(f"{key} was {before.get(key)!r} and is {settings.get(key)!r}" for key in differing)
            raise UsageError(
                f"the rows in {self.folder} were made with other settings: {said}.",
                hint="Give another output folder, or the settings of the first run.",
                param="output",
            )

    def _read_done(self) -> dict[str, str]:
        done: dict[str, str] = {}
        for path in sorted(self.folder.glob("part-*.parquet")):
            try:
                table = pq.read_table(path, columns=["id", "digest"])
            except (pa.ArrowException, OSError) as failure:
                raise UsageError(
                    f"{path} is no readable part: {failure}.", hint="Delete it; its prompts are then done again."
                ) from failure
            done.update((row["id"], row["digest"]) for row in table.to_pylist())
        return done
