"""The coordinator on Ray Serve: one replica holds the prefill engine and talks to decode peers outside Ray.

Ray carries requests and replies; rows go from vLLM's worker to the peer by a socket of their own.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.deployment import Application

from sparkray.config.cluster import LISTEN_ON_NODE_ADDRESS
from sparkray.config.handoff import HandoffConfig
from sparkray.handoff.client import Peer
from sparkray.handoff.coordinator import Coordinator
from sparkray.handoff.http_api import create_http_app
from sparkray.handoff.plan import ethernet, shape_of_identity
from sparkray.handoff.text import TextCodec


@serve.deployment
@serve.ingress()
class HandoffDeployment:
    """Routes of `http_api` over this replica's engine."""

    def __init__(self, config: HandoffConfig) -> None:
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(config.kv_cache_gib)
        from sparkray.handoff.vllm_prefill import PrefillEngine

        self._prefiller = PrefillEngine(config.prefill)
        secret = Path(config.secret_file).expanduser().read_bytes().strip()
        tls, link = config.prefill.tls, config.prefill.link
        peers = [Peer(address, secret, tls, config.limits, link) for address in config.peers]
        coordinator = Coordinator(
            self._prefiller,
            peers,
            shape=shape_of_identity(self._prefiller.identity, config.prefill.dtype),
            config=config.route,
            prefill=config.prefill_rates,
            decode=config.decode_rates,
            link=ethernet(config.link_gbit),
            context_tokens=config.decode_context_tokens,
            max_requests=config.max_requests,
            force=config.force_route,
        )
        self._http = create_http_app(coordinator, TextCodec.load(config.prefill.model), config.model_id)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._http

    def __del__(self) -> None:
        self._prefiller.close()


def build_handoff_app(config: HandoffConfig) -> Application:
    """The application: one replica, one engine."""
    placed: Any = HandoffDeployment.options(  # type: ignore[attr-defined]
        num_replicas=1,
        max_ongoing_requests=config.max_requests,
        ray_actor_options={
            "num_cpus": config.num_cpus,
            "resources": config.resources,
            "runtime_env": {"worker_process_setup_hook": LISTEN_ON_NODE_ADDRESS},
        },
    )
    return placed.bind(config)
