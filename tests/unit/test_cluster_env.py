"""`sparkray cluster env`: what a shell needs to reach the running session, and the token nowhere in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sparkray.cli.cluster import app
from sparkray.cluster.processes import MARK
from sparkray.cluster.session import Session, running_session, save_session
from sparkray.errors import NotFoundError, UnavailableError, UsageError

SECRET = "0123456789abcdef"
RUNNING_MARK = "env-test"


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPARKRAY_STATE", str(tmp_path / "state"))
    return tmp_path


@pytest.fixture
def pid() -> Iterator[int]:
    """A process that stands for a head: alive, and with the session's mark."""
    with subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env={MARK: RUNNING_MARK}
    ) as process:
        yield process.pid
        process.communicate()


def record(name: str, pid: int, folder: Path, mark: str = RUNNING_MARK) -> Session:
    folder.mkdir(exist_ok=True)
    (folder / "it's the token").write_text(SECRET)
    session = Session(
        name=name,
        mark=mark,
        pid=pid,
        address="127.0.0.1:4321",
        dashboard_url="http://127.0.0.1:8265",
        token_path=str(folder / "it's the token"),
        temp_dir=str(folder),
        log_path=str(folder / "log"),
    )
    save_session(session)
    return session


def test_a_shell_takes_the_variables(state: Path, pid: int) -> None:
    session = record("default", pid, state / "spk")
    printed = CliRunner().invoke(app, ["env"], catch_exceptions=False).stdout
    assert SECRET not in printed
    script = printed + f'\n"{sys.executable}" -c "import json, os; print(json.dumps(dict(os.environ)))"'
    shell = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, check=True, env={})
    assert (
        json.loads(shell.stdout).items()
        >= {
            "RAY_ADDRESS": "127.0.0.1:4321",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": session.token_path,
            "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:8265",
            "RAY_DASHBOARD_ADDRESS": "http://127.0.0.1:8265",
        }.items()
    )
    told = json.loads(CliRunner().invoke(app, ["env", "--name", "default", "--json"]).stdout)
    assert told == session.environment()


def test_a_session_on_the_loopback_keeps_ray_there(state: Path) -> None:
    near = record("near", 1, state / "a")
    assert near.environment()["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"
    far = replace(near, address="192.168.100.10:6379")
    assert "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" not in far.environment()


def test_the_session_is_the_one_that_runs_or_the_one_that_is_named(state: Path, pid: int) -> None:
    with pytest.raises(UnavailableError, match="no session is running"):
        running_session()
    record("gone", os.getpid(), state / "a", mark="another mark")
    with pytest.raises(UnavailableError, match="no session is running"):
        running_session()
    with pytest.raises(UnavailableError, match="'gone' is recorded, and not running"):
        running_session("gone")
    with pytest.raises(NotFoundError, match="'never'"):
        running_session("never")
    first = record("first", pid, state / "b")
    assert running_session() == first
    second = record("second", pid, state / "c")
    with pytest.raises(UsageError, match="first, second"):
        running_session()
    assert running_session("second") == second
