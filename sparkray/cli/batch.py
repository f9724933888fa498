"""`sparkray batch`: a file of prompts to a running server, each answer shown and kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparkray.cli.options import ConfigFiles, JsonFlag, Overrides, read_settings

if TYPE_CHECKING:
    from sparkray.serving.batch.prompt_file import BatchPrompt


def batch(
    file: Annotated[Path, typer.Argument(help="Prompts: .json, .jsonl or .txt.", metavar="FILE")],
    url: Annotated[list[str] | None, typer.Option(help="Server; may be repeated, prompts spread over all.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file of the answers; FILE.answers.json by default.")] = None,
    model: Annotated[str | None, typer.Option(help="Served model; the server's first by default.")] = None,
    system: Annotated[str | None, typer.Option(help="System message before every prompt.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Zero takes the likeliest token.")] = None,
    concurrency: Annotated[int | None, typer.Option(help="Requests in flight at each server.")] = None,
    limit: Annotated[int | None, typer.Option(help="Ask the first so many prompts only.")] = None,
    config: ConfigFiles = None,
    overrides: Overrides = None,
    json: JsonFlag = False,
) -> None:
    """Answer a file of prompts; killed and started again, it asks exactly those that are missing."""
    from sparkray.config.batch_prompts import BatchPromptsConfig
    from sparkray.telemetry.console import print_json

    flags = {
        "input": str(file),
        "url": ",".join(url) if url else None,
        "out": str(out or file.with_name(f"{file.stem}.answers.json")),
        "model": model,
        "system": system,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "concurrency": concurrency,
        "limit": limit,
    }
    settings = read_settings(BatchPromptsConfig, config, overrides, flags)
    from sparkray.serving.batch.run import run_batch

    summary = run_batch(settings, answer_printer(to_stderr=json))
    if json:
        print_json(summary)
        return
    typer.echo(
        f"{summary['num_answered']} of {summary['num_prompts']} answered ({summary['num_done_before']} before),"
        f" {summary['prompt_tokens']} + {summary['completion_tokens']} tokens: {summary['out']}"
    )


def answer_printer(*, to_stderr: bool) -> Callable[[BatchPrompt, Mapping[str, Any], int, int], None]:
    """Prints each prompt with its answer as it comes in."""

    def show(prompt: BatchPrompt, row: Mapping[str, Any], done: int, total: int) -> None:
        text = f"[{done}/{total}] {prompt.id}: {prompt.text}"
        if "error" in row:
            text += f"\n  error: {row['error']}"
        else:
            usage = row["usage"]
            text += f"\n{row['response']}\n  ({usage['prompt_tokens']} + {usage['completion_tokens']} tokens)"
        typer.echo(text, err=to_stderr)

    return show
