"""Starting a session: a head that Ray itself gave up is started again, one that died is not."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from sparkray.cluster import session as sessions
from sparkray.cluster.session import end_session, find_session, start_session
from sparkray.config.cluster import ClusterConfig
from sparkray.errors import NotFoundError, UnavailableError, WaitTimeoutError

# A head that fails with the line of its first argument until the counter file holds as many bytes as its second.
HEAD = """
import pathlib, socket, sys, time
count, wanted, port, line = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
count.write_bytes(count.read_bytes() + b"x" if count.exists() else b"x")
if len(count.read_bytes()) < wanted:
    print(line, flush=True)
    sys.exit(1)
listener = socket.create_server(("127.0.0.1", port))
print("Ray runtime started", flush=True)
time.sleep(60)
"""
SLOW = "Exception: The current node timed out during startup. This could happen because the GCS is overloaded."


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARKRAY_STATE", str(tmp_path / "state"))


def start(monkeypatch: pytest.MonkeyPatch, count: Path, line: str, **settings: Any) -> sessions.Session:
    def command(config: ClusterConfig, port: int, *_: Any) -> list[str]:
        return [sys.executable, "-c", HEAD, str(count), "3", str(port), line]

    monkeypatch.setattr(sessions, "head_command", command)
    return start_session(ClusterConfig(**{"start_timeout_seconds": 30, **settings}), name="head")


def test_a_node_that_was_too_slow_is_started_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    session = start(monkeypatch, tmp_path / "count", SLOW)
    try:
        assert session.alive and find_session("head") == session
        assert (tmp_path / "count").read_bytes() == b"xxx"
    finally:
        end_session(session)


def test_a_head_that_died_of_something_else_is_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=r"ended while starting.*no space left"):
        start(monkeypatch, tmp_path / "count", "OSError: no space left on device")
    assert (tmp_path / "count").read_bytes() == b"x"
    with pytest.raises(NotFoundError):
        find_session("head")


def test_it_is_given_up_at_the_time_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises((UnavailableError, WaitTimeoutError), match=r"ended while starting|did not answer within"):
        start(monkeypatch, tmp_path / "count", SLOW, start_timeout_seconds=0.01)
