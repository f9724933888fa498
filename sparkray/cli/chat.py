"""`sparkray chat`: talk to a served model and see how sure it is of every token."""

from __future__ import annotations

from typing import Annotated

import typer


def chat(
    url: Annotated[str | None, typer.Option(help="Server; by default the running session's.")] = None,
    model: Annotated[str | None, typer.Option(help="Model id; by default the server's first.")] = None,
    detector: Annotated[str | None, typer.Option(help="metis or calibrated.")] = None,
    boost: Annotated[str | None, typer.Option(help="off, published or careful.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest reply.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0, help="0 is greedy.")] = 0.7,
    question: Annotated[str | None, typer.Option("--question", "-q", help="Ask this one question and leave.")] = None,
) -> None:
    """Talk to a served model: tokens coloured by entropy, decision and CUSUM bar at the side."""
    from rich.console import Console

    from sparkray.serving.client import ChatClient
    from sparkray.serving.repl import Repl
    from sparkray.serving.status import default_url

    with ChatClient(url or default_url()) as client:
        repl = Repl(client, model or client.models()[0], Console(highlight=False))
        repl.options.update(max_tokens=max_tokens, temperature=temperature)
        xargs = {"metis_detector": detector, "metis_boost": boost}
        repl.options["vllm_xargs"] = {key: value for key, value in xargs.items() if value is not None}
        if question is not None:
            repl.ask(question)
        else:
            repl.run()
