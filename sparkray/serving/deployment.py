"""Ray's LLM server with a watched engine inside, so that one engine serves OpenAI's routes and ours."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from prometheus_client import REGISTRY, generate_latest
from ray import serve
from ray.llm._internal.serve.core.configs.openai_api_models import to_model_metadata
from ray.llm._internal.serve.core.server.builder import build_llm_deployment
from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
from ray.serve.deployment import Application
from ray.serve.llm import LLMConfig, LLMServer
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.executor.abstract import Executor
from vllm.v1.metrics.loggers import PrometheusStatLogger
from vllm.v1.metrics.ray_wrappers import RayPrometheusStatLogger

from sparkray.cluster.metrics_bridge import observe_trace, set_active_traces
from sparkray.cluster.replica_address import listen_on_node_address
from sparkray.config.metis import MetisConfig
from sparkray.config.serve import ServeConfig
from sparkray.errors import NotFoundError, SparkrayError
from sparkray.metis.store import TraceEntry
from sparkray.metis.vllm_engine import WatchedEngine, prepare
from sparkray.models import resolve_model
from sparkray.search.events import event_to_dict
from sparkray.search.vllm_iterative import IterativeSearch
from sparkray.search.vllm_live import LiveSearch
from sparkray.search.vllm_parallel import iterative_search, live_search
from sparkray.serving.app import METIS_KEY, MODEL_KEY, llm_config_values
from sparkray.serving.ingress import build_ingress
from sparkray.serving.search_api import SearchBody, error_event
from sparkray.serving.trace_json import trace_json, update_of


class WatchedVLLMEngine(VLLMEngine):
    """Ray's vLLM engine whose client keeps a trace of every watched request."""

    watched: WatchedEngine
    _oai_serving_tokenization: Any

    async def start(self) -> None:
        """Start the engine and OpenAI's layer over it; `/tokenize` with them."""
        await super().start()
        # vLLM dropped the prefix of the name under which Ray looks for it, and Ray's route then answers 400.
        if self._oai_serving_tokenization is None:
            self._oai_serving_tokenization = getattr(self._app_state, "serving_tokenization", None)

    def _start_async_llm_engine(self, vllm_engine_args: Any, vllm_engine_config: Any, placement_group: Any) -> Any:
        metis = MetisConfig.model_validate(self.llm_config.experimental_configs[METIS_KEY])
        vllm_engine_config.parallel_config.placement_group = placement_group
        arena = prepare(vllm_engine_config, metis)
        engine = AsyncLLM(
            vllm_config=vllm_engine_config,
            executor_class=Executor.get_class(vllm_engine_config),
            log_requests=vllm_engine_args.enable_log_requests,
            log_stats=True,
            # Ray's logger feeds the cluster's metrics every ten seconds, the other one our /metrics at once.
            stat_loggers=[RayPrometheusStatLogger, PrometheusStatLogger],
        )
        self.watched = WatchedEngine(engine, arena, metis, on_finish=self._count)
        return self.watched

    def _count(self, entry: TraceEntry) -> None:
        observe_trace(entry, model=self.llm_config.model_id)
        set_active_traces(self.watched.num_active_traces)


class MetisLLMServer(LLMServer):
    """One replica: an engine, its traces, its metrics."""

    _default_engine_cls = WatchedVLLMEngine

    async def __init__(self, llm_config: LLMConfig, **kwargs: Any) -> None:  # type: ignore[misc]
        # vLLM lets this older variable override the size that the settings give.
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
        listen_on_node_address()
        await super().__init__(llm_config, **kwargs)

    @property
    def _watched(self) -> WatchedEngine:
        engine = self.engine
        assert isinstance(engine, WatchedVLLMEngine)
        return engine.watched

    async def metis_trace(self, request_id: str) -> tuple[str, dict[str, Any] | None]:
        """This replica's id and its trace of the request, or None where another replica has it."""
        entry = self._find(request_id)
        return _replica_id(), None if entry is None else trace_json(entry, self._decode())

    async def metis_trace_update(
        self, request_id: str, start: int, wait_seconds: float
    ) -> tuple[str, dict[str, Any] | None]:
        """Tokens of the request from `start` on, waiting up to `wait_seconds` for the first of them."""
        entry = self._find(request_id)
        if entry is None:
            return _replica_id(), None
        await entry.wait(start, wait_seconds)
        return _replica_id(), update_of(entry, start, self._decode())

    async def metis_search(self, model_id: str, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """The events of one search on this replica's engine; an error is an event, the last one."""
        asked = SearchBody.model_validate(body)
        try:
            async with aclosing(self._search(model_id, asked).events()) as events:
                async for event in events:
                    yield event_to_dict(event)
        except SparkrayError as error:
            yield error_event(error)

    def _search(self, model_id: str, asked: SearchBody) -> LiveSearch | IterativeSearch:
        plain = str(self._llm_config.experimental_configs[MODEL_KEY])
        if asked.rounds is not None:
            return iterative_search(self._watched, asked.config, asked.rounds, asked.question, plain)
        return live_search(self._watched, asked.config, asked.question, plain)

    async def metis_health(self) -> tuple[str, str]:
        """`ok`, or why the engine cannot answer."""
        try:
            await self.check_health()
        except Exception as failure:  # the engine may fail in any way, and the route reports how
            return _replica_id(), f"{type(failure).__name__}: {failure}"
        return _replica_id(), "ok"

    async def metis_metrics(self) -> tuple[str, str]:
        """Prometheus exposition of this replica, as of now."""
        return _replica_id(), generate_latest(REGISTRY).decode()

    def _find(self, request_id: str) -> TraceEntry | None:
        try:
            return self._watched.traces.get(request_id)
        except NotFoundError:
            return None

    def _decode(self) -> Callable[[list[int]], str]:
        tokenizer = self._watched.get_tokenizer()
        return lambda token_ids: str(tokenizer.decode(token_ids))


def _replica_id() -> str:
    return str(serve.get_replica_context().replica_id.unique_id)


def build_app(config: ServeConfig, *, on_cpu: bool) -> Application:
    """The Serve application: an ingress over the replicas of one model."""
    source = resolve_model(config.model)
    model_id = config.model_id or source.model_id
    values = llm_config_values(config, model_path=source.path_or_id, model_id=model_id, on_cpu=on_cpu)
    # A replica may serve under a name of its own; a search profile knows the model by its plain one.
    values["experimental_configs"][MODEL_KEY] = source.model_id
    llm_config = LLMConfig(**values)
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
