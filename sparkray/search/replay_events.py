"""The events that a search of recorded paths would have given: the replay of a recording, for eyes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from sparkray.search.events import DoneEvent, PruneEvent, SearchEvent, TokensEvent, VoteEvent, WaveEvent, standing
from sparkray.search.paths import FinishReason, Lane
from sparkray.search.policies.base import Policy, PolicyRun, StepDecision
from sparkray.search.recording import RecordedQuestion
from sparkray.search.replay import replay
from sparkray.search.report import build_report
from sparkray.search.votes import VoteResult

Decode = Callable[[Sequence[int]], str]


def replay_events(policy: Policy, question: RecordedQuestion, decode: Decode) -> list[SearchEvent]:
    """All events of a search of `question` under `policy`, step by step, ended by its report.

    Args:
        policy: what decides.
        question: with its recorded paths, which are launched as recorded.
        decode: token ids to text.
    """
    noting = _Noting(policy, question, decode)
    outcome = replay(noting, question.paths)
    report = build_report(
        question.prompt.rsplit("Question: ", 1)[-1].removesuffix("\nAnswer:"),
        policy.name,
        outcome.result,
        outcome.lanes,
        max_paths=len(question.paths),
        closed_by=outcome.closed_by,
        seconds=0.0,
    )
    return [*noting.events, DoneEvent(report)]


class _Noting:
    """A policy that notes what happens, and decides as the one inside."""

    def __init__(self, inner: Policy, question: RecordedQuestion, decode: Decode) -> None:
        self.events: list[SearchEvent] = []
        self.name = inner.name
        self._inner = inner
        self._question = question
        self._decode = decode

    def start(self, max_paths: int) -> PolicyRun:
        return _NotingRun(self._inner.start(max_paths), self._question, self._decode, self.events)


class _NotingRun:
    def __init__(self, inner: PolicyRun, question: RecordedQuestion, decode: Decode, events: list[SearchEvent]) -> None:
        self._inner = inner
        self._question = question
        self._decode = decode
        self._events = events
        self._num_written: dict[int, int] = {}

    def next_wave(self, lanes: Sequence[Lane]) -> int:
        count = self._inner.next_wave(lanes)
        if count > 0:
            wave = 1 + max((lane.wave for lane in lanes), default=-1)
            self._events.append(WaveEvent(wave, tuple(range(len(lanes), len(lanes) + count))))
        return count

    def after_step(self, lanes: Sequence[Lane]) -> StepDecision:
        for lane in lanes:
            if lane.num_tokens > self._num_written.get(lane.index, 0):
                self._num_written[lane.index] = lane.num_tokens
                self._note_token(lane)
                if lane.ended_by_itself:
                    shown = lane.answer.shown if lane.answer else None
                    self._events.append(VoteEvent(lane.index, shown, False, standing(self._inner.vote(lanes))))
        decision = self._inner.after_step(lanes)
        for index in decision.prune:
            if lanes[index].running:
                self._events.append(PruneEvent(index, lanes[index].num_tokens))
        return decision

    def vote(self, lanes: Sequence[Lane]) -> VoteResult:
        # The replay has ended: what was cut short keeps the text that it had.
        for lane in lanes:
            if lane.finish_reason in (FinishReason.PRUNED, FinishReason.CLOSED):
                lane.text = self._decode(self._question.paths[lane.index].token_ids[: lane.num_tokens])
        return self._inner.vote(lanes)

    def _note_token(self, lane: Lane) -> None:
        path = self._question.paths[lane.index]
        at = lane.num_tokens - 1
        after, before = self._decode(path.token_ids[: at + 1]), self._decode(path.token_ids[:at])
        # The text of a whole path ends before the string that stopped it.
        text = (after[: len(path.text)] if lane.ended_by_itself else after).removeprefix(before)
        entropy, statistic = (_known(lane.column(name)[at]) for name in ("entropy", "hedge_statistic"))
        self._events.append(TokensEvent(lane.index, text, (entropy,), (statistic,), lane.num_tokens))


def _known(value: np.float32) -> float | None:
    return round(float(value), 3) if np.isfinite(value) else None
