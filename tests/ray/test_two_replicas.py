"""A trace is found on whichever of two replicas keeps it, whole and as a stream.

The replicas are Serve's, the calls between them and the front are Ray's, and the methods are the server's own. Only the
engine is left out: a replica is told which tokens a request was given.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

from ray import cloudpickle, serve
from ray.llm._internal.serve.utils.broadcast import broadcast

from sparkray.errors import NotFoundError
from sparkray.metis.fields import NUM_FIELDS
from sparkray.metis.options import WatchOptions
from sparkray.metis.store import TraceEntry, TraceStore
from sparkray.serving.deployment import MetisLLMServer
from sparkray.serving.ingress import SparkrayIngress

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

MODEL = "tiny"


class Told:
    """Where a request's tokens are read: as many as it was told of, entropy 0, 1, 2, ..."""

    def __init__(self) -> None:
        self.num_tokens = 0

    def progress(self) -> Any:
        return SimpleNamespace(committed=self.num_tokens, written=self.num_tokens, restarts=0)

    def read(self, start: int, stop: int) -> Any:
        tokens_TF = np.zeros((self.num_tokens, NUM_FIELDS), dtype=np.float32)
        tokens_TF[:, 0] = np.arange(self.num_tokens)
        return tokens_TF[start:stop]


class ReplicaWithoutEngine(MetisLLMServer):
    """The server's own methods over traces that a test fills."""

    async def __init__(self) -> None:  # type: ignore[misc]
        tokenizer = SimpleNamespace(decode=lambda token_ids: "".join(f"<{token_id}>" for token_id in token_ids))
        self._stand_in = SimpleNamespace(traces=TraceStore(8, 60.0), get_tokenizer=lambda: tokenizer)
        self._told: dict[str, Told] = {}

    @property
    def _watched(self) -> Any:
        return self._stand_in

    async def check_health(self) -> None:
        """Nothing can be ill."""

    async def begin(self, request_id: str) -> str:
        """Start a request here; which replica that is, Serve's router decides."""
        entry = TraceEntry(request_id, WatchOptions(), max_tokens=8)
        self._told[request_id] = Told()
        entry.attach(self._told[request_id])
        self._watched.traces.open(entry)
        return (await self.metis_trace(request_id))[0]

    async def write(self, request_id: str, token_ids: list[int], *, last: bool) -> bool:
        """Give tokens to a request; False where it is not here."""
        if request_id not in self._told:
            return False
        entry = self._watched.traces.get(request_id)
        self._told[request_id].num_tokens += len(token_ids)
        entry.delivered(token_ids)
        if last:
            entry.finish("stop")
            self._watched.traces.close(entry)
        return True


@pytest.fixture(scope="module")
def replicas(ray_connection: None) -> Iterator[Any]:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    serve.start(proxy_location="Disabled")
    try:
        two = serve.deployment(ReplicaWithoutEngine, num_replicas=2, ray_actor_options={"num_cpus": 1})
        yield serve.run(two.bind(), name="two-replicas", route_prefix=None)
    finally:
        serve.shutdown()
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.fixture
def front(replicas: Any) -> SparkrayIngress:
    front = object.__new__(SparkrayIngress)
    front._default_serve_handles = {MODEL: replicas}
    return front


def begin_on_both(replicas: Any, label: str) -> dict[str, str]:
    """Requests until each replica has one: replica id -> request id."""
    found: dict[str, str] = {}
    for number in range(200):
        request_id = f"chatcmpl-{label}-{number}"
        found.setdefault(replicas.begin.remote(request_id).result(timeout_s=30), request_id)
        if len(found) == 2:
            return found
    raise AssertionError(f"all requests went to one replica: {found}")


def write(replicas: Any, request_id: str, token_ids: list[int], *, last: bool) -> None:
    kept = broadcast(replicas, "write", (request_id, token_ids), {"last": last})
    assert sorted(kept) == [False, True]


async def follow(replicas: Any, front: SparkrayIngress, request_id: str) -> list[str]:
    """The stream's lines; the request's last token is written when the first line is here."""
    lines: list[str] = []
    async for line in (await front.trace_stream(request_id)).body_iterator:
        lines.append(str(line).removeprefix("data: ").strip())
        if len(lines) == 1:
            await asyncio.to_thread(write, replicas, request_id, [3], last=True)
    return lines


def test_each_trace_is_found_wherever_it_is(replicas: Any, front: SparkrayIngress) -> None:
    for place, request_id in enumerate(begin_on_both(replicas, "whole").values()):
        write(replicas, request_id, [10 + place, 20 + place], last=True)
        reply = json.loads(asyncio.run(front.trace(request_id)).body)
        assert [event["token_id"] for event in reply["events"]] == [10 + place, 20 + place]
        assert [event["token_entropy"] for event in reply["events"]] == [0.0, 1.0]
        assert (reply["finished"], reply["finish_reason"]) == (True, "stop")


def test_a_stream_follows_the_replica_that_writes(replicas: Any, front: SparkrayIngress) -> None:
    for request_id in begin_on_both(replicas, "stream").values():
        write(replicas, request_id, [1, 2], last=False)
        lines = asyncio.run(follow(replicas, front, request_id))
        assert lines.pop() == "[DONE]"
        updates = [json.loads(line) for line in lines]
        assert [token["token_id"] for update in updates for token in update["tokens"]] == [1, 2, 3]
        assert updates[-1]["finished"]


def test_what_no_replica_knows_is_not_found(front: SparkrayIngress) -> None:
    with pytest.raises(NotFoundError, match="nobody"):
        asyncio.run(front.trace("chatcmpl-nobody"))
