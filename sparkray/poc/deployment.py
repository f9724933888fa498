"""Proof of compute on Ray Serve: one replica that owns the ledger, and groups as actors on the cluster."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from fastapi import FastAPI
from ray import serve
from ray.serve.deployment import Application

from sparkray.config.cluster import LISTEN_ON_NODE_ADDRESS
from sparkray.config.poc import PocServiceConfig
from sparkray.poc.actors import start_fleet
from sparkray.poc.fleet.ledger import Ledger
from sparkray.poc.service.manager import PocManager
from sparkray.poc.service.routes import Gate, create_app
from sparkray.poc.service.sender import Sender

# Ray gives its head one of these.
_HEAD = "node:__internal_head__"


class PocService:
    """Everything of one replica: ledger, manager, sender and the application that answers."""

    def __init__(self, config: PocServiceConfig) -> None:
        folder = Path(config.state_dir).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        self._ledger = Ledger(folder / "ledger.sqlite")
        self._sender = Sender(
            self._ledger,
            timeout_seconds=config.callback_timeout_seconds,
            interval_seconds=config.callback_interval_seconds,
            max_backoff_seconds=config.max_backoff_seconds,
        ).start()
        self._manager = PocManager(config, self._ledger, partial(start_fleet, config=config))
        self.app = create_app(self._manager, Gate.from_environment(os.environ))

    def close(self) -> None:
        """Record what the groups have, end them, and end the sender after the attempt in hand."""
        self._manager.close()
        self._sender.stop()
        self._ledger.close()


@serve.ingress()
class PocDeployment:
    """The replica."""

    def __init__(self, config: PocServiceConfig) -> None:
        self._service = PocService(config)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._service.app

    def __del__(self) -> None:
        self._service.close()


def build_app(config: PocServiceConfig) -> Application:
    """The Serve application."""
    deployment = serve.deployment(
        PocDeployment,
        # One replica, and never two: the ledger is a file, and the nonces of a node have one owner.
        num_replicas=1,
        max_ongoing_requests=64,
        max_queued_requests=256,
        health_check_period_s=10,
        health_check_timeout_s=60,
        graceful_shutdown_timeout_s=config.stop_timeout_seconds + 20,
        # On the head, where the cluster's own fate is: the ledger lies there, and a worker node may go and come.
        ray_actor_options={
            "num_cpus": 0.1,
            "resources": {_HEAD: 0.001},
            "runtime_env": {"worker_process_setup_hook": LISTEN_ON_NODE_ADDRESS},
        },
    )
    return deployment.bind(config)
