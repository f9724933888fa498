"""Two Ray nodes in two network namespaces, the service of proof of compute on them, and a receiver of its callbacks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import httpx
import psutil
import pytest
import yaml

from sparkray.cluster.processes import end_marked, free_port, is_alive, marked, spawn
from sparkray.cluster.session import Session, end_session, start_session
from sparkray.config.cluster import ClusterConfig
from tests.second_network import SecondNetwork, second_network

REPOSITORY = Path(__file__).parents[2]
START_SECONDS = 240.0
START_TRIES = 3
CPUS_A_NODE = 8


def wait_for(what: str, condition: Callable[[], Any], seconds: float = START_SECONDS) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}"
        time.sleep(0.25)
    return found


class Receiver:
    """Takes callbacks; `down` closes its port, so that connections are refused, and `up` opens it again."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._lock = Lock()
        self._calls: list[tuple[str, str, dict[str, Any]]] = []
        self.up()

    def up(self) -> None:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    outer._calls.append((self.path, self.headers["Idempotency-Key"], body))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        Thread(target=self._server.serve_forever, daemon=True).start()

    def down(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def bodies(self, path: str) -> list[dict[str, Any]]:
        """What came to a path; a key that comes again is the same body, as the sender promises."""
        with self._lock:
            by_key = {key: body for called, key, body in self._calls if called == path}
            assert all(by_key[key] == body for called, key, body in self._calls if called == path)
        return list(by_key.values())

    def nonces(self) -> list[int]:
        return [nonce for body in self.bodies("/generated") for nonce in body["nonces"]]


class TwoNodes:
    """The head here and a second node in the other namespace, which can be stopped and started."""

    def __init__(self, session: Session, network: SecondNetwork, folder: Path) -> None:
        self.session = session
        self._network = network
        self._folder = folder
        self._mark = f"{session.mark}-b"
        self._num_starts = 0

    def start_second(self) -> None:
        self._num_starts += 1
        log_path = self._folder / f"second-{self._num_starts}.log"
        command = [
            *self._network.prefix,
            str(Path(sys.executable).with_name("ray")),
            "start",
            "--block",
            f"--address={self.session.address}",
            f"--node-ip-address={self._network.node_ip}",
            # Under the head's own folder each node would delete working directories that jobs of the other are in.
            f"--temp-dir={self.session.temp_dir}/b",
            f"--num-cpus={CPUS_A_NODE}",
            "--object-store-memory=100000000",
        ]
        environment = {**self.session.environment(), "RAY_ADDRESS": "", "RAY_memory_monitor_refresh_ms": "0"}
        # On a busy machine a node may give up on itself before it is ready.
        for _ in range(START_TRIES):
            pid = spawn(command, mark=self._mark, env=environment, log_path=log_path)
            wait_for("the second node", lambda pid=pid: self._is_up(log_path) or not is_alive(pid, self._mark))
            if self._is_up(log_path):
                return
        raise AssertionError(log_path.read_text(errors="replace")[-2000:])

    @staticmethod
    def _is_up(log_path: Path) -> bool:
        return "Ray runtime started" in log_path.read_text(errors="replace")

    def stop_second(self) -> int:
        """End every process of the second node; how many there were."""
        return end_marked(self._mark, first=None, patience_seconds=6.0)

    def groups(self, *, second: bool) -> list[psutil.Process]:
        """The processes of the group actors of one node."""
        mark = self._mark if second else self.session.mark
        return [process for process in marked(mark) if "PocGroupActor" in " ".join(process.cmdline())]

    def run(self, *command: str, timeout_seconds: float = START_SECONDS) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, **self.session.environment()}
        path = [str(Path(sys.executable).with_name(command[0])), *command[1:]]
        return subprocess.run(
            path, env=environment, capture_output=True, text=True, timeout=timeout_seconds, check=False
        )


@contextmanager
def two_nodes(folder: Path) -> Iterator[TwoNodes]:
    """The cluster, with nothing on it yet."""
    with second_network() as network, pytest.MonkeyPatch.context() as patch:
        if not network.prefix:
            pytest.skip("no network namespace can be made here")
        patch.setenv("SPARKRAY_STATE", str(folder / "state"))
        patch.setenv("PYTHONPATH", str(REPOSITORY))
        patch.setenv("OMP_NUM_THREADS", "1")
        config = ClusterConfig(
            node_ip=network.head_ip,
            num_cpus=CPUS_A_NODE,
            object_store_gib=0.1,
            dashboard_port=free_port(),
            start_timeout_seconds=START_SECONDS,
        )
        session = start_session(config, name="poc")
        nodes = TwoNodes(session, network, folder)
        try:
            nodes.start_second()
            yield nodes
        finally:
            nodes.stop_second()
            end_session(session)


class Client:
    """The service's routes."""

    def __init__(self, port: int) -> None:
        self._client = httpx.Client(base_url=f"http://127.0.0.1:{port}/api/v1", timeout=60)

    def post(self, path: str, body: object = None) -> httpx.Response:
        return self._client.post(path, json=body)

    def status(self) -> dict[str, Any]:
        return dict(self._client.get("/pow/status").raise_for_status().json())

    def healthy(self) -> bool:
        try:
            return self._client.get("/pow/status").status_code == 200
        except httpx.HTTPError:
            return False


def deploy(nodes: TwoNodes, folder: Path, settings: dict[str, Any]) -> Client:
    """Deploy `serve_apps/poc.yaml` with these settings on a free port, as an operator does."""
    port = free_port()
    text = yaml.safe_load((REPOSITORY / "serve_apps" / "poc.yaml").read_text())
    text["http_options"]["port"] = port
    text["applications"][0]["args"].update(settings)
    path = folder / "poc.yaml"
    path.write_text(yaml.safe_dump(text))
    done = nodes.run("serve", "deploy", str(path), "-a", str(nodes.session.dashboard_url))
    assert done.returncode == 0, done.stdout + done.stderr
    client = Client(port)
    wait_for("the service", client.healthy)
    return client


def kill(process: psutil.Process) -> None:
    """As a crash does."""
    os.kill(process.pid, signal.SIGKILL)
