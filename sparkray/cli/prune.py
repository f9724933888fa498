"""`sparkray prune ...`: fewer experts in the same precision, whole or stage by stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from sparkray.cli.options import ConfigFiles, JsonFlag, Overrides

app = typer.Typer(no_args_is_help=True, help="Cut experts of a mixture-of-experts model (REAP), and check the rest.")

Model = Annotated[Path, typer.Argument(help="Model directory: config.json and safetensors shards.", metavar="MODEL")]
GateSource = Annotated[str | None, typer.Option(help="`model` (the gates it uses) or `upstream` (softmax of logits).")]
Placement = Annotated[str | None, typer.Option(help="`auto`, `resident` or `streaming` (one layer in memory).")]
Dtype = Annotated[str | None, typer.Option(help="`auto`, `float32`, `bfloat16` or `float16`.")]
Device = Annotated[str | None, typer.Option(help="torch device of the forward.")]


@app.command()
def saliency(
    model: Model,
    inputs: Annotated[Path, typer.Option(help="JSON with input_ids and attention_mask, [batches, rows, tokens].")],
    gate_source: GateSource = None,
    placement: Placement = None,
    dtype: Dtype = None,
    device: Device = None,
    config: ConfigFiles = None,
    overrides: Overrides = None,
    json: JsonFlag = False,
) -> None:
    """Every statistic of every expert over ready-made token ids."""
    settings = _observe_settings(config, overrides, gate_source, placement, dtype, device)
    from sparkray.pruning.saliency import saliency_report
    from sparkray.telemetry.console import print_json

    with _progress("observing") as advance:
        report = saliency_report(model, inputs, settings, advance)
    if json:
        print_json(report)
        return
    for layer, fields in report["layers"].items():
        typer.echo(f"layer {layer}: {fields['total_tokens']} tokens")
        for expert, (count, score) in enumerate(zip(fields["expert_frequency"], fields["reap"], strict=True)):
            typer.echo(f"  expert {expert:4d}  tokens {count:8.0f}  reap {score:.6g}")


def _observe_settings(
    config: list[Path] | None,
    overrides: list[str] | None,
    gate_source: str | None,
    placement: str | None,
    dtype: str | None,
    device: str | None,
) -> Any:
    from sparkray.cli.options import read_settings
    from sparkray.config.pruning import ObserveConfig

    flags = {"gate_source": gate_source, "placement": placement, "dtype": dtype, "device": device}
    return read_settings(ObserveConfig, config, overrides, flags)


@contextmanager
def _progress(description: str) -> Iterator[Callable[[int, int], None]]:
    from sparkray.telemetry.console import progress_bar

    with progress_bar() as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
