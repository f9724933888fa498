"""Ray's LLM server with a watched engine inside, so that one engine serves OpenAI's routes and ours."""

from __future__ import annotations

import os
from typing import Any

from ray import serve
from ray.llm._internal.serve.core.configs.openai_api_models import to_model_metadata
from ray.llm._internal.serve.core.server.builder import build_llm_deployment
from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
from ray.serve.deployment import Application
from ray.serve.llm import LLMConfig, LLMServer

from sparkray.cluster.metrics_bridge import observe_trace, set_active_traces
from sparkray.config.metis import MetisConfig
from sparkray.config.serve import ServeConfig
from sparkray.metis.vllm_engine import WatchedEngine
from sparkray.models import resolve_model
from sparkray.serving.app import METIS_KEY, llm_config_values
from sparkray.serving.ingress import build_ingress


class WatchedVLLMEngine(VLLMEngine):
    """Ray's vLLM engine whose client records a trace of every watched request."""

    def __init__(self, llm_config: LLMConfig) -> None:
        metis = MetisConfig.model_validate(llm_config.experimental_configs[METIS_KEY])
        self.watcher = WatchedEngine(
            metis,
            max_num_seqs=llm_config.engine_kwargs["max_num_seqs"],
            on_finish=observe_trace,
            on_active=set_active_traces,
        )
        # Every replica has a trace memory of its own, so its path is known here and not in the settings.
        llm_config.engine_kwargs.setdefault("additional_config", {}).update(self.watcher.additional_config())
        # vLLM lets this older variable override the size that the settings give.
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
        super().__init__(llm_config)

    def _start_async_llm_engine(self, vllm_engine_args: Any, vllm_engine_config: Any, placement_group: Any) -> Any:
        client = super()._start_async_llm_engine(vllm_engine_args, vllm_engine_config, placement_group)
        self.watcher.attach(client)
        return self.watcher


class MetisLLMServer(LLMServer):
    """One replica: an engine, its traces, its metrics."""

    _default_engine_cls = WatchedVLLMEngine

    @property
    def _watcher(self) -> WatchedEngine:
        engine = self.engine
        assert isinstance(engine, WatchedVLLMEngine)
        return engine.watcher

    async def metis_trace(self, request_id: str) -> tuple[str, dict[str, Any] | None]:
        """This replica's id and its trace of the request, or None where another replica has it."""
        return _replica_id(), self._watcher.trace(request_id)

    async def metis_trace_update(
        self, request_id: str, start: int, wait_seconds: float
    ) -> tuple[str, dict[str, Any] | None]:
        """Tokens of the request from `start` on, waiting up to `wait_seconds` for the first of them."""
        return _replica_id(), await self._watcher.trace_update(request_id, start, wait_seconds)

    async def metis_health(self) -> tuple[str, str]:
        """`ok`, or why the engine cannot answer."""
        try:
            await self.check_health()
        except Exception as failure:  # the engine may fail in any way, and the route reports how
            return _replica_id(), f"{type(failure).__name__}: {failure}"
        return _replica_id(), "ok"

    async def metis_metrics(self) -> tuple[str, str]:
        """Prometheus exposition of this replica."""
        return _replica_id(), self._watcher.exposition()


def _replica_id() -> str:
    return str(serve.get_replica_context().replica_id.unique_id)


def build_app(config: ServeConfig, *, on_cpu: bool) -> Application:
    """The Serve application: an ingress over the replicas of one model."""
    source = resolve_model(config.model)
    model_id = config.model_id or source.model_id
    llm_config = LLMConfig(**llm_config_values(config, model_path=source.path_or_id, model_id=model_id, on_cpu=on_cpu))
    server = build_llm_deployment(llm_config, name_prefix="LLM:", deployment_cls=MetisLLMServer)
    ingress = build_ingress(max_body_bytes=config.max_body_bytes, max_json_depth=config.max_json_depth)
    options = {
        "max_ongoing_requests": config.max_ongoing_requests * 4,
        "num_replicas": 1,
        "ray_actor_options": {"num_cpus": 0},
    }
    return serve.deployment(ingress, name="Ingress", **options).bind(
        llm_deployments={model_id: server},
        model_cards={model_id: to_model_metadata(model_id, llm_config)},
    )
