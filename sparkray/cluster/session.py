"""A local Ray cluster as a session: a head process, its ports, its own token, and a record of it on disk.

Several sessions can run beside each other on one machine, since each has its own ports, temporary folder and
token. `ray stop` ends every cluster of the host, so it is never used: a session ends the processes that carry
its mark and no others.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from sparkray.cluster.processes import end_marked, free_port, is_alive, marked, port_is_free, spawn
from sparkray.config.cluster import ClusterConfig
from sparkray.errors import BusyError, NotFoundError, UnavailableError, UsageError, WaitTimeoutError

# What Ray writes when its own node was not up within the time that it gives it.
_GAVE_UP = "The current node timed out during startup"


@dataclass(frozen=True, slots=True)
class Session:
    """What is needed to reach a running cluster and to end it."""

    name: str
    mark: str
    pid: int
    address: str
    dashboard_url: str | None
    token_path: str
    temp_dir: str
    log_path: str
    serve_url: str | None = None

    def environment(self) -> dict[str, str]:
        """The variables that Ray's own commands need to reach this cluster."""
        variables = {
            "RAY_ADDRESS": self.address,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": self.token_path,
        }
        if self.address.startswith("127.0.0.1:"):
            # Ray takes a loopback address for a slip and puts the machine's own in its place, and then listens on
            # every interface; this switch, which is on where Ray knows no clusters, keeps it where it was told to be.
            variables["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        if self.dashboard_url:
            # `ray job` takes the dashboard's address, and `serve deploy` ignores RAY_ADDRESS.
            variables["RAY_API_SERVER_ADDRESS"] = self.dashboard_url
            variables["RAY_DASHBOARD_ADDRESS"] = self.dashboard_url
        return variables

    @property
    def alive(self) -> bool:
        return is_alive(self.pid, self.mark)


def state_dir() -> Path:
    """Where sessions are recorded: SPARKRAY_STATE, else XDG_STATE_HOME/sparkray."""
    named = os.environ.get("SPARKRAY_STATE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "sparkray"


def _record_path(name: str) -> Path:
    return state_dir() / "sessions" / f"{name}.json"


def save_session(session: Session) -> None:
    """Record the session, by a temporary name and a rename."""
    path = _record_path(session.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    partial.write_text(json.dumps(asdict(session), indent=1), encoding="utf-8")
    partial.rename(path)


def list_sessions() -> list[Session]:
    """All recorded sessions, alive or not."""
    return [Session(**json.loads(path.read_text())) for path in sorted(_record_path("x").parent.glob("*.json"))]


def find_session(name: str) -> Session:
    """The recorded session of that name.

    Raises:
        NotFoundError: there is none; the message lists those that exist.
    """
    for session in list_sessions():
        if session.name == name:
            return session
    names = ", ".join(session.name for session in list_sessions()) or "none"
    raise NotFoundError(f"no session named {name!r} is recorded; recorded: {names}.")


def running_session(name: str | None = None) -> Session:
    """The running session of that name, or the only one that runs.

    Raises:
        NotFoundError: none of that name is recorded.
        UnavailableError: it is not running, or none is.
        UsageError: several are running and none is named.
    """
    if name is not None:
        session = find_session(name)
        if not session.alive:
            raise UnavailableError(
                f"session {name!r} is recorded, and not running any more.",
                hint=f"Clear it away by `sparkray serve down --name {name}`.",
            )
        return session
    alive = [session for session in list_sessions() if session.alive]
    if not alive:
        raise UnavailableError("no session is running.", hint="Start one by `sparkray serve up`.")
    if len(alive) > 1:
        raise UsageError(
            f"{len(alive)} sessions are running: {', '.join(session.name for session in alive)}.",
            hint="Choose one by --name.",
            param="name",
        )
    return alive[0]


def start_session(config: ClusterConfig, name: str = "default") -> Session:
    """Start a Ray head of our own and wait until it answers.

    Raises:
        BusyError: a session of that name is running, or is just being started.
        UnavailableError: the dashboard's port is taken, or the head died; its last lines are in the message.
        WaitTimeoutError: the head did not answer within `start_timeout_seconds`.
    """
    lock = FileLock(_lock_path(name))
    try:
        lock.acquire(timeout=1)
    except Timeout as held:
        raise BusyError(
            f"session {name!r} is being started or ended by another process.",
            hint="Wait for it, or choose another --name.",
        ) from held
    try:
        return _start(config, name)
    finally:
        lock.release()


def _lock_path(name: str) -> Path:
    path = state_dir() / "sessions" / f"{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _start(config: ClusterConfig, name: str) -> Session:
    for old in list_sessions():
        if old.name == name:
            if old.alive:
                raise BusyError(
                    f"session {name!r} is already running (pid {old.pid}, {old.address}).",
                    hint=f"End it by `sparkray serve down --name {name}`, or choose another --name.",
                )
            end_session(old)
    deadline = time.monotonic() + config.start_timeout_seconds
    while True:
        try:
            return _start_once(config, name, deadline)
        except _SlowNodeError:
            if time.monotonic() > deadline:
                raise


class _SlowNodeError(UnavailableError):
    """Ray gave its own node up: it waits for 30 s and cannot be told otherwise, and a busy machine needs more."""


def _start_once(config: ClusterConfig, name: str, deadline: float) -> Session:
    mark = secrets.token_hex(8)
    # Short, because Ray puts Unix sockets below it and their paths are limited to 107 bytes.
    temp_dir = Path(tempfile.mkdtemp(prefix="spk-"))
    token_path = temp_dir / "token"
    token_path.touch(mode=0o600)
    token_path.write_text(secrets.token_hex(32), encoding="ascii")
    port = config.port or free_port(config.node_ip)
    dashboard_port = _dashboard_port(config)
    session = Session(
        name=name,
        mark=mark,
        pid=0,
        address=f"{config.node_ip}:{port}",
        dashboard_url=f"http://127.0.0.1:{dashboard_port}" if config.dashboard else None,
        token_path=str(token_path),
        temp_dir=str(temp_dir),
        log_path=str(temp_dir / "head.log"),
    )
    # Recorded before it lives: whatever happens next, `down` finds the mark.
    save_session(session)
    try:
        pid = spawn(
            head_command(config, port, dashboard_port, temp_dir),
            mark=mark,
            env={**session.environment(), "RAY_ADDRESS": "", **_head_environment()},
            log_path=Path(session.log_path),
        )
        session = Session(**{**asdict(session), "pid": pid})
        save_session(session)
        _wait_ready(session, deadline, config.start_timeout_seconds)
    except BaseException:
        end_session(session)
        raise
    return session


def _head_environment() -> dict[str, str]:
    return {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DISABLE_DOCKER_CPU_WARNING": "1",
        # Ray's memory monitor sees process memory only and kills the engine on unified memory; doctor watches instead.
        "RAY_memory_monitor_refresh_ms": "0",
        # Ray runs workers at niceness 15; a replica would give way to anything else on the machine that serves it.
        "RAY_worker_niceness": "0",
        **_thread_environment(),
        "PYTHONWARNINGS": "ignore",
        # Jobs are submitted as `python jobs/...`: that python is the one that runs here.
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath))),
    }


def _thread_environment() -> dict[str, str]:
    """vLLM pins every engine of a machine to the same cores by default, so two replicas would share half of them."""
    num_threads = max(1, len(os.sched_getaffinity(0)) - 1) if hasattr(os, "sched_getaffinity") else 1
    return {
        "VLLM_CPU_OMP_THREADS_BIND": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "nobind"),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(num_threads)),
        # Threads that wait in a loop take the cores from the ones that they wait for.
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive"),
    }


def _dashboard_port(config: ClusterConfig) -> int:
    """The port asked for, or the next free ones after the default, so that two sessions can stand side by side."""
    default = ClusterConfig.model_fields["dashboard_port"].default
    if port_is_free(config.dashboard_port):
        return config.dashboard_port
    if config.dashboard_port != default:
        raise UnavailableError(
            f"the dashboard's port {config.dashboard_port} is in use.",
            hint="Name a free one by --set dashboard_port=PORT.",
        )
    return free_port()


def head_command(config: ClusterConfig, port: int, dashboard_port: int, temp_dir: Path) -> list[str]:
    """The `ray start` command of the head: every port is our own choice."""
    command = [
        str(Path(sys.executable).with_name("ray")),
        "start",
        "--head",
        "--block",
        "--disable-usage-stats",
        f"--node-ip-address={config.node_ip}",
        f"--port={port}",
        f"--temp-dir={temp_dir}",
        f"--include-dashboard={'true' if config.dashboard else 'false'}",
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard_port}",
        f"--dashboard-agent-listen-port={free_port()}",
        f"--metrics-export-port={free_port()}",
        f"--ray-client-server-port={free_port()}",
        f"--object-store-memory={int(config.object_store_gib * 2**30)}",
    ]
    if config.num_cpus is not None:
        command.append(f"--num-cpus={config.num_cpus}")
    if config.num_gpus is not None:
        command.append(f"--num-gpus={config.num_gpus}")
    return command


def _wait_ready(session: Session, deadline: float, timeout_seconds: float) -> None:
    host, _, port = session.address.rpartition(":")
    while time.monotonic() < deadline:
        if not session.alive:
            kind = _SlowNodeError if _GAVE_UP in _log_text(session) else UnavailableError
            raise kind(f"the Ray head ended while starting; its last lines: {_log_tail(session)}")
        try:
            with socket.create_connection((host, int(port)), timeout=1):
                # The control store answers first; the node registers a moment later and says so in the log.
                if "Ray runtime started" in _log_text(session):
                    return
        except OSError:
            pass
        time.sleep(0.2)
    raise WaitTimeoutError(
        f"the Ray head did not answer within {timeout_seconds:.0f} s; its last lines: {_log_tail(session)}"
    )


def _log_text(session: Session) -> str:
    path = Path(session.log_path)
    return path.read_text(errors="replace") if path.exists() else ""


def _log_tail(session: Session, num_lines: int = 5) -> str:
    return " | ".join(line for line in _log_text(session).splitlines()[-num_lines:] if line.strip())


def end_session(session: Session) -> int:
    """End every process of the session, remove its folder and its record; returns how many were alive."""
    num_ended = end_marked(session.mark, first=session.pid)
    shutil.rmtree(session.temp_dir, ignore_errors=True)
    _record_path(session.name).unlink(missing_ok=True)
    return num_ended


def leftovers(session: Session) -> list[int]:
    """Pids that still carry the session's mark."""
    return [process.pid for process in marked(session.mark)]
