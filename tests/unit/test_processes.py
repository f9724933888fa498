"""Processes are known by their mark: ours are ended, orphans too, others never."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from sparkray.cluster import processes
from sparkray.cluster.processes import end_marked, free_port, is_alive, marked, port_is_free, spawn

# A child that ignores TERM, under a parent that exits at once: an orphan that only the mark names.
ORPHAN = """
import subprocess, sys
code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
"""

# As a process does that renames itself: the title runs into the environment's first bytes, and zeros follow it.
RENAMED = """
import ctypes, pathlib, time
env_start = int(pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()[47])
ctypes.memset(env_start, 0, 8)
print("up", flush=True)
time.sleep(60)
"""


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.05)


def test_a_stubborn_orphan_is_ended_and_a_bystander_is_not(tmp_path: Path) -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    mark = f"test-{os.getpid()}-{time.time_ns()}"
    log = tmp_path / "log"
    try:
        parent = spawn([sys.executable, "-c", ORPHAN], mark=mark, env={}, log_path=log)
        wait_for(lambda: log.exists() and "up" in log.read_text())
        wait_for(lambda: not is_alive(parent, mark))
        assert len(marked(mark)) == 1
        assert end_marked(mark, first=parent, patience_seconds=1.5) == 1
        assert marked(mark) == []
        assert psutil.pid_exists(bystander.pid)
    finally:
        bystander.kill()
        bystander.wait()


def test_what_was_spawned_is_known_as_ours_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a moment after the program began its environment reads as empty; nobody may take it for dead then."""
    looks = iter([False, False])
    carries = processes._carries
    monkeypatch.setattr(processes, "_carries", lambda *asked: next(looks, None) is None and carries(*asked))
    mark = f"test-{os.getpid()}-{time.time_ns()}"
    pid = spawn(["sleep", "60"], mark=mark, env={}, log_path=tmp_path / "log")
    assert is_alive(pid, mark)
    assert end_marked(mark, first=pid) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="how Linux shows a process's environment")
def test_a_process_that_overwrote_the_start_of_its_environment_is_still_ours(tmp_path: Path) -> None:
    mark = f"test-{os.getpid()}-{time.time_ns()}"
    log = tmp_path / "log"
    pid = spawn([sys.executable, "-c", RENAMED], mark=mark, env={}, log_path=log)
    wait_for(lambda: "up" in log.read_text())
    assert psutil.Process(pid).environ() == {}
    assert is_alive(pid, mark)
    assert not is_alive(pid, mark[:-1])
    assert [process.pid for process in marked(mark)] == [pid]
    assert end_marked(mark, first=pid, patience_seconds=1.5) == 1


def test_a_pid_without_the_mark_is_not_ours() -> None:
    assert not is_alive(os.getpid(), "nobody")


def test_a_bound_port_is_not_free() -> None:
    import socket

    port = free_port()
    assert port_is_free(port)
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", port))
        holder.listen()
        assert not port_is_free(port)
