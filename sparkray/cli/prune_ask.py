"""Serving a checkpoint for one file of prompts, and taking it down again."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer


def ask_served(model: Path, prompts: Path, out: Path, *, serve: Sequence[str], quiet: bool) -> dict[str, Any]:
    """Answers of `model` over HTTP, in `out`; the session ends whatever happens.

    Args:
        model: the checkpoint.
        prompts: file of prompts, as `sparkray batch` takes it.
        out: JSON file of the answers.
        serve: settings of the server as `engine.max_num_seqs=8`.
        quiet: show answers on stderr.
    """
    from sparkray.cli.batch import answer_printer
    from sparkray.cluster.processes import free_port
    from sparkray.config import ClusterConfig, ServeConfig, load_settings
    from sparkray.config.batch_prompts import BatchPromptsConfig
    from sparkray.pruning.checkpoint import Checkpoint
    from sparkray.pruning.families import text_config
    from sparkray.serving.batch.prompt_file import read_prompt_file
    from sparkray.serving.batch.run import run_batch
    from sparkray.serving.lifecycle import down, up

    read_prompt_file(prompts)  # refused before a minute is spent on starting
    settings = load_settings(ServeConfig, (), serve, {"model": str(model.resolve()), "port": free_port()})
    checkpoint = Checkpoint(model)
    context = text_config(checkpoint.config, checkpoint.family).get("max_position_embeddings")
    if isinstance(context, int) and context < settings.engine.max_model_len:
        engine = settings.engine.model_copy(update={"max_model_len": context})
        settings = settings.model_copy(update={"engine": engine})
    cluster = ClusterConfig(dashboard_port=free_port())
    name = f"prune-{os.getpid()}"
    session = up(settings, cluster, name=name, say=lambda line: typer.echo(line, err=True))
    try:
        asked = BatchPromptsConfig(input=str(prompts), out=str(out), url=str(session.serve_url))
        return run_batch(asked, answer_printer(to_stderr=quiet))
    finally:
        down(name)
