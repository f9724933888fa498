"""Recording a served model's entropies: ordinary answers, on which a reference profile is fitted."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from itertools import takewhile
from pathlib import Path
from typing import Any

from sparkray.errors import SparkrayError, UnavailableError
from sparkray.metis.batch_input import PromptRow
from sparkray.serving.client import ChatClient


def record(
    client: ChatClient,
    prompts: Sequence[PromptRow],
    *,
    model: str,
    temperature: float,
    max_tokens: int,
    concurrency: int,
) -> Iterator[dict[str, Any]]:
    """Ask every prompt as a chat and yield an answer's entropies as soon as it is finished.

    Args:
        client: the server.
        prompts: texts, each sent as one user's message, or chats.
        model: the model's id.
        temperature, max_tokens: of every request.
        concurrency: requests under way at once.

    Yields:
        `id`, `model`, `temperature`, `finish_reason`, and `entropies`: bits a token, null for one without a record.

    Raises:
        SparkrayError: the server refused a prompt, whose id is in the message, or went away.
    """
    stopped = threading.Event()

    def ask(prompt: PromptRow) -> dict[str, Any]:
        options = {"temperature": temperature, "max_tokens": max_tokens, "vllm_xargs": {"metis": 1}}
        try:
            with closing(client.chat(_messages(prompt), model=model, options=options)) as pieces:
                # Read to its end, unless the recording ends first: closing it ends the work on the server.
                ids = [request_id for request_id, _ in takewhile(lambda _: not stopped.is_set(), pieces)]
            trace = client.trace(ids[0])
        except SparkrayError as failure:
            raise type(failure)(f"prompt {prompt.id!r}: {failure.message}", hint=failure.hint) from failure
        return {
            "id": prompt.id,
            "model": model,
            "temperature": temperature,
            "finish_reason": trace["finish_reason"],
            "entropies": [event["token_entropy"] for event in trace["events"]],
        }

    with ThreadPoolExecutor(concurrency, thread_name_prefix="record") as pool:
        pending = [pool.submit(ask, prompt) for prompt in prompts]
        try:
            for finished in as_completed(pending):
                yield finished.result()
        finally:
            stopped.set()
            pool.shutdown(wait=True, cancel_futures=True)


def write_recording(path: Path, answers: Iterator[dict[str, Any]], report: Callable[[int], None]) -> tuple[int, int]:
    """Write a line of JSON an answer, under a temporary name until all are there; returns (answers, tokens).

    Args:
        path: the file; an older one is replaced.
        answers: as `record` yields them.
        report: called with the number of answers written so far.

    Raises:
        UnavailableError: the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.tmp")
    num_answers = num_tokens = 0
    try:
        with partial.open("w", encoding="utf-8") as file:
            for answer in answers:
                file.write(json.dumps(answer) + "\n")
                num_answers, num_tokens = num_answers + 1, num_tokens + len(answer["entropies"])
                report(num_answers)
        partial.replace(path)
    except OSError as failure:
        raise UnavailableError(
            f"the recording {path} cannot be written: {failure.strerror}.", hint="Give a file in a folder that exists."
        ) from failure
    finally:
        partial.unlink(missing_ok=True)
    return num_answers, num_tokens


def _messages(prompt: PromptRow) -> list[dict[str, str]]:
    if prompt.messages_json is not None:
        messages: list[dict[str, str]] = json.loads(prompt.messages_json)
        return messages
    return [{"role": "user", "content": str(prompt.prompt)}]
