"""Recording whole tasks, so that a recording that was cut off goes on where it stood.

Questions are recorded in chunks, each of which becomes a file of its own in a folder beside the recording; the
recording is put together from these once all are there.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path as FilePath

from sparkray.config.search import RecordConfig
from sparkray.config.serve import EngineConfig
from sparkray.errors import InputError
from sparkray.metis.vllm_engine import WatchedEngine
from sparkray.models import resolve_model
from sparkray.search.paths import Path
from sparkray.search.prompting import BLOCK_TOKENS, task_prompt_ids
from sparkray.search.recording import (
    RecordedQuestion,
    Recording,
    RecordingInfo,
    read_recording,
    write_recording,
)
from sparkray.search.tasks import STOP, TASKS, Task, answer_kinds, find_task
from sparkray.search.vllm_recorder import PathRequest, record_paths
from sparkray.search.vllm_session import own_engine, quick_dtype
from sparkray.types import SamplingOptions

CHUNK_QUESTIONS = 10

OnChunk = Callable[[int, int], None]
"""(questions recorded, questions wanted), after every chunk."""

Chunk = tuple[Task, str, int, int]
"""(task, split, first question, number of questions)."""


def record(config: RecordConfig, into: FilePath, on_chunk: OnChunk | None = None) -> Recording:
    """Record what `config` names into the file `into`. What the file, or a cut recording beside it, has is kept.

    Raises:
        NotFoundError: a task or model that there is not, or fewer different questions than asked for.
        InputError: the chunks beside `into` were made with other settings.
    """
    source = resolve_model(config.model)
    chunks = list(_chunks(config))
    folder = into.with_name(f"{into.name}.parts")
    if into.is_file():
        _unpack(read_recording(into, answer_kinds()), chunks, folder)
    missing = [chunk for chunk in chunks if not (folder / _file_name(*chunk)).is_file()]
    if missing:
        limits = EngineConfig(
            dtype=quick_dtype(),
            max_num_seqs=config.max_running,
            max_model_len=1024,
            kv_cache_gib=2.0,
            extra={"block_size": BLOCK_TOKENS},
        )
        # One event loop for all chunks: the engine belongs to the one that it was first used in.
        with own_engine(config.model, limits) as engine, asyncio.Runner() as runner:
            info = RecordingInfo(
                model=source.model_id,
                temperature=config.temperature,
                top_p=config.top_p,
                max_tokens=config.max_tokens,
                num_paths=config.num_paths,
                vocab_size=engine.vllm_config.model_config.get_vocab_size(),
            )
            for number, chunk in enumerate(missing, start=len(chunks) - len(missing) + 1):
                questions = runner.run(_record_chunk(engine, config, *chunk))
                write_recording(folder / _file_name(*chunk), info, questions)
                if on_chunk is not None:
                    on_chunk(number, len(chunks))
    parts = [read_recording(folder / _file_name(*chunk), answer_kinds()) for chunk in chunks]
    first = parts[0].info
    for part in parts:
        if part.info != first or part.info.temperature != config.temperature:
            raise InputError(
                f"{folder} holds chunks of another recording: {part.info} beside {first}.",
                hint=f"Remove {folder}, or record with the settings that it was begun with.",
            )
    whole = Recording(first, tuple(question for part in parts for question in part.questions))
    write_recording(into, whole.info, whole.questions)
    shutil.rmtree(folder)
    return whole


def _chunks(config: RecordConfig) -> Iterator[Chunk]:
    """Rounds in which every task and split has its turn."""
    tasks = [find_task(name) for name in config.tasks] if config.tasks else list(TASKS)
    wanted = {"calibration": config.num_calibration, "held_out": config.num_held_out}
    for first in range(0, max(wanted.values()), CHUNK_QUESTIONS):
        for split, count in wanted.items():
            if first < count:
                for task in tasks:
                    yield task, split, first, min(CHUNK_QUESTIONS, count - first)


def _unpack(recording: Recording, chunks: Sequence[Chunk], folder: FilePath) -> None:
    """Write the chunks that a recording has whole as files of their own."""
    for task, split, first, count in chunks:
        target = folder / _file_name(task, split, first, count)
        wanted = range(first, first + count)
        found = [question for question in recording.select(split, [task.name]) if question.index in wanted]
        if len(found) == count and not target.is_file():
            write_recording(target, recording.info, found)


def _file_name(task: Task, split: str, first: int, count: int) -> str:
    return f"{task.name}-{split}-{first:05d}-{count:02d}.parquet"


async def _record_chunk(
    engine: WatchedEngine, config: RecordConfig, task: Task, split: str, first: int, count: int
) -> list[RecordedQuestion]:
    asked = task.questions(split, first + count)[first:]
    tokenizer = engine.get_tokenizer()
    requests = [
        PathRequest(tuple(task_prompt_ids(task, question.text, tokenizer)), task.answer_kind, config.num_paths)
        for question in asked
    ]
    options = SamplingOptions(config.max_tokens, config.temperature, config.top_p, stop=STOP)
    found: dict[int, tuple[Path, ...]] = {}
    await record_paths(engine, requests, options, max_running=config.max_running, on_question=found.__setitem__)
    return [
        RecordedQuestion(
            task=task.name,
            split=split,
            index=question.index,
            prompt=question.prompt,
            paths=found[number],
            correct=tuple(path.answer is not None and question.is_right(path.answer) for path in found[number]),
        )
        for number, question in enumerate(asked)
    ]
