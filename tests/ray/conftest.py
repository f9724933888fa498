"""One Ray cluster of two nodes for all tests of this folder, the second in a network of its own where that can be had.

    def test_x(cluster: RayCluster) -> None: ...        # over HTTP and by Ray's own commands
    def test_y(ray_connection: None) -> None: ...       # `ray.remote` from the test's own process

The first node is a session as `sparkray serve up` starts one; the second joins it. Each has its logical CPUs set by
hand, so that actors find room on a machine with fewer cores. Every process carries the session's mark in its
environment, and those alone are ended.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from sparkray.cluster.processes import free_port, marked, spawn
from sparkray.cluster.session import Session, end_session, leftovers, start_session
from sparkray.config.cluster import ClusterConfig
from tests.second_network import SecondNetwork, second_network

NUM_CPUS_PER_NODE = 8
_START_SECONDS = 240.0


@dataclass(frozen=True)
class RayCluster:
    """The running cluster.

    Attributes:
        session: the head, its address, dashboard and token.
        network: the addresses of the two nodes.
        env: the environment in which Ray's commands reach it.
    """

    session: Session
    network: SecondNetwork
    env: dict[str, str]

    def ray(self, *arguments: str, timeout_seconds: float) -> subprocess.CompletedProcess[str]:
        """Run Ray's own command against this cluster."""
        command = [str(Path(sys.executable).with_name("ray")), *arguments]
        return subprocess.run(
            command, env=self.env, capture_output=True, text=True, timeout=timeout_seconds, check=False
        )

    def job_status(self, job: str) -> str:
        """What `ray job status` says, asked over HTTP: the command takes seconds to start, and a test asks often."""
        return str(self._jobs("GET", job)["status"])

    def stop_job(self, job: str) -> None:
        """What `ray job stop` asks for, at once; returns before the job has ended."""
        self._jobs("POST", f"{job}/stop")

    def kill_second_node(self) -> None:
        """End every process of the second node at once, as a machine that loses power; `start_second_node` after it."""
        (starter,) = [
            process
            for process in marked(self.session.mark)
            if {"start", f"--node-ip-address={self.network.node_ip}"} <= set(process.cmdline())
        ]
        for process in [starter, *starter.children(recursive=True)]:
            process.kill()

    def start_second_node(self) -> None:
        """Join the second node again."""
        _start_second_node(self.session, self.network)

    def _jobs(self, method: str, path: str) -> dict[str, Any]:
        token = Path(self.session.token_path).read_text().strip()
        url = f"{self.session.dashboard_url}/api/jobs/{path}"
        reply = httpx.request(method, url, headers={"Authorization": f"Bearer {token}"}, timeout=60)
        return dict(reply.raise_for_status().json())


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    with pytest.MonkeyPatch.context() as patch, second_network() as network:
        patch.setenv("SPARKRAY_STATE", str(tmp_path_factory.mktemp("state")))
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("GLOO_SOCKET_IFNAME", network.interfaces[0])
        config = ClusterConfig(
            node_ip=network.head_ip,
            num_cpus=NUM_CPUS_PER_NODE,
            object_store_gib=0.2,
            dashboard_port=free_port(),
            start_timeout_seconds=_START_SECONDS,
        )
        session = start_session(config, name="tests")
        try:
            _start_second_node(session, network)
            yield RayCluster(session, network, {**os.environ, **session.environment()})
        finally:
            end_session(session)
        assert leftovers(session) == []


@pytest.fixture(scope="session")
def ray_connection(cluster: RayCluster) -> Iterator[None]:
    """This process as a driver of the cluster."""
    import ray
    from ray._raylet import AuthenticationTokenLoader, Config

    with pytest.MonkeyPatch.context() as patch:
        for name, value in cluster.session.environment().items():
            patch.setenv(name, value)
        # Ray reads these two once, when it is first imported, which another test may have done.
        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()
        ray.init(address=cluster.session.address, logging_level="ERROR", log_to_driver=False)
        try:
            yield
        finally:
            ray.shutdown()


def _start_second_node(session: Session, network: SecondNetwork) -> None:
    """Join a node to the session and wait until the head counts it."""
    log_path = Path(session.temp_dir) / f"node-2-{free_port()}.log"
    command = [
        *network.prefix,
        str(Path(sys.executable).with_name("ray")),
        "start",
        "--block",
        f"--address={session.address}",
        f"--node-ip-address={network.node_ip}",
        # Under the head's own folder each node would delete working directories that jobs of the other are in.
        f"--temp-dir={session.temp_dir}/b",
        f"--num-cpus={NUM_CPUS_PER_NODE}",
        "--object-store-memory=200000000",
        f"--dashboard-agent-listen-port={free_port()}",
        f"--metrics-export-port={free_port()}",
        "--labels=sparkray.io/role=worker",
    ]
    environment = {
        **session.environment(),
        "RAY_ADDRESS": "",
        "GLOO_SOCKET_IFNAME": network.interfaces[1],
        "RAY_memory_monitor_refresh_ms": "0",
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
    }
    deadline = time.monotonic() + _START_SECONDS
    num_starts = 0
    while "Ray runtime started" not in (log := log_path.read_text(errors="replace") if log_path.exists() else ""):
        assert time.monotonic() < deadline, f"the second node did not start: {log}"
        # Ray gives its own node 30 s, which a busy machine exceeds.
        if log.count("timed out during startup") == num_starts:
            spawn(command, mark=session.mark, env=environment, log_path=log_path)
            num_starts += 1
        time.sleep(0.5)
