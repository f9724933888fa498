"""The main job once through: bring the embedded model up, ask it, read its trace, take everything down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from sparkray.config.cluster import ClusterConfig
from sparkray.config.serve import EngineConfig, ServeConfig
from sparkray.serving.chat_view import report_lines
from sparkray.serving.client import ChatClient
from sparkray.serving.lifecycle import down, up
from sparkray.serving.repl import Reply, exchange


@dataclass(frozen=True)
class DemoResult:
    """What the demo showed."""

    question: str
    answer: str
    request_id: str
    trace: dict[str, Any]
    report: list[str]
    url: str
    dashboard_url: str | None
    token_path: str
    kept: bool

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """The result as a person reads it."""
        counts = ", ".join(f"{key} {self.trace[key]}" for key in ("hedge_count", "refuse_count", "total_tokens"))
        lines = [
            f"question  {self.question}",
            f"answer    {self.answer}",
            *(f"          {line}" for line in self.report),
            f"trace     {self.request_id}: {counts}",
        ]
        if self.kept:
            lines += [
                "",
                f"serving   {self.url}/v1   (API page {self.url}/docs, metrics {self.url}/metrics)",
                f"trace     {self.url}/v1/metis/traces/{self.request_id}",
                f"dashboard {self.dashboard_url}   (token in {self.token_path})",
                f"talk      sparkray chat --url {self.url}",
                f"end       sparkray serve down --name {session_name(self.url)}",
            ]
        return lines


def session_name(url: str) -> str:
    """The demo's session, one a port, so that two demos never meet."""
    return f"demo-{url.rpartition(':')[2]}"


def run_demo(*, port: int, question: str, keep: bool, say: Callable[[str], None]) -> DemoResult:
    """Serve, ask, read, shut down; with `keep` the server stays.

    Raises:
        UnavailableError: as `lifecycle.up` does; nothing stays behind then.
    """
    config = ServeConfig(model="embedded", port=port, engine=EngineConfig(max_model_len=1024, max_num_seqs=8))
    name = session_name(f":{port}")
    session = up(config, ClusterConfig(), name=name, say=say)
    kept = False
    try:
        url = f"http://{config.host}:{config.port}"
        say("asking over HTTP")
        with ChatClient(url) as client:
            reply = _ask(client, question)
            trace = client.trace(reply.request_id)
        kept = keep
    finally:
        if not kept:
            say("shutting everything down")
            down(name)
    return DemoResult(
        question=question,
        answer=reply.text.strip(),
        request_id=reply.request_id,
        trace=trace,
        report=report_lines(reply.rows),
        url=url,
        dashboard_url=session.dashboard_url,
        token_path=session.token_path,
        kept=kept,
    )


def _ask(client: ChatClient, question: str) -> Reply:
    options = {"max_tokens": 96, "temperature": 0.0}
    return exchange(client, [{"role": "user", "content": question}], model=client.models()[0], options=options)
