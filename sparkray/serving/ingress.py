"""The HTTP front: OpenAI's routes from `ray.serve.llm`, and ours for traces, health and metrics."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from ray.llm._internal.serve.core.configs.openai_api_models import TokenizeChatRequest, TokenizeCompletionRequest
from ray.llm._internal.serve.core.ingress.ingress import DEFAULT_ENDPOINTS, init
from ray.llm._internal.serve.utils.broadcast import broadcast
from ray.serve.llm.ingress import OpenAiIngress, make_fastapi_ingress

from sparkray.cluster.replica_address import listen_on_node_address
from sparkray.errors import NotFoundError, UnavailableError
from sparkray.serving.body_guard import BodyGuard
from sparkray.serving.error_bodies import install_error_bodies
from sparkray.serving.exposition import merge_expositions
from sparkray.serving.page import page_folder
from sparkray.serving.search_api import SearchBody, event_stream
from sparkray.serving.swagger import swagger_folder

REPLICA_TIMEOUT_SECONDS = 10.0
LONG_POLL_SECONDS = 1.0
# A client may open the stream of a request a moment before it sends the request itself.
APPEAR_TIMEOUT_SECONDS = 10.0

ENDPOINTS = {
    **DEFAULT_ENDPOINTS,
    "search": lambda app: app.post("/v1/search", tags=["search"]),
    "trace": lambda app: app.get("/v1/metis/traces/{request_id}", tags=["metis"]),
    "trace_stream": lambda app: app.get("/v1/metis/traces/{request_id}/stream", tags=["metis"]),
    "health": lambda app: app.get("/health", tags=["operations"]),
    "metrics": lambda app: app.get("/metrics", tags=["operations"], response_class=PlainTextResponse),
}


class SparkrayIngress(OpenAiIngress):
    """OpenAI's routes and ours over the same replicas."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        listen_on_node_address()
        super().__init__(*args, **kwargs)

    async def search(self, body: SearchBody, request: Request) -> Response:
        """Many paths of thought for one question, pruned while they are written, and a vote over their answers.

        JSON is the report; with `stream` every wave, prune, vote and piece of text is an event. A client that goes
        away aborts all paths: Serve cancels this call, and with it the replica's.
        """
        model_id = await self._get_model_id(body.model)
        handle = self._get_configured_serve_handle(model_id)
        events = aiter(handle.metis_search.remote(model_id, body.model_dump(mode="json")))
        event = await anext(events)
        if event["kind"] == "error":
            return JSONResponse({"error": event["error"]}, status_code=event["status"])
        if body.stream:
            return StreamingResponse(event_stream(event, events), media_type="text/event-stream")
        last = event
        async for event in events:
            last = event
        if last["kind"] == "error":
            return JSONResponse({"error": last["error"]}, status_code=last["status"])
        return JSONResponse(last["report"])

    async def tokenize(self, body: TokenizeChatRequest | TokenizeCompletionRequest, request: Request) -> Response:
        """Ids and number of the tokens of a text, or of messages under the model's chat template.

        Ray's own route refuses messages, though its replicas take them.
        """
        answer: Response = await super().tokenize(body, request)
        return answer

    async def trace(self, request_id: str) -> Response:
        """The trace of one request: whole when it has ended, what there is so far while it runs."""
        found = await self._first_answer("metis_trace", request_id)
        if found is None:
            raise _unknown_trace(request_id)
        return JSONResponse(found)

    async def trace_stream(self, request_id: str) -> Response:
        """The tokens of one request as server-sent events while they are written, then `[DONE]`."""
        first = await self._await_tokens(request_id, start=0, deadline=time.monotonic() + APPEAR_TIMEOUT_SECONDS)
        return StreamingResponse(self._events(request_id, first), media_type="text/event-stream")

    async def health(self) -> Response:
        """200 while every model's engine answers, 503 with the reason otherwise."""
        states = await self._ask_all("metis_health")
        replicas = {replica: state for answers in states.values() for replica, state in answers}
        healthy = bool(replicas) and all(state == "ok" for state in replicas.values())
        body = {"status": "ok" if healthy else "unhealthy", "models": sorted(states), "replicas": replicas}
        return JSONResponse(body, status_code=200 if healthy else 503)

    async def metrics(self) -> Response:
        """Prometheus exposition of every replica's engine and watcher, as of now."""
        pages = {
            replica: page for answers in (await self._ask_all("metis_metrics")).values() for replica, page in answers
        }
        return PlainTextResponse(merge_expositions(pages), media_type="text/plain; version=0.0.4")

    async def _events(self, request_id: str, update: dict[str, Any]) -> AsyncIterator[str]:
        while True:
            yield f"data: {json.dumps(update, allow_nan=False)}\n\n"
            if update["finished"]:
                yield "data: [DONE]\n\n"
                return
            deadline = time.monotonic() + APPEAR_TIMEOUT_SECONDS
            update = await self._await_tokens(request_id, start=update["next"], deadline=deadline)

    async def _await_tokens(self, request_id: str, *, start: int, deadline: float) -> dict[str, Any]:
        while time.monotonic() < deadline:
            update = await self._first_answer("metis_trace_update", request_id, start, LONG_POLL_SECONDS)
            if update is not None and (update["tokens"] or update["finished"]):
                return update
            if update is not None:
                # It exists and writes nothing yet, as in a long prefill: the client's patience decides.
                deadline = time.monotonic() + APPEAR_TIMEOUT_SECONDS
            await asyncio.sleep(0.05)
        raise _unknown_trace(request_id)

    async def _first_answer(self, method: str, *args: Any) -> dict[str, Any] | None:
        """The answer of the one replica that knows the request."""
        for answers in (await self._ask_all(method, *args)).values():
            for _, answer in answers:
                if answer is not None:
                    return dict(answer)
        return None

    async def _ask_all(self, method: str, *args: Any) -> dict[str, list[tuple[str, Any]]]:
        """model id -> `(replica id, answer)` of each of its replicas."""
        answers = {}
        for model_id, handle in self._default_serve_handles.items():
            # `broadcast` blocks, so it has a thread of its own, and a dead replica has a time limit.
            call = asyncio.to_thread(broadcast, handle, method, args)
            try:
                answers[model_id] = await asyncio.wait_for(call, REPLICA_TIMEOUT_SECONDS)
            except TimeoutError as late:
                raise UnavailableError(
                    f"the replicas of {model_id} did not answer within {REPLICA_TIMEOUT_SECONDS:.0f} s."
                ) from late
        return answers


def _unknown_trace(request_id: str) -> NotFoundError:
    return NotFoundError(
        f"no trace of request {request_id!r} is known.",
        hint="Take the `id` of a completion; traces are kept for a while only, and only of watched requests.",
        param="request_id",
    )


def build_ingress(*, max_body_bytes: int, max_json_depth: int) -> type:
    """The ingress class with its routes, error bodies and body checks."""
    app: FastAPI = init()
    app.title = "sparkray"
    install_error_bodies(app)
    app.add_middleware(BodyGuard, max_body_bytes=max_body_bytes, max_depth=max_json_depth)
    _serve_docs_offline(app)
    _serve_page(app)
    return make_fastapi_ingress(SparkrayIngress, endpoint_map=ENDPOINTS, app=app)  # type: ignore[no-any-return]


def _serve_page(app: FastAPI) -> None:
    """The page of the search at `/`, with its files below `/page`."""
    app.mount("/page", StaticFiles(directory=page_folder()), name="page")

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(page_folder() / "index.html")


def _serve_docs_offline(app: FastAPI) -> None:
    """FastAPI's /docs loads its scripts from a CDN; ours come from files that vLLM ships."""
    folder = swagger_folder()
    if folder is None:
        return
    app.router.routes = [route for route in app.router.routes if getattr(route, "path", "") != "/docs"]
    app.mount("/docs/static", StaticFiles(directory=folder), name="docs-static")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return get_swagger_ui_html(
            openapi_url="/openapi.json",
            title="sparkray",
            swagger_js_url="/docs/static/swagger-ui-bundle.js",
            swagger_css_url="/docs/static/swagger-ui.css",
        )
