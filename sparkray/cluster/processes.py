"""Processes that belong together: spawned with a mark in their environment, found and ended by that mark.

A Ray cluster is a tree of processes, and a killed parent leaves orphans that no pid file names. The mark is
inherited by every descendant, so an orphan is still known as ours, and nobody else's process ever matches.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

MARK = "SPARKRAY_CLUSTER_ID"
# Within this time a program that was started shows its environment, on the busiest machine.
_EXEC_SECONDS = 10.0


def spawn(command: Sequence[str], *, mark: str, env: Mapping[str, str], log_path: Path) -> int:
    """Start `command` in a session of its own, with stdout and stderr in `log_path`; returns its pid."""
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("ab") as log:
        process = subprocess.Popen(
            command,
            env={**os.environ, **env, MARK: mark},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    # The kernel lays the new environment out a moment after Popen learns that the program runs; until then the process
    # looks like another's.
    deadline = time.monotonic() + _EXEC_SECONDS
    while process.poll() is None and not is_alive(process.pid, mark) and time.monotonic() < deadline:
        time.sleep(0.005)
    return process.pid


def marked(mark: str) -> list[psutil.Process]:
    """Every living process, zombies aside, that carries `mark`, but for this one."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and _carries(process, mark):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


def _carries(process: psutil.Process, mark: str) -> bool:
    block = Path(f"/proc/{process.pid}/environ")
    try:
        return holds_mark(block.read_bytes(), mark)
    except FileNotFoundError:  # another system than Linux, or gone: psutil tells the two apart
        return process.environ().get(MARK) == mark
    except PermissionError as refused:
        raise psutil.AccessDenied(process.pid) from refused
    except ProcessLookupError as gone:
        raise psutil.NoSuchProcess(process.pid) from gone


def holds_mark(environment: bytes, mark: str) -> bool:
    """Whether a process's block of `KEY=value` entries, each ended by a zero byte, has the mark.

    A process that renames itself, as Ray's do, overwrites the start of its block with zeros. psutil takes a zero for
    the end and sees an empty environment there.
    """
    return f"{MARK}={mark}".encode() in environment.split(b"\0")


def end_marked(mark: str, *, first: int | None, patience_seconds: float = 15.0) -> int:
    """End every process with `mark`: `first` is asked, then all are, then they are killed.

    Returns the number of processes that were alive.
    """
    processes = marked(mark)
    num_alive = len(processes)
    # The head asks its own children first, so that they can write what they have to.
    for targets, seconds in (
        ([p for p in processes if p.pid == first], patience_seconds),
        (processes, patience_seconds / 3),
    ):
        _signal(targets, kill=False)
        _wait_gone(targets, seconds)
    deadline = time.monotonic() + patience_seconds
    while (processes := marked(mark)) and time.monotonic() < deadline:
        _signal(processes, kill=True)
        _wait_gone(processes, 1.0)
    return num_alive


def _signal(processes: Sequence[psutil.Process], *, kill: bool) -> None:
    for process in processes:
        try:
            process.kill() if kill else process.terminate()
        except psutil.NoSuchProcess:
            continue


def _wait_gone(processes: Sequence[psutil.Process], seconds: float) -> None:
    psutil.wait_procs(processes, timeout=seconds)


def is_alive(pid: int, mark: str) -> bool:
    """Whether `pid` lives and carries `mark`, so that a reused pid is not taken for ours."""
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and _carries(process, mark)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that is free at this moment."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def port_is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Whether `host:port` can be bound now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
