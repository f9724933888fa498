"""`sparkray NOUN VERB`: joins the nouns and turns errors into exit codes."""

from __future__ import annotations

import os

import typer

from sparkray import __version__
from sparkray.cli import (
    batch,
    chat,
    cluster,
    demo,
    distill,
    doctor,
    handoff,
    metis,
    models,
    plan,
    poc,
    prune,
    search,
    serve,
    train,
)
from sparkray.cli.entry import run_guarded

app = typer.Typer(
    name="sparkray",
    help="Serve, search, hand off, train, distil, prune and prove compute on a few DGX Sparks.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(serve.app, name="serve")
app.command("chat")(chat.chat)
app.command("batch")(batch.batch)
app.add_typer(cluster.app, name="cluster")
app.command("demo")(demo.demo)
app.add_typer(distill.app, name="distill")
app.add_typer(handoff.app, name="handoff")
app.add_typer(metis.app, name="metis")
app.add_typer(models.app, name="models")
app.command("plan")(plan.plan)
app.add_typer(poc.app, name="poc")
app.add_typer(prune.app, name="prune")
app.add_typer(search.app, name="search")
app.add_typer(train.app, name="train")
app.command("doctor")(doctor.doctor)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def main() -> None:
    """Entry point: runs the command line and exits with the code that the error table gives."""
    from sparkray.telemetry.logs import silence_libraries

    silence_libraries()
    run_guarded(app)


if __name__ == "__main__":
    main()
