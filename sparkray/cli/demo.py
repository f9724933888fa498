"""`sparkray demo`: the main job from nothing to an answer, and everything shut down again."""

from __future__ import annotations

from typing import Annotated

import typer

from sparkray.cli.options import JsonFlag


def demo(
    port: Annotated[int, typer.Option(help="HTTP port.")] = 8000,
    keep: Annotated[bool, typer.Option("--keep", help="Leave it running and print the URLs.")] = False,
    question: Annotated[
        str, typer.Option(help="What to ask.")
    ] = "What is the capital of France, and what river is it on?",
    json: JsonFlag = False,
) -> None:
    """Start Ray and Serve with the embedded model, ask one question over HTTP, show how sure each token was."""
    from sparkray.serving.demo import run_demo
    from sparkray.telemetry.console import print_json, stderr_console

    console = stderr_console()
    shown = run_demo(port=port, question=question, keep=keep, say=console.print)
    if json:
        print_json(shown.as_dict())
        return
    for line in shown.lines():
        typer.echo(line)
