"""What the recorded sessions are doing, asked over HTTP with a short limit."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import httpx

from sparkray.cluster.session import Session, list_sessions

ANSWER_TIMEOUT_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class SessionStatus:
    """One line of `sparkray serve status`."""

    name: str
    state: str
    url: str | None
    dashboard_url: str | None
    models: tuple[str, ...]
    pid: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def describe_sessions() -> list[SessionStatus]:
    """Every recorded session: `dead`, `starting`, `serving` or `unhealthy`."""
    return [_describe(session) for session in list_sessions()]


def _describe(session: Session) -> SessionStatus:
    state: str = "dead"
    models: tuple[str, ...] = ()
    if session.alive:
        state, models = _ask(session.serve_url) if session.serve_url else ("starting", ())
    return SessionStatus(session.name, state, session.serve_url, session.dashboard_url, models, session.pid)


def _ask(url: str) -> tuple[str, tuple[str, ...]]:
    try:
        health = httpx.get(f"{url}/health", timeout=ANSWER_TIMEOUT_SECONDS)
        models = tuple(health.json().get("models", ()))
    except (httpx.HTTPError, ValueError):
        return "unhealthy", ()
    return ("serving" if health.status_code == 200 else "unhealthy"), models


def default_url() -> str:
    """The URL of the one session that serves, or the default port where none is recorded."""
    urls = [session.serve_url for session in list_sessions() if session.alive and session.serve_url]
    return urls[0] if urls else "http://127.0.0.1:8000"
