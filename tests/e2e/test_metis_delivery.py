"""A client that takes the last output and does not come back: the trace is whole all the same.

A stand-in for the engine is enough, since what is tested stands around it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from sparkray.config.metis import MetisConfig
from sparkray.metis.arena import TraceArena
from sparkray.metis.vllm_engine import WatchedEngine


class OneAnswer:
    """An engine whose only answer has three tokens, in two outputs."""

    def __init__(self) -> None:
        self.vllm_config = SimpleNamespace(
            scheduler_config=SimpleNamespace(max_num_seqs=4, enable_chunked_prefill=False)
        )

    async def generate(self, prompt: str, params: SamplingParams, request_id: str) -> AsyncIterator[Any]:
        for token_ids, reason in (([11, 12], None), ([13], "length")):
            completion = SimpleNamespace(token_ids=token_ids, finish_reason=reason)
            yield SimpleNamespace(finished=reason is not None, prompt_token_ids=[1, 2], outputs=[completion])


@pytest.fixture
def arena() -> Iterator[TraceArena]:
    arena = TraceArena.create(4, 8)
    yield arena
    arena.close()


async def test_the_reason_is_known_with_the_last_output(arena: TraceArena) -> None:
    finished = []
    engine: Any = WatchedEngine(OneAnswer(), arena, MetisConfig(), on_finish=finished.append)  # type: ignore[arg-type]
    params = SamplingParams(output_kind=RequestOutputKind.DELTA)
    stream = engine.generate("a prompt", params, "r")
    reasons = []
    async for output in stream:
        reasons.append(engine.traces.get("r").finish_reason)
        if output.finished:
            break
    entry = engine.traces.get("r")
    assert reasons == [None, "length"]
    assert (entry.token_ids, entry.num_prompt_tokens) == ([11, 12, 13], 2)
    await stream.aclose()
    assert entry.finish_reason == "length", "closing what is finished already is no abort"
    assert [trace.request_id for trace in finished] == ["r"]
    assert arena.num_active == 0
