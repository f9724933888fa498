"""Draws docs/images/chat.svg: one real exchange with a running server, in the view of `sparkray chat`.

Run `python docs/images/draw_chat.py --url http://127.0.0.1:8000`; the answer is drawn anew each time.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

from rich.console import Console

from sparkray.serving.chat_view import live_view, report
from sparkray.serving.client import ChatClient
from sparkray.serving.repl import exchange

WIDTH = 100


def main() -> None:
    """Ask, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--question", default="What is the capital of France, and why do people like to go there?")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--max-tokens", type=int, default=120)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("chat.svg"))
    options = parser.parse_args()
    with ChatClient(options.url) as client:
        model = client.models()[0]
        messages = [{"role": "user", "content": options.question}]
        drawn = {"temperature": options.temperature, "max_tokens": options.max_tokens}
        reply = exchange(client, messages, model=model, options=drawn)
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, highlight=False)
    console.print(f"[bold]{model}[/] at {client.base_url}; /help lists commands")
    console.print(f"[bold blue]you[/] {options.question}")
    console.print(live_view(reply.rows))
    console.print(report(reply.rows))
    options.out.write_text(console.export_svg(title="sparkray chat"), encoding="utf-8")


if __name__ == "__main__":
    main()
