"""`MetisParallelSearch` and `MetisIterativeSearch`: a question in, a report out.

with MetisParallelSearch(SearchConfig(num_paths=16)) as search:
    report = search.search("What is 12 * 7?")
report.best_response, report.cognitive_report
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import ExitStack, aclosing
from types import TracebackType
from typing import Self

from sparkray.config.search import IterativeConfig, SearchConfig
from sparkray.config.serve import EngineConfig
from sparkray.errors import InternalError, UsageError
from sparkray.metis.vllm_engine import WatchedEngine
from sparkray.models import resolve_model
from sparkray.search.create import create_policy, open_profile
from sparkray.search.events import DoneEvent, SearchEvent
from sparkray.search.prompting import prompt_ids, settle
from sparkray.search.report import SearchReport
from sparkray.search.vllm_iterative import IterativeSearch
from sparkray.search.vllm_live import LiveSearch
from sparkray.search.vllm_session import own_engine, quick_dtype


def live_search(engine: WatchedEngine, config: SearchConfig, question: str, model_id: str) -> LiveSearch:
    """A search that is ready to run, with its settings, question and profile checked.

    Raises:
        InputError: an empty question, or a profile made for something else.
        NotFoundError: there is no such profile or task.
    """
    config = settle(config)
    policy = create_policy(config, open_profile(config, model_id))
    ids = prompt_ids(config, question, engine.get_tokenizer())
    return LiveSearch(engine, policy, config, ids, question)


def iterative_search(
    engine: WatchedEngine, config: SearchConfig, rounds: IterativeConfig, question: str, model_id: str
) -> IterativeSearch:
    """As `live_search`, in rounds."""
    config = settle(config)
    policy = create_policy(config, open_profile(config, model_id))
    ids = prompt_ids(config, question, engine.get_tokenizer())
    return IterativeSearch(engine, policy, config, rounds, ids, question)


class MetisParallelSearch:
    """Many paths for one question, pruned while they are written, and a vote.

    Args:
        config: how paths are drawn and which policy spends them.
        model: `embedded`, a local directory or a hub id; loaded at the first search.
        engine: a watched engine to use instead; then only `events` and `search_async` may be called, on its event loop.
        limits: of an engine of one's own.
    """

    def __init__(
        self,
        config: SearchConfig | None = None,
        *,
        model: str = "embedded",
        engine: WatchedEngine | None = None,
        limits: EngineConfig | None = None,
    ) -> None:
        self._config = config or SearchConfig()
        self._source = resolve_model(model)
        self._given = engine
        self._limits = limits or EngineConfig(dtype=quick_dtype(), max_num_seqs=max(32, self._config.num_paths))
        self._stack = ExitStack()
        self._own: tuple[WatchedEngine, asyncio.Runner] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the engine, if it is one's own."""
        self._own = None
        self._stack.close()

    def search(self, prompt: str) -> SearchReport:
        """Search for the answer to one question. The first call starts the engine.

        Raises:
            InputError: an empty question, or one that leaves no room for an answer.
            WaitTimeoutError: the settings' `timeout_seconds` passed.
            UsageError: an engine was given, which belongs to an event loop.
        """
        if self._given is not None:
            raise UsageError(
                "search() was called with an engine that belongs to an event loop.", hint="Await search_async()."
            )
        engine, runner = self._started()
        return runner.run(self._report(engine, prompt))

    async def search_async(self, prompt: str) -> SearchReport:
        """As `search`, on the given engine."""
        return await self._report(self._engine(), prompt)

    def events(self, prompt: str) -> AsyncGenerator[SearchEvent, None]:
        """What happens, as it happens, on the given engine; leaving early aborts all paths."""
        return self._events(self._engine(), prompt)

    def follow(self, prompt: str, on_event: Callable[[SearchEvent], None]) -> None:
        """Search on one's own engine and tell what happens, as it happens."""
        engine, runner = self._started()

        async def run() -> None:
            async with aclosing(self._events(engine, prompt)) as events:
                async for event in events:
                    on_event(event)

        runner.run(run())

    def _events(self, engine: WatchedEngine, prompt: str) -> AsyncGenerator[SearchEvent, None]:
        return live_search(engine, self._config, prompt, self._source.model_id).events()

    async def _report(self, engine: WatchedEngine, prompt: str) -> SearchReport:
        async with aclosing(self._events(engine, prompt)) as events:
            async for event in events:
                if isinstance(event, DoneEvent):
                    return event.report
        raise InternalError("a search ended without a report.")

    def _engine(self) -> WatchedEngine:
        if self._given is None:
            raise UsageError("no engine was given; call search(), which starts one of its own.")
        return self._given

    def _started(self) -> tuple[WatchedEngine, asyncio.Runner]:
        if self._own is None:
            engine = self._stack.enter_context(own_engine(self._source.name, self._limits))
            # One event loop for all searches: the engine belongs to the one that it was first used in.
            self._own = engine, self._stack.enter_context(asyncio.Runner())
        return self._own


class MetisIterativeSearch(MetisParallelSearch):
    """Rounds: the calmest paths of one round are forked where the model was sure, and all rounds vote together.

    Args:
        config: of the paths, as in `MetisParallelSearch`; `num_paths` is the size of the first round.
        rounds: how many, how they shrink and cool.
        model, engine, limits: as in `MetisParallelSearch`.
    """

    def __init__(
        self,
        config: SearchConfig | None = None,
        *,
        rounds: IterativeConfig | None = None,
        model: str = "embedded",
        engine: WatchedEngine | None = None,
        limits: EngineConfig | None = None,
    ) -> None:
        super().__init__(config, model=model, engine=engine, limits=limits)
        self._rounds = rounds or IterativeConfig()

    def _events(self, engine: WatchedEngine, prompt: str) -> AsyncGenerator[SearchEvent, None]:
        return iterative_search(engine, self._config, self._rounds, prompt, self._source.model_id).events()
