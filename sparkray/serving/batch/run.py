"""The run of a batch: what is missing is asked, shown and journalled; at the end one JSON file holds it all.

Every server has workers of its own on one queue, so a quick server takes more prompts than a slow one. A server that
fails is left alone for a while and its prompt goes back to the queue, where another server's worker may take it.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparkray.config.batch_prompts import BatchPromptsConfig
from sparkray.errors import InputError, NotFoundError, SparkrayError, UnavailableError
from sparkray.serving.batch.asker import Asker, ServerFailedError
from sparkray.serving.batch.journal import Journal
from sparkray.serving.batch.prompt_file import BatchPrompt, prompt_keys, read_prompt_file

_MAX_WAIT_SECONDS = 30.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT)

# Called with a prompt, its finished row, the number done and the number of all.
Show = Callable[[BatchPrompt, Mapping[str, Any], int, int], None]


class BatchFailedError(SparkrayError):
    """Some prompts have no answer; the others are kept."""


def run_batch(config: BatchPromptsConfig, show: Show) -> dict[str, Any]:
    """Answer the prompts of `config.input` that the journal beside `config.out` lacks, then write `config.out`.

    SIGTERM and Ctrl-C finish what is in flight and send nothing more.

    Returns:
        The summary: counts of prompts and tokens, and the paths.

    Raises:
        InputError, NotFoundError: the prompts cannot be read, or no server has the model.
        UnavailableError: no server answers.
        BatchFailedError: prompts are left without an answer; the output holds the others.
        KeyboardInterrupt: it was told to stop; the journal holds what was finished.
    """
    prompts = read_prompt_file(Path(config.input))[: config.limit]
    summary = asyncio.run(_run(config, prompts, show))
    if summary is None:
        raise KeyboardInterrupt
    return summary


async def _run(config: BatchPromptsConfig, prompts: Sequence[BatchPrompt], show: Show) -> dict[str, Any] | None:
    """The summary, or None where it was told to stop."""
    out = Path(config.out)
    if out.is_dir():
        raise InputError(f"the output {out} is a folder, and a file is expected.")
    config = config.model_copy(update={"model": await _settle_model(config)})
    keys = prompt_keys(prompts, model=str(config.model), system=config.system, sampling=config.sampling())
    with Journal(out.with_name(f"{out.name}.journal.jsonl")) as journal:
        answered = {key for key in keys if "response" in journal.rows.get(key, {})}
        missing = [(key, prompt) for key, prompt in zip(keys, prompts, strict=True) if key not in answered]
        run = _Run(config, journal, show, num_prompts=len(prompts), num_done=len(answered), queue=deque(missing))
        await run.ask_all()
        rows = [journal.rows[key] for key in keys if key in journal.rows]
        summary = _summary(config, prompts, rows, num_before=len(answered), num_torn=journal.num_torn_bytes)
        summary |= {"out": str(out), "journal": str(journal.path)}
        if run.stopped:
            return None
        _write(out, {**summary, "results": _results(prompts, keys, journal)})
    left = len(prompts) - summary["num_answered"]
    if left:
        first = next((row["error"] for row in rows if "error" in row), run.last_failure or "no server answered")
        raise BatchFailedError(
            f"{left} of {len(prompts)} prompts have no answer; the first reason is {first}",
            hint=f"The others are in {out}; the same command asks just those that are missing.",
        )
    return summary


async def _settle_model(config: BatchPromptsConfig) -> str:
    """The model that every reachable server has; servers that cannot be reached are tried again later."""
    served: dict[str, list[str]] = {}
    failures: list[ServerFailedError] = []
    for url in config.urls:
        asker = Asker(url, config)
        try:
            served[url] = await asker.models()
        except ServerFailedError as failure:
            failures.append(failure)
        finally:
            await asker.aclose()
    if not served:
        raise UnavailableError(failures[0].message, hint=failures[0].hint)
    model = config.model or next(iter(served.values()))[0]
    for url, names in served.items():
        if model not in names:
            raise NotFoundError(f"{url} has no model {model!r}; it has {', '.join(names)}.", param="model")
    return model


@dataclass
class _Run:
    config: BatchPromptsConfig
    journal: Journal
    show: Show
    num_prompts: int
    num_done: int
    queue: deque[tuple[str, BatchPrompt]]
    stopped: bool = False
    last_failure: str | None = None
    _attempts: Counter[str] = field(default_factory=Counter)
    _in_flight: int = 0
    _fatal: SparkrayError | None = None

    async def ask_all(self) -> None:
        if not self.queue:
            return
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._stop)
        askers = [Asker(url, self.config) for url in self.config.urls]
        try:
            workers = [self._work(asker) for asker in askers for _ in range(self.config.concurrency)]
            await asyncio.gather(*workers)
        finally:
            for asker in askers:
                await asker.aclose()
            for number in _SIGNALS:
                loop.remove_signal_handler(number)
        if self._fatal is not None:
            raise self._fatal

    def _stop(self) -> None:
        self.stopped = True
        for number in _SIGNALS:  # a second one ends the process at once
            asyncio.get_running_loop().remove_signal_handler(number)

    async def _work(self, asker: Asker) -> None:
        failures = 0
        while not self.stopped and self._fatal is None:
            if not self.queue:
                if self._in_flight == 0:
                    return
                await asyncio.sleep(0.02)  # what is in flight elsewhere may come back
                continue
            key, prompt = self.queue.popleft()
            self._in_flight += 1
            try:
                row = await asker.ask(prompt)
                failures = 0
                self._keep(key, prompt, row)
            except ServerFailedError as failure:
                failures += 1
                self._return(key, prompt, failure)
            except SparkrayError as failure:
                self._fatal = failure
            finally:
                self._in_flight -= 1
            if failures:
                await self._pause(failures)

    async def _pause(self, failures: int) -> None:
        left = min(_MAX_WAIT_SECONDS, self.config.retry_seconds * 2 ** (failures - 1))
        while left > 0 and not self.stopped and (self.queue or self._in_flight):
            await asyncio.sleep(min(left, 0.1))
            left -= 0.1

    def _return(self, key: str, prompt: BatchPrompt, failure: ServerFailedError) -> None:
        self.last_failure = failure.message
        self._attempts[key] += 1
        if self._attempts[key] < self.config.max_attempts:
            self.queue.append((key, prompt))
        else:
            self._keep(key, prompt, {"error": f"{self._attempts[key]} attempts failed: {failure.message}"})

    def _keep(self, key: str, prompt: BatchPrompt, row: Mapping[str, Any]) -> None:
        row = {"index": prompt.index, "id": prompt.id, "category": prompt.category, "prompt": prompt.text, **row}
        self.journal.add(key, row)
        self.num_done += "response" in row
        self.show(prompt, row, self.num_done, self.num_prompts)


def _results(prompts: Sequence[BatchPrompt], keys: Sequence[str], journal: Journal) -> list[dict[str, Any]]:
    """Rows in the order of this file, whatever the place was that the prompt had when it was asked."""
    results = []
    for key, prompt in zip(keys, prompts, strict=True):
        if key in journal.rows:
            named = {"index": prompt.index, "id": prompt.id, "category": prompt.category}
            results.append({**journal.rows[key], **named})
    return results


def _summary(
    config: BatchPromptsConfig,
    prompts: Sequence[BatchPrompt],
    rows: Sequence[Mapping[str, Any]],
    *,
    num_before: int,
    num_torn: int,
) -> dict[str, Any]:
    answered = [row for row in rows if "response" in row]
    counted = [row for row in answered if row["tokenizer"] is not None]
    return {
        "model": config.model,
        "urls": list(config.urls),
        "sampling": config.sampling(),
        "num_prompts": len(prompts),
        "num_answered": len(answered),
        "num_failed": len(rows) - len(answered),
        "num_done_before": num_before,
        "num_done_now": len(answered) - num_before,
        "num_torn_bytes": num_torn,
        "prompt_tokens": sum(row["usage"]["prompt_tokens"] or 0 for row in answered),
        "completion_tokens": sum(row["usage"]["completion_tokens"] or 0 for row in answered),
        "tokenizer_prompt_tokens": sum(row["tokenizer"]["prompt_tokens"] for row in counted),
        "tokenizer_completion_tokens": sum(row["tokenizer"]["completion_tokens"] for row in counted),
        "num_prompt_count_differs": sum(
            row["tokenizer"]["prompt_tokens"] != row["usage"]["prompt_tokens"] for row in counted
        ),
    }


def _write(path: Path, data: Mapping[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(data, file, indent=1, ensure_ascii=False, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
