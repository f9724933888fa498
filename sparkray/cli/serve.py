"""`sparkray serve up|down|status`: a served model, from nothing to a URL and back."""

from __future__ import annotations

from typing import Annotated

import typer

from sparkray.cli.options import ConfigFiles, DryRun, JsonFlag, Overrides, SessionName, read_settings

app = typer.Typer(no_args_is_help=True, help="Serve a model behind OpenAI's routes, every token watched.")


@app.command()
def up(
    model: Annotated[str | None, typer.Option(help="`embedded`, a local directory or a hub id.")] = None,
    port: Annotated[int | None, typer.Option(help="HTTP port.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    replicas: Annotated[int | None, typer.Option(help="Engines behind the routes.")] = None,
    config: ConfigFiles = None,
    overrides: Overrides = None,
    name: SessionName = "default",
    dry_run: DryRun = False,
    json: JsonFlag = False,
) -> None:
    """Start Ray and Serve on this machine, wait until the model answers, print the URLs."""
    from sparkray.config import ClusterConfig, ServeConfig
    from sparkray.telemetry.console import print_json, stderr_console

    flags = {"model": model, "port": port, "host": host, "replicas": replicas}
    settings = read_settings(ServeConfig, config, overrides, flags)
    if dry_run:
        print_json(settings.model_dump())
        return
    from sparkray.serving.lifecycle import up as serve_up

    console = stderr_console()
    session = serve_up(settings, ClusterConfig(), name=name, say=console.print)
    if json:
        print_json({"name": session.name, "url": session.serve_url, "dashboard": session.dashboard_url})
        return
    typer.echo(f"serving   {session.serve_url}/v1   (API page {session.serve_url}/docs)")
    typer.echo(f"dashboard {session.dashboard_url}   (token in {session.token_path})")
    typer.echo(f"talk      sparkray chat --url {session.serve_url}")
    typer.echo(f"end       sparkray serve down --name {session.name}")


@app.command()
def down(name: SessionName = "default", json: JsonFlag = False) -> None:
    """End a session and every process that belongs to it."""
    from sparkray.serving.lifecycle import down as serve_down
    from sparkray.telemetry.console import print_json

    num_ended = serve_down(name)
    if json:
        print_json({"name": name, "num_processes_ended": num_ended})
    else:
        typer.echo(f"session {name} ended ({num_ended} processes)")


@app.command()
def status(json: JsonFlag = False) -> None:
    """List the sessions of this machine and whether they answer."""
    from sparkray.serving.status import describe_sessions
    from sparkray.telemetry.console import print_json

    rows = describe_sessions()
    if json:
        print_json({"sessions": [row.as_dict() for row in rows]})
        return
    if not rows:
        typer.echo("no session is recorded; start one by `sparkray serve up`")
    for row in rows:
        typer.echo(f"{row.name:12} {row.state:10} {row.url or '-':28} {', '.join(row.models) or '-'}  pid {row.pid}")
