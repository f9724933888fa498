"""An iterative search: every round forks the calmest paths so far, and the paths of all rounds vote together.

A fork resubmits prompt and prefix as token ids, so the engine's prefix cache pays for what is kept. Only what a fork
writes itself counts as its tokens.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace

from sparkray.config.search import IterativeConfig, SearchConfig
from sparkray.metis.vllm_engine import WatchedEngine
from sparkray.search.events import DoneEvent, SearchEvent, VoteEvent, WaveEvent, standing
from sparkray.search.forks import Fork, fork_length, survivors
from sparkray.search.paths import Lane
from sparkray.search.policies import Policy
from sparkray.search.report import build_report
from sparkray.search.vllm_live import LiveSearch
from sparkray.search.votes import vote


class IterativeSearch:
    """One question over several rounds on one engine; make a new one for each.

    Args:
        engine, policy, config, prompt_ids, question: as in `LiveSearch`; the policy spends each round.
        rounds: how many, how they shrink and cool.
    """

    def __init__(
        self,
        engine: WatchedEngine,
        policy: Policy,
        config: SearchConfig,
        rounds: IterativeConfig,
        prompt_ids: Sequence[int],
        question: str,
    ) -> None:
        self.lanes: list[Lane] = []
        self.forks: dict[int, Fork] = {}
        self._engine = engine
        self._policy = policy
        self._config = config
        self._rounds = rounds
        self._prompt_ids = tuple(prompt_ids)
        self._question = question
        self._token_ids: dict[int, tuple[int, ...]] = {}

    async def events(self) -> AsyncGenerator[SearchEvent, None]:
        """Run all rounds. Paths are numbered through; the last event is a `DoneEvent`; leaving early aborts all paths.

        Raises:
            WaitTimeoutError: the settings' `timeout_seconds` passed in one round.
        """
        begin = time.monotonic()
        closed_by: str | None = None
        num_waves = 0
        for number in range(self._rounds.rounds):
            config, forks = self._plan(number)
            if number and not forks:
                break
            search = LiveSearch(self._engine, self._policy, config, self._prompt_ids, self._question, forks)
            first = len(self.lanes)
            self.forks.update({first + index: fork for index, fork in forks.items()})
            async with aclosing(search.events()) as events:
                async for event in events:
                    if isinstance(event, DoneEvent):
                        closed_by = event.report.closed_by
                        self._keep(search, first, num_waves)
                    else:
                        yield _renumbered(event, first, num_waves, search.lanes, self.lanes)
            num_waves = 1 + max((lane.wave for lane in self.lanes), default=-1)
        yield DoneEvent(
            build_report(
                self._question,
                f"iterative {self._policy.name}",
                vote(self.lanes),
                self.lanes,
                max_paths=sum(self._plan_size(number) for number in range(self._rounds.rounds)),
                closed_by=closed_by,
                seconds=time.monotonic() - begin,
            )
        )

    def _plan_size(self, number: int) -> int:
        if number == 0:
            return self._config.num_paths
        part = round(self._rounds.shrink[number - 1] * self._config.num_paths)
        return max(part, self._rounds.min_paths[number - 1])

    def _plan(self, number: int) -> tuple[SearchConfig, dict[int, Fork]]:
        """The settings of a round, and what each of its paths continues."""
        size = self._plan_size(number)
        if number == 0:
            return self._config, {}
        cooled = max(0.01, self._config.temperature * self._rounds.cooling[number - 1])
        config = self._config.model_copy(update={"num_paths": size, "temperature": cooled, "temperature_spread": 0.0})
        origins = [lane for lane in survivors(self.lanes, self._rounds.survivors) if self._fork(lane) is not None]
        found = [fork for lane in origins if (fork := self._fork(lane)) is not None]
        return config, {index: found[index % len(found)] for index in range(size)} if found else {}

    def _fork(self, lane: Lane) -> Fork | None:
        length = fork_length(lane.column("entropy"))
        if not length:
            return None
        before = self.forks[lane.index].token_ids if lane.index in self.forks else ()
        kept = (*before, *self._token_ids[lane.index][:length])
        return Fork(lane.index, kept, str(self._engine.get_tokenizer().decode(list(kept))))

    def _keep(self, search: LiveSearch, first: int, num_waves: int) -> None:
        for lane in search.lanes:
            self._token_ids[first + lane.index] = search.token_ids.get(lane.index, ())
            self.lanes.append(replace(lane, index=first + lane.index, wave=num_waves + lane.wave))


def _renumbered(
    event: SearchEvent, first: int, num_waves: int, lanes: Sequence[Lane], before: Sequence[Lane]
) -> SearchEvent:
    """The event as it reads among the paths of all rounds."""
    if isinstance(event, DoneEvent):
        return event
    if isinstance(event, WaveEvent):
        return WaveEvent(num_waves + event.wave, tuple(first + index for index in event.paths))
    if isinstance(event, VoteEvent):
        pooled = [*before, *(replace(lane, index=first + lane.index) for lane in lanes)]
        return replace(event, path=first + event.path, votes=standing(vote(pooled)))
    return replace(event, path=first + event.path)
