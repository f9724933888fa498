"""`sparkray metis`: the reference profiles of the calibrated detector."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from sparkray.cli.options import JsonFlag

if TYPE_CHECKING:
    from sparkray.metis.calibration import AlarmCount
    from sparkray.metis.profile import ReferenceProfile

app = typer.Typer(no_args_is_help=True, help="Reference profiles: what a model's entropies look like when all is well.")

T = TypeVar("T")

_Folders = Annotated[
    list[Path] | None,
    typer.Option("--profile-dir", help="Folder of profiles beside the packaged ones; may be repeated."),
]


@app.command()
def profiles(profile_dir: _Folders = None, json: JsonFlag = False) -> None:
    """List the stored profiles."""
    from sparkray.metis.profile import ProfileStore
    from sparkray.telemetry.console import print_json

    store = ProfileStore.from_environment(profile_dir or ())
    found = [store.load(name) for name in store.names()]
    if json:
        print_json({"profiles": [_as_json(profile) for profile in found]})
        return
    for profile in found:
        typer.echo(
            f"{profile.name}\tmean {profile.mean_bits:.3f} bits\tdeviation {profile.std_bits:.3f}\t"
            f"lag-1 {profile.lag1:+.2f}\t{profile.num_tokens} tokens of {profile.num_streams} answers"
        )
    if not found:
        typer.echo("no profiles: record answers with `sparkray metis record`, then `sparkray metis fit`", err=True)


@app.command()
def record(
    prompts: Annotated[Path, typer.Argument(help="JSONL: one object with `prompt` or `messages` a line.")],
    out: Annotated[Path, typer.Option(help="JSONL file that the entropies are written to.")],
    url: Annotated[str | None, typer.Option(help="Server; by default the running session's.")] = None,
    model: Annotated[str | None, typer.Option(help="Model id; by default the server's first.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0, help="0 is greedy.")] = 0.7,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 192,
    concurrency: Annotated[int, typer.Option(min=1, max=1024, help="Requests under way at once.")] = 16,
    json: JsonFlag = False,
) -> None:
    """Ask a served model ordinary questions and record how sure it was: what `fit` takes."""
    from sparkray.metis.batch_input import read_prompts
    from sparkray.serving.client import ChatClient
    from sparkray.serving.record import record as record_answers
    from sparkray.serving.record import write_recording
    from sparkray.serving.status import default_url
    from sparkray.telemetry.console import print_json
    from sparkray.telemetry.progress import RunProgress

    rows = read_prompts(prompts)
    with ChatClient(url or default_url()) as client, RunProgress("answers", quiet=json) as progress:
        answers = record_answers(
            client,
            rows,
            model=model or client.models()[0],
            temperature=temperature,
            max_tokens=max_tokens,
            concurrency=concurrency,
        )
        num_answers, num_tokens = write_recording(out, answers, lambda done: progress.update(done, len(rows)))
    if json:
        print_json({"path": str(out), "num_answers": num_answers, "num_tokens": num_tokens})
        return
    typer.echo(f"{num_tokens} tokens of {num_answers} answers, written to {out}; go on with `sparkray metis fit {out}`")


@app.command()
def fit(
    recording: Annotated[
        Path, typer.Argument(help="What `record` or jobs/watch_prompts.py wrote, or JSONL with `entropies`.")
    ],
    into: Annotated[Path, typer.Option(help="Folder that the profile is written below.")],
    model: Annotated[str | None, typer.Option(help="Name of the model; by default as recorded.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of the sampling; by default as recorded.")] = None,
    task: Annotated[str, typer.Option(help="Kind of prompts, one word.")] = "chat",
    seed: Annotated[int, typer.Option(min=0, help="Of the simulation.")] = 0,
    hold_out: Annotated[
        float, typer.Option(min=0.0, max=0.9, help="Share of answers to count false alarms on.")
    ] = 0.25,
    json: JsonFlag = False,
) -> None:
    """Fit a profile on recorded answers, and say how often it cries wolf on answers it has not seen."""
    from sparkray.metis.calibration import cross_check, fit_profile
    from sparkray.metis.recordings import read_recording
    from sparkray.telemetry.console import print_json

    read = read_recording(recording)
    model = _plain_name(_needed("model", model or read.model))
    temperature = _needed("temperature", read.temperature if temperature is None else temperature)
    profile = fit_profile(read.streams, model=model, temperature=temperature, task=task, seed=seed)
    checked = cross_check(read.streams, share=hold_out, temperature=temperature, seed=seed) if hold_out else {}
    path = profile.save(into)
    rows = [_check_as_json(arl_tokens, count) for arl_tokens, count in checked.items()]
    if json:
        print_json({**_as_json(profile), "path": str(path), "held_out": rows})
        return
    typer.echo(f"{profile.name}: {profile.num_tokens} tokens of {profile.num_streams} answers, written to {path}")
    for row in rows:
        typer.echo(
            f"held out: {row['num_tokens']} tokens at one false alarm in {row['arl_tokens']:g} each: "
            f"{row['num_hedge']} HEDGE and {row['num_refuse']} REFUSE, {row['num_expected']:.1f} expected"
        )


def _needed(name: str, value: T | None) -> T:
    from sparkray.errors import UsageError

    if value is None:
        raise UsageError(f"the recording does not say the {name}.", hint=f"Give --{name}.", param=name)
    return value


def _plain_name(model: str) -> str:
    from sparkray.models import EMBEDDED, resolve_model

    return resolve_model(model).model_id if model == EMBEDDED else model


def _as_json(profile: ReferenceProfile) -> dict[str, Any]:
    return {"name": profile.name, **profile.to_dict()}


def _check_as_json(arl_tokens: float, count: AlarmCount) -> dict[str, Any]:
    return {
        "arl_tokens": arl_tokens,
        "num_tokens": count.num_tokens,
        "num_expected": count.num_tokens / arl_tokens,
        "num_hedge": count.num_hedge,
        "num_refuse": count.num_refuse,
    }
