"""`sparkray distill ...`: text to pack, teacher to store, store to student, and what the student is worth."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparkray.cli.options import ConfigFiles, JsonFlag, Overrides

if TYPE_CHECKING:
    from sparkray.config.distill import DistillConfig

app = typer.Typer(no_args_is_help=True, help="Distil a teacher into a student: pack, store, train, infer, bench.")

PackFolder = Annotated[Path, typer.Argument(help="Folder of a pack.", metavar="PACK")]
Out = Annotated[Path, typer.Argument(help="Folder of the result.", metavar="OUT")]
Store = Annotated[Path | None, typer.Option("--store", help="Folder of a finished logit store.")]


@app.command()
def toy(
    out: Annotated[Path, typer.Argument(help="File to write.", metavar="OUT")] = Path("data/toy.jsonl"),
    json: JsonFlag = False,
) -> None:
    """Write the toy set: beginnings of Python's own documentation and sources."""
    from sparkray.distill.data.sources import toy_documents, write_documents

    documents = toy_documents()
    write_documents(documents, out)
    _print({"out": str(out), "num_documents": len(documents), "num_bytes": out.stat().st_size}, json)


@app.command()
def pack(
    data: Annotated[
        str, typer.Argument(help="A .jsonl or .txt file, or python-docs, python-stdlib, toy.", metavar="DATA")
    ],
    out: Out,
    config: ConfigFiles = None,
    overrides: Overrides = None,
    json: JsonFlag = False,
) -> None:
    """Cut documents into sequences of equal length with the teacher's tokenizer."""
    settings = _settings(config, overrides)
    from sparkray.distill.run import make_pack

    made = make_pack(data, out, settings)
    _print(
        {
            "out": str(out),
            "num_train_sequences": len(made.train),
            "num_train_tokens": made.train.num_tokens,
            "num_validation_sequences": len(made.validation),
            "num_validation_tokens": made.validation.num_tokens,
            "sequence_tokens": made.header.sequence_tokens,
            "vocab_size": made.header.vocab_size,
            "data_sha256": made.header.data_sha256,
        },
        json,
    )


@app.command()
def store(
    pack: PackFolder,
    out: Out,
    config: ConfigFiles = None,
    overrides: Overrides = None,
    cache_read_only: Annotated[bool, typer.Option("--kd-cache-ro", help="Never write the cache.")] = False,
    num_workers: Annotated[int, typer.Option(help="Ray Data actors; 0 scores in this process.", min=0)] = 0,
    json: JsonFlag = False,
) -> None:
    """Score a pack's training part and keep the teacher's rows; a killed run goes on where it was."""
    settings = _settings(config, overrides, cache_read_only=cache_read_only)
    from sparkray.telemetry.progress import RunProgress

    with RunProgress("shards", quiet=json) as progress:
        if num_workers:
            from sparkray.distill.store.ray_capture import capture_with_ray

            manifest = capture_with_ray(
                out, pack, settings.teacher, settings.store, settings.client, num_workers=num_workers
            )
        else:
            from sparkray.distill.run import make_store

            manifest = make_store(pack, out, settings, progress.update)
    _print(
        {
            "out": str(out),
            "store_id": manifest.header.store_id,
            "num_shards": len(manifest.shards),
            "num_tokens": sum(shard.num_tokens for shard in manifest.shards),
            "bytes_per_token": manifest.bytes_per_token,
        },
        json,
    )


@app.command("train-ae")
def train_ae(
    pack: PackFolder,
    out: Out,
    config: ConfigFiles = None,
    overrides: Overrides = None,
    json: JsonFlag = False,
) -> None:
    """Train the latent student's autoencoder, and say how much of held-out text comes back whole."""
    settings = _settings(config, overrides)
    from sparkray.distill.run import train_latent_autoencoder
    from sparkray.telemetry.progress import RunProgress

    with RunProgress("steps", quiet=json) as progress:
        report = train_latent_autoencoder(
            pack, out, settings, lambda step, _: progress.update(step, settings.autoencoder.num_steps)
        )
    _print(report, json)


@app.command()
def train(
    pack: PackFolder,
    out: Out,
    store: Store = None,
    live: Annotated[bool, typer.Option("--live", help="Ask the teacher of the settings while training.")] = False,
    autoencoder: Annotated[
        Path | None, typer.Option(help="Folder of an autoencoder: train the latent student over it.")
    ] = None,
    cache_read_only: Annotated[bool, typer.Option("--kd-cache-ro", help="Never write the cache.")] = False,
    num_workers: Annotated[
        int, typer.Option(help="Workers on the Ray cluster that runs; 0 trains in this process.", min=0)
    ] = 0,
    min_workers: Annotated[int | None, typer.Option(help="Go on with as few workers as these.", min=1)] = None,
    spread: Annotated[bool, typer.Option(help="Put every worker on a node of its own.")] = False,
    min_hit_rate: Annotated[
        float | None, typer.Option(help="With --live: fail if the cache answered a smaller share.", min=0, max=1)
    ] = None,
    config: ConfigFiles = None,
    overrides: Overrides = None,
    json: JsonFlag = False,
) -> None:
    """Train a student from a store, from the live teacher, or on the data alone; a killed run goes on."""
    settings = _settings(config, overrides, cache_read_only=cache_read_only)
    if num_workers:
        if autoencoder is not None:
            raise typer.BadParameter("the latent student trains in this process; leave --num-workers out.")
        if min_hit_rate is not None:
            raise typer.BadParameter("--min-hit-rate is counted in this process; leave --num-workers out.")
        _print(_train_on_cluster(pack, out, store, live, settings, num_workers, min_workers, spread), json)
        return
    from sparkray.distill.run import train_causal, train_latent
    from sparkray.telemetry.progress import RunProgress

    with RunProgress("steps", quiet=json) as progress:

        def on_step(report: Any) -> None:
            progress.update(report.step, settings.train.num_steps)

        if autoencoder is None:
            summary = train_causal(pack, out, settings, store_folder=store, live=live, on_step=on_step)
        else:
            summary = train_latent(
                pack, out, settings, autoencoder_folder=autoencoder, store_folder=store, on_step=on_step
            )
    from sparkray.distill.gates import Gate, check_gates

    broken = check_gates(summary.get("client") or {}, [Gate("hit_rate", min_hit_rate, "at_least")])
    _print(summary | {"broken_gates": broken}, json)
    if broken:
        raise typer.Exit(1)


@app.command()
def infer(
    model: Annotated[Path, typer.Argument(help="Folder of a trained student: OUT/model.", metavar="MODEL")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_tokens: Annotated[int, typer.Option(help="Most tokens to write.", min=1)] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.", min=0)] = 0.8,
    top_p: Annotated[float, typer.Option(help="Mass of the likeliest tokens that are drawn from.", min=0.01)] = 0.95,
    beams: Annotated[int, typer.Option(help="Search with so many beams and draw nothing.", min=1)] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    json: JsonFlag = False,
) -> None:
    """Continue a text, token by token as it is written; or the likeliest continuations by beam search."""
    from sparkray.distill.alignment.fingerprint import load_tokenizer
    from sparkray.distill.generate import beam_search, sample_stream, write_latent
    from sparkray.distill.run import end_token, load_student
    from sparkray.distill.training.latent_files import is_latent, load_latent

    tokenizer = load_tokenizer(model)
    ids, end_id = tokenizer.encode(prompt, add_special_tokens=False).ids, end_token(tokenizer)
    ids = ids or [end_id]
    if is_latent(model):
        if beams > 1:
            raise typer.BadParameter("a latent student has no likelihoods to search with; leave --beams out.")
        ids = write_latent(load_latent(model), ids, max_tokens, temperature, end_id, seed)
        text = tokenizer.decode(ids)
        _print({"text": text, "num_tokens": len(ids)} if json else {"": text}, json)
        return
    student = load_student(model)
    if beams > 1:
        found = beam_search(student, ids, max_tokens=max_tokens, num_beams=beams, end_id=end_id)
        texts = [{"text": tokenizer.decode(beam.token_ids), "logprob": beam.logprob} for beam in found]
        _print({"beams": texts} if json else {f"{beam['logprob']:.2f}": beam["text"] for beam in texts}, json)
        return
    written: list[int] = []
    shown = ""
    for token in sample_stream(
        student, ids, max_tokens=max_tokens, temperature=temperature, top_p=top_p, end_id=end_id, seed=seed
    ):
        written.append(token)
        text = tokenizer.decode(written)
        # Half a character shows as a replacement mark until its other half is written.
        if not json and not text.endswith("\ufffd"):
            typer.echo(text[len(shown) :], nl=False)
            shown = text
    if json:
        _print({"text": tokenizer.decode(written), "num_tokens": len(written)}, json)
    else:
        typer.echo()


@app.command()
def bench(
    pack: PackFolder,
    model: Annotated[Path, typer.Argument(help="Folder of a trained student: OUT/model.", metavar="MODEL")],
    max_kl: Annotated[float | None, typer.Option(help="Fail above this: KL to the teacher, in nats.")] = None,
    max_perplexity: Annotated[float | None, typer.Option(help="Fail above this, on held-out text.")] = None,
    min_tokens_per_second: Annotated[
        float | None, typer.Option(help="Fail below this, written by the student.")
    ] = None,
    max_p95_seconds: Annotated[float | None, typer.Option(help="Fail above this: a token's latency.")] = None,
    config: ConfigFiles = None,
    overrides: Overrides = None,
    json: JsonFlag = False,
) -> None:
    """Measure a student on held-out text against data and teacher, and how fast it writes; gates fail closed."""
    settings = _settings(config, overrides)
    from sparkray.distill.gates import Gate, check_gates, measure_writing
    from sparkray.distill.run import evaluate_student

    report: dict[str, Any] = evaluate_student(pack, model, settings).to_json() | measure_writing(model)
    gates = [
        Gate("kl_to_teacher", max_kl, "at_most"),
        Gate("perplexity", max_perplexity, "at_most"),
        Gate("tokens_per_second", min_tokens_per_second, "at_least"),
        Gate("latency_p95_seconds", max_p95_seconds, "at_most"),
    ]
    broken = check_gates(report, gates)
    _print(report | {"broken_gates": broken}, json)
    if broken:
        raise typer.Exit(1)


@app.command()
def smoke(
    out: Annotated[Path | None, typer.Argument(help="Folder to keep; a temporary one by default.")] = None,
    model: Annotated[str, typer.Option(help="The teacher.")] = "embedded",
    scenarios: Annotated[list[str] | None, typer.Option("--only", help="A scenario; may be repeated.")] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps of each student.", min=2)] = 8,
    json: JsonFlag = False,
) -> None:
    """Run the three Spark scenarios in small and print what each did; the exit code is 1 where one is broken."""
    import tempfile

    from sparkray.distill.smoke import SCENARIOS, run_smoke

    with tempfile.TemporaryDirectory() as folder:
        rows = run_smoke(
            out or Path(folder),
            model=model,
            scenarios=scenarios or SCENARIOS,
            num_steps=steps,
            say=lambda line: typer.echo(line, err=True),
        )
    if json:
        _print({"ok": all(row["ok"] for row in rows), "scenarios": rows}, json)
    else:
        _print_table(rows)
    if not all(row["ok"] for row in rows):
        raise typer.Exit(1)


def _print_table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = {
        "loss_first": "loss",
        "loss_last": "at end",
        "second_hit_rate": "hits*",
        "latency_p95_seconds": "p95 s",
        "bytes_per_token": "B/token",
        "seconds": "took s",
    }
    table = Table("scenario", "", *columns.values(), caption="* share of the second run that the cache answered")
    for row in rows:
        numbers = [f"{row[column]:.3f}" if row.get(column) is not None else "" for column in columns]
        table.add_row(row["scenario"], "ok" if row["ok"] else "BROKEN", *numbers)
    Console().print(table)
    for row in rows:
        for reason in row["broken"]:
            typer.echo(f"{row['scenario']}: {reason}")


def _train_on_cluster(
    pack: Path,
    out: Path,
    store: Path | None,
    live: bool,
    settings: DistillConfig,
    num_workers: int,
    min_workers: int | None,
    spread: bool,
) -> dict[str, Any]:
    from sparkray.cluster.connection import cluster_connection
    from sparkray.config.base import validate_settings
    from sparkray.config.distill import TrainJobConfig
    from sparkray.distill.training.ray_run import train_on_cluster

    job = validate_settings(
        TrainJobConfig,
        {
            "pack": str(pack),
            "out": str(out),
            "store": None if store is None else str(store),
            "live": live,
            "distill": settings,
            "workers": {"num_workers": num_workers, "min_workers": min_workers, "spread": spread},
        },
    )
    with cluster_connection():
        return train_on_cluster(job)


def _settings(
    config: list[Path] | None, overrides: list[str] | None, *, cache_read_only: bool = False
) -> DistillConfig:
    from sparkray.config.base import load_settings
    from sparkray.config.distill import DistillConfig

    values = {"cache": {"read_only": True}} if cache_read_only else {}
    return load_settings(DistillConfig, config or (), overrides or (), values)


def _print(report: Mapping[str, Any], as_json: bool) -> None:
    from sparkray.telemetry.console import print_json

    if as_json:
        print_json(report)
        return
    for key, value in report.items():
        typer.echo(f"{key:26} {value}")
