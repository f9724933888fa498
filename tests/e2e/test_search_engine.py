"""Searches on a real engine that is short of everything: pruning frees, closing aborts, every outcome is said."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("vllm")

from vllm import SamplingParams

from sparkray.config.search import IterativeConfig, SearchConfig
from sparkray.errors import InputError, UsageError, WaitTimeoutError
from sparkray.search import vllm_live
from sparkray.search.events import DoneEvent, PruneEvent, SearchEvent, TokensEvent, VoteEvent, WaveEvent
from sparkray.search.paths import FinishReason, Lane
from sparkray.search.policies import Policy
from sparkray.search.policies.base import CONTINUE, MajorityRun, StepDecision
from sparkray.search.prompting import prompt_ids, settle
from sparkray.search.report import SearchReport
from sparkray.search.vllm_live import LiveSearch
from sparkray.search.vllm_parallel import MetisIterativeSearch, MetisParallelSearch
from sparkray.search.vllm_recorder import path_params

if TYPE_CHECKING:
    from live_engine import LiveEngine

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

MODEL = "embedded"
ESSAY = "Write down all that you know about the sea, in many sentences."


@dataclass(frozen=True)
class PruneAt:
    """Prunes the first `count` paths as soon as they have `num_tokens` tokens."""

    num_tokens: int
    count: int
    name: str = "prune_at"

    def start(self, max_paths: int) -> MajorityRun:
        return _PruneAtRun(self, max_paths)


class _PruneAtRun(MajorityRun):
    def __init__(self, policy: PruneAt, max_paths: int) -> None:
        super().__init__(max_paths)
        self._policy = policy

    def after_step(self, lanes: Sequence[Lane]) -> StepDecision:
        due = [lane.index for lane in lanes[: self._policy.count] if lane.num_tokens >= self._policy.num_tokens]
        return StepDecision(tuple(due)) if due else CONTINUE


def search_of(live: LiveEngine, policy: Policy, question: str, **settings: object) -> LiveSearch:
    config = settle(SearchConfig.model_validate({"policy": "full", **settings}))
    ids = prompt_ids(config, question, live.engine.get_tokenizer())
    return LiveSearch(live.engine, policy, config, ids, question)


def all_events(live: LiveEngine, search: LiveSearch) -> list[SearchEvent]:
    async def gather() -> list[SearchEvent]:
        return [event async for event in search.events()]

    return live.run(gather())


def report_of(events: Sequence[SearchEvent]) -> SearchReport:
    assert isinstance(events[-1], DoneEvent)
    return events[-1].report


def idle(live: LiveEngine) -> None:
    """Wait until the engine has nothing to do, then let it make one more step, so that it says how it stands."""

    async def wait() -> None:
        async with asyncio.timeout(60):
            while live.engine.output_processor.get_num_unfinished_requests() or live.engine.num_active_traces:
                await asyncio.sleep(0.05)
        params = SamplingParams(max_tokens=2, temperature=0.0)
        async for _ in live.engine.generate({"prompt_token_ids": [1, 2, 3]}, params, f"idle-{id(params)}"):
            pass

    live.run(wait())


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths write on to their limit: one that ends by itself, by chance and early, is not there to be pruned."""

    def without_end(*arguments: Any) -> SamplingParams:
        params = path_params(*arguments)
        params.ignore_eos = True
        return params

    monkeypatch.setattr(vllm_live, "path_params", without_end)


@pytest.mark.usefixtures("endless")
def test_a_pruned_path_writes_nothing_more_and_its_blocks_are_free(engine: LiveEngine) -> None:
    idle(engine)
    steps_before = len(engine.steps.step_tokens)
    search = search_of(engine, PruneAt(6, count=4), ESSAY, num_paths=4, max_tokens=200)
    events = all_events(engine, search)
    last = len(engine.steps.step_tokens)
    idle(engine)
    assert [lane.finish_reason for lane in search.lanes] == [FinishReason.PRUNED] * 4
    pruned = {event.path: event.num_tokens for event in events if isinstance(event, PruneEvent)}
    assert set(pruned) == {0, 1, 2, 3}
    for index, request_id in enumerate(search.request_ids):
        lane, entry = search.lanes[index], engine.engine.traces.get(request_id)
        # What the policy saw at the step that pruned is all there is: in the events, the lane, and the engine's trace.
        assert lane.num_tokens == pruned[index] >= 6
        assert lane.num_tokens == len(entry.token_ids) == len(entry.tokens())
        assert entry.finish_reason == "abort"
        order = [event for event in events if isinstance(event, PruneEvent | TokensEvent) and event.path == index]
        assert isinstance(order[-1], PruneEvent)
    # The engine computed the prompts, the tokens that were delivered, and the steps that it made until it heard: two
    # or three where nothing else runs, many where its loop waits for a core, and never most of what was asked for.
    computed = sum(engine.steps.step_tokens[steps_before:last])
    prompts = 4 * len(prompt_ids(SearchConfig(), ESSAY, engine.engine.get_tokenizer()))
    assert computed < prompts + sum(pruned.values()) + 4 * 200 / 2
    # After the step of the request that `idle` sent, nobody holds a block.
    assert engine.steps.kv_cache_usage[-1] == 0.0
    assert engine.engine.num_active_traces == 0


@pytest.mark.usefixtures("endless")
def test_the_others_go_on_when_one_is_pruned(engine: LiveEngine) -> None:
    # Long enough that the engine, on a busy machine, is not done before this loop hears of the fourth token.
    search = search_of(engine, PruneAt(4, count=1), ESSAY, num_paths=3, max_tokens=120)
    report = report_of(all_events(engine, search))
    pruned, *others = report.paths
    assert pruned.finish_reason == "pruned" and pruned.num_tokens < 120
    assert {path.finish_reason for path in others} == {"length"}, "to their limit"
    assert report.num_tokens == sum(path.num_tokens for path in report.paths)


@pytest.mark.usefixtures("endless")
def test_a_pruned_path_may_be_asked_for_its_answer(engine: LiveEngine) -> None:
    search = search_of(
        engine, PruneAt(4, count=2), "What is 3 * 6?", task="products", num_paths=2, stub_tokens=6, stop=("\n\n\n",)
    )
    events = all_events(engine, search)
    forced = [event for event in events if isinstance(event, VoteEvent) and event.forced]
    assert {event.path for event in forced} == {0, 1}
    for lane in search.lanes:
        assert lane.finish_reason is FinishReason.PRUNED
        assert "The answer is" in lane.text
    assert any(lane.is_stub for lane in search.lanes)


def test_a_search_answers_with_a_report(engine: LiveEngine) -> None:
    search = MetisParallelSearch(
        SearchConfig(policy="full", task="products", num_paths=6, max_tokens=24), model=MODEL, engine=engine.engine
    )
    report = engine.run(search.search_async("What is 3 * 6?"))
    assert report.answer == "18"
    assert "18" in report.best_response
    told = report.cognitive_report
    assert (told["num_paths"], told["num_pruned"], told["num_aborted"]) == (6, 0, 0)
    assert told["votes"][0]["answer"] == "18"
    assert sum(len(vote["paths"]) for vote in told["votes"]) <= 6
    for path in told["paths"]:
        assert path["mean_entropy"] > 0
        assert path["num_tokens"] > 0
    with pytest.raises(UsageError, match="search_async"):
        search.search("why?")


def test_closing_aborts_what_still_runs(engine: LiveEngine) -> None:
    @dataclass(frozen=True)
    class CloseAt:
        name: str = "close_at"

        def start(self, max_paths: int) -> MajorityRun:
            return _CloseAtRun(max_paths)

    class _CloseAtRun(MajorityRun):
        def after_step(self, lanes: Sequence[Lane]) -> StepDecision:
            return StepDecision(close="enough") if lanes[0].num_tokens >= 5 else CONTINUE

    report = report_of(all_events(engine, search_of(engine, CloseAt(), ESSAY, num_paths=3, max_tokens=100)))
    assert (report.closed_by, report.num_aborted, report.answer) == ("enough", 3, None)
    assert "no path gave an answer" in str(report.note)
    assert report.num_tokens < 100
    idle(engine)
    assert engine.steps.kv_cache_usage[-1] == 0.0


def test_leaving_early_aborts_all_paths(engine: LiveEngine) -> None:
    search = search_of(engine, PruneAt(999, count=0), ESSAY, num_paths=4, max_tokens=150)

    async def leave() -> None:
        async with aclosing(search.events()) as events:
            async for event in events:
                if isinstance(event, TokensEvent):
                    break

    engine.run(leave())
    assert all(lane.finish_reason is FinishReason.CLOSED for lane in search.lanes)
    assert engine.engine.num_active_traces == 0
    idle(engine)
    assert engine.steps.kv_cache_usage[-1] == 0.0


def test_more_paths_than_the_cache_holds_wait_their_turn(engine: LiveEngine) -> None:
    # 11 blocks of 32 tokens; 16 paths of a prompt of 97 tokens and more would need 64.
    search = search_of(engine, PruneAt(999, count=0), "What is 3 * 6?", task="products", num_paths=16, max_tokens=16)
    report = report_of(all_events(engine, search))
    assert (report.num_paths, report.num_pruned, report.num_aborted) == (16, 0, 0)
    assert all(path.num_tokens > 0 for path in report.paths)


def test_waves_come_one_after_the_other(engine: LiveEngine) -> None:
    config = SearchConfig(
        policy="adaptive_consistency", wave=2, certainty=0.99, num_paths=4, task="products", max_tokens=24
    )
    search = MetisParallelSearch(config, model=MODEL, engine=engine.engine)

    async def gather() -> list[SearchEvent]:
        return [event async for event in search.events("What is 3 * 6?")]

    events = engine.run(gather())
    waves = [event for event in events if isinstance(event, WaveEvent)]
    assert [(wave.wave, wave.paths) for wave in waves] == [(0, (0, 1)), (1, (2, 3))]
    second = events.index(waves[1])
    assert {event.path for event in events[:second] if isinstance(event, VoteEvent)} == {0, 1}


def test_rounds_fork_the_calmest_paths(engine: LiveEngine) -> None:
    config = SearchConfig(policy="full", num_paths=4, task="gcd", max_tokens=40)
    search = MetisIterativeSearch(
        config,
        rounds=IterativeConfig(rounds=2, shrink=(0.5,), min_paths=(2,), cooling=(0.5,), survivors=1),
        model=MODEL,
        engine=engine.engine,
    )
    question = "What is the greatest common divisor of 12 and 18?"
    report = engine.run(search.search_async(question))
    assert report.num_paths == 6
    assert [path.wave for path in report.paths] == [0, 0, 0, 0, 1, 1]
    # Both forks begin as one path of the first round does, and all six vote.
    firsts = {path.text[:4] for path in report.paths[:4]}
    assert report.paths[4].text[:4] == report.paths[5].text[:4]
    assert report.paths[4].text[:4] in firsts
    assert sum(len(vote["paths"]) for vote in report.votes) + sum(path.answer is None for path in report.paths) == 6


def test_bad_input_is_said_before_anything_runs(engine: LiveEngine) -> None:
    def fail(question: str, **settings: object) -> None:
        config = SearchConfig.model_validate(settings)
        engine.run(MetisParallelSearch(config, model=MODEL, engine=engine.engine).search_async(question))

    with pytest.raises(InputError, match="the question is empty"):
        fail("  ")
    with pytest.raises(InputError, match="leaves no room for an answer within the 256"):
        fail("sea " * 400)
    with pytest.raises(WaitTimeoutError, match="was not done after"):
        fail(ESSAY, policy="full", num_paths=4, max_tokens=150, timeout_seconds=0.05)
    assert engine.engine.num_active_traces == 0
