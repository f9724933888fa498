"""`sparkray train ...`: reinforcement learning in the cluster that runs, and models out of its checkpoints."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from sparkray.cli.options import ConfigFiles, DryRun, JsonFlag, Overrides, read_settings

app = typer.Typer(no_args_is_help=True, help="Train a model by GRPO, and export what was trained.")


@app.command()
def grpo(
    config: ConfigFiles = None,
    model: Annotated[str | None, typer.Option(help="`embedded`, a local directory or a hub id.")] = None,
    dataset: Annotated[str | None, typer.Option(help="JSONL, JSON or Parquet with a column `prompt`.")] = None,
    output_dir: Annotated[str | None, typer.Option(help="Folder of checkpoints, curves and the report.")] = None,
    run_name: Annotated[str | None, typer.Option(help="Folder of the run in the output.")] = None,
    num_generations: Annotated[int | None, typer.Option(help="Completions of a prompt.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the dataset.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps; overrides the passes.")] = None,
    lora_rank: Annotated[int | None, typer.Option(help="Rank of the adapter.")] = None,
    bf16: Annotated[bool | None, typer.Option(help="Compute in bf16.")] = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    json: JsonFlag = False,
) -> None:
    """Train; started again with the same settings it goes on from the last checkpoint."""
    from sparkray.config.grpo import GrpoConfig
    from sparkray.telemetry.console import print_json

    flags = {
        "model": model,
        "dataset": dataset,
        "output_dir": output_dir,
        "run_name": run_name,
        "num_generations": num_generations,
        "epochs": epochs,
        "max_steps": max_steps,
        "lora_rank": lora_rank,
        "bf16": bf16,
    }
    settings = read_settings(GrpoConfig, config, overrides, flags)
    if dry_run:
        from sparkray.grpo.data import num_steps, read_rows

        rows = read_rows(Path(settings.dataset))
        _print({"num_rows": len(rows), "num_steps": num_steps(settings, len(rows)), **settings.model_dump()}, json)
        return
    from sparkray.cluster.connection import cluster_connection
    from sparkray.grpo.ray_run import train_run
    from sparkray.serving.app import engine_kwargs

    # Ray shows what ranks and engines print on this process's stdout, which is the summary's.
    with redirect_stdout(sys.stderr), cluster_connection():
        summary = train_run(settings, engine_arguments=engine_kwargs)
    if json:
        print_json(summary)
    else:
        _print(summary, False)


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, or a run's folder for its newest one.")],
    into: Annotated[Path, typer.Option(help="New folder of the model.")],
    model: Annotated[str, typer.Option(help="The model that the adapter was trained on.")] = "embedded",
    dtype: Annotated[str, typer.Option(help="`float32`, or `bfloat16`, which rounds small changes away.")] = "float32",
    json: JsonFlag = False,
) -> None:
    """Merge a checkpoint's adapter into its model, and write a model that `sparkray serve up --model` serves."""
    from sparkray.errors import NotFoundError, UsageError

    if dtype not in ("float32", "bfloat16"):
        raise UsageError(f"--dtype {dtype} was given; float32 and bfloat16 are accepted.", param="dtype")
    if not checkpoint.is_dir():
        raise NotFoundError(f"checkpoint {str(checkpoint)!r} was given, and there is no such folder.")
    import torch

    from sparkray.grpo.checkpoint import export_model, newest_checkpoint
    from sparkray.models import prepare_model

    source = newest_checkpoint(checkpoint) or checkpoint
    path = export_model(prepare_model(model), source, into, dtype=getattr(torch, dtype))
    _print({"checkpoint": str(source), "model": str(path), "dtype": dtype}, json)


def _print(values: dict[str, Any], json: bool) -> None:
    from sparkray.telemetry.console import print_json

    if json:
        print_json(values)
        return
    for name, value in values.items():
        typer.echo(f"{name}\t{value}")
