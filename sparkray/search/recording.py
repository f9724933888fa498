"""Recorded paths: questions with all their paths and every signal of every token, in one Parquet file.

One row is one path. Tokens are uint16 (uint32 above 65,536), signals float16, one list column each; the file's
metadata says which model, temperature and limits they were made with, and how the questions are made again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path as FilePath
from typing import Any

import numpy as np

from sparkray.errors import InputError, MissingExtraError, NotFoundError
from sparkray.search.answers import AnswerKind, extract_answer
from sparkray.search.paths import FinishReason, Path
from sparkray.search.signals import COLUMN, SIGNALS, FloatArray, empty_signals

_FORMAT = "sparkray-search-recording"
_VERSION = 1
_METADATA_KEY = b"sparkray"


@dataclass(frozen=True, slots=True)
class RecordingInfo:
    """What all paths of one recording have in common."""

    model: str
    temperature: float
    top_p: float
    max_tokens: int
    num_paths: int
    vocab_size: int


@dataclass(frozen=True, slots=True)
class RecordedQuestion:
    """One question with its paths.

    Attributes:
        task: name of the task it comes from.
        split: "calibration" or "held_out".
        index: its number within task and split.
        prompt: what the model was given.
        paths: in the order of recording.
        correct: for each path, whether its answer is right.
    """

    task: str
    split: str
    index: int
    prompt: str
    paths: tuple[Path, ...]
    correct: tuple[bool, ...]

    def is_right(self, key: str | None) -> bool:
        """Whether an answer (its key) is right; as equal answers are scored alike, any path that gave it tells."""
        for path, correct in zip(self.paths, self.correct, strict=True):
            if path.answer is not None and path.answer.key == key:
                return correct
        return False


@dataclass(frozen=True, slots=True)
class Recording:
    """A file of recorded paths."""

    info: RecordingInfo
    questions: tuple[RecordedQuestion, ...]

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(sorted({question.task for question in self.questions}))

    def select(self, split: str, tasks: Iterable[str] | None = None) -> tuple[RecordedQuestion, ...]:
        """The questions of one split, of all tasks or of those named."""
        wanted = set(tasks) if tasks is not None else None
        return tuple(
            question
            for question in self.questions
            if question.split == split and (wanted is None or question.task in wanted)
        )


def write_recording(path: FilePath, info: RecordingInfo, questions: Sequence[RecordedQuestion]) -> None:
    """Write all paths, to a temporary file first."""
    arrow, parquet = _arrow()
    rows = [(question, number) for question in questions for number in range(len(question.paths))]
    token_type = arrow.uint16() if info.vocab_size <= 1 << 16 else arrow.uint32()
    columns: dict[str, Any] = {
        "task": [question.task for question, _ in rows],
        "split": [question.split for question, _ in rows],
        "question": arrow.array([question.index for question, _ in rows], arrow.int32()),
        "prompt": [question.prompt for question, _ in rows],
        "path": arrow.array([number for _, number in rows], arrow.int16()),
        "text": [question.paths[number].text for question, number in rows],
        "finish_reason": [question.paths[number].finish_reason.value for question, number in rows],
        "correct": [question.correct[number] for question, number in rows],
        "token_ids": arrow.array(
            [list(question.paths[number].token_ids) for question, number in rows], arrow.list_(token_type)
        ),
    }
    for name in SIGNALS:
        values = [question.paths[number].column(name).astype(np.float16) for question, number in rows]
        columns[name] = arrow.array(values, arrow.list_(arrow.float16()))
    said = json.dumps({"format": _FORMAT, "version": _VERSION, **asdict(info)})
    table = arrow.table(columns).replace_schema_metadata({_METADATA_KEY: said.encode()})
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    parquet.write_table(table, temporary, compression="zstd", compression_level=19, row_group_size=1 << 16)
    temporary.replace(path)


def read_recording(path: FilePath, answer_kinds: dict[str, AnswerKind] | None = None) -> Recording:
    """Read what `write_recording` wrote; answers are extracted anew from the texts.

    Args:
        path: the file.
        answer_kinds: the kind of answer of each task; a task that is not named is read as "auto".

    Raises:
        NotFoundError: no such file.
        InputError: not a recording, or one of another version.
    """
    _, parquet = _arrow()
    if not path.is_file():
        raise NotFoundError(
            f"there is no recording {str(path)!r}.", hint="Make one with `sparkray search record --out FILE`."
        )
    try:
        table = parquet.read_table(path)
        said = json.loads((table.schema.metadata or {})[_METADATA_KEY])
    except (OSError, ValueError, KeyError) as failure:
        raise InputError(f"{str(path)!r} is not a recording of paths: {failure}.") from failure
    if said.pop("format", None) != _FORMAT or said.pop("version", None) != _VERSION:
        raise InputError(f"{str(path)!r} is not a recording of version {_VERSION}; record it again.")
    return Recording(RecordingInfo(**said), tuple(_questions(table, answer_kinds or {})))


def _questions(table: Any, answer_kinds: dict[str, AnswerKind]) -> Iterator[RecordedQuestion]:
    plain = {
        name: table.column(name).to_pylist()
        for name in ("task", "split", "question", "prompt", "text", "finish_reason", "correct", "token_ids")
    }
    flat = {name: table.column(name).combine_chunks() for name in SIGNALS}
    values = {name: array.values.to_numpy(zero_copy_only=False).astype(np.float32) for name, array in flat.items()}
    offsets = flat[SIGNALS[0]].offsets.to_numpy()
    groups: dict[tuple[str, str, int], list[int]] = {}
    for row, key in enumerate(zip(plain["task"], plain["split"], plain["question"], strict=True)):
        groups.setdefault(key, []).append(row)
    for (task, split, index), rows in groups.items():
        paths = []
        for row in rows:
            signals: FloatArray = empty_signals(int(offsets[row + 1] - offsets[row]))
            for name in SIGNALS:
                signals[:, COLUMN[name]] = values[name][offsets[row] : offsets[row + 1]]
            reason = FinishReason(plain["finish_reason"][row])
            answer = extract_answer(
                plain["text"][row], answer_kinds.get(task, "auto"), complete=reason is FinishReason.STOP
            )
            paths.append(Path(tuple(plain["token_ids"][row]), signals, plain["text"][row], answer, reason))
        correct = tuple(bool(plain["correct"][row]) for row in rows)
        yield RecordedQuestion(task, split, index, plain["prompt"][rows[0]], tuple(paths), correct)


def _arrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as failure:
        raise MissingExtraError.for_module("pyarrow", "search") from failure
    return pyarrow, pyarrow.parquet
