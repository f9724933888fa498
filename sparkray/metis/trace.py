"""What is known of one answer, token by token and as a whole: METIS's `CognitiveEvent` and `CognitiveTrace`.

A trace is built from the fields that the detector recorded while the answer was written; no second forward pass.
What those fields cannot tell is None and not 0: `semantic_entropy` (it needs embeddings of candidates) always,
`token_surprise` and what is computed from it where no log-probabilities were asked for, and every number of a token
whose logits held no distribution.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparkray.errors import InputError
from sparkray.metis.decisions import DecisionRule
from sparkray.metis.fields import COLUMN, NUM_FIELDS, Action
from sparkray.metis.labels import BoundaryAction, Decision, EpistemicState, Phase, Trend
from sparkray.metis.phases import TREND_WINDOW_TOKENS, PhaseRule, trend_of, trend_of_whole

FORMAT_VERSION = 1
_DECIMALS = 6
_MOMENTUM_MEMORY = 0.9
_LEAST_HIGH_SURPRISE_BITS = 3.0
_THINKING = re.compile(r"<think(?:ing)?>(.*?)(?:</think(?:ing)?>|\Z)(.*)", re.DOTALL)
_ACTIONS = {
    Action.GENERATE: BoundaryAction.GENERATE,
    Action.HEDGE: BoundaryAction.HEDGE,
    Action.REFUSE: BoundaryAction.REFUSE,
}


@dataclass(frozen=True, slots=True)
class CognitiveEvent:
    """One token.

    Attributes:
        step: place in the answer, from 0.
        token_id, text: the token, where given.
        token_entropy: bits.
        semantic_entropy: bits; None unless read from a trace that METIS itself wrote.
        confidence: probability of the likeliest token.
        z_score: the detector's z.
        token_surprise: -log2 of the probability of the token that was drawn.
        entropy_gradient: change of entropy since the token before; 0 at the first.
        entropy_momentum: exponential mean of the gradient, memory 0.9.
        hedge_statistic, refuse_statistic: the detector's, before any reset.
        cusum_alarm: whether the detector raised an alarm here.
        boosted: whether the chain-of-thought boost acted on this token.
    """

    step: int
    token_id: int | None = None
    text: str | None = None
    token_entropy: float | None = None
    semantic_entropy: float | None = None
    confidence: float | None = None
    z_score: float | None = None
    token_surprise: float | None = None
    entropy_gradient: float | None = None
    entropy_momentum: float | None = None
    cognitive_phase: Phase = Phase.RECALL
    decision: Decision = Decision.NORMAL
    epistemic_state: EpistemicState = EpistemicState.LIKELY
    boundary_action: BoundaryAction = BoundaryAction.GENERATE
    entropy_trend: Trend = Trend.STABLE
    cusum_alarm: bool = False
    hedge_statistic: float | None = None
    refuse_statistic: float | None = None
    boosted: bool = False

    @property
    def entropy(self) -> float | None:
        """The semantic entropy where there is one, else the token's."""
        return self.token_entropy if self.semantic_entropy is None else self.semantic_entropy


@dataclass(frozen=True, slots=True)
class CognitiveTrace:
    """One answer. Counts are of events; means leave out events without the number.

    Attributes:
        high_surprise_count: tokens whose surprise is above 3 bits and above twice the mean.
        thinking_text, answer_text: the text inside `<think>` or `<thinking>` and what follows it; all of it is answer
            where there is no such tag.
    """

    query: str = ""
    request_id: str | None = None
    total_tokens: int = 0
    fast_count: int = 0
    deep_count: int = 0
    hedge_count: int = 0
    seek_count: int = 0
    refuse_count: int = 0
    boosted_count: int = 0
    peak_z_score: float | None = None
    mean_entropy: float | None = None
    mean_confidence: float | None = None
    entropy_trend_summary: Trend = Trend.STABLE
    mean_surprise: float | None = None
    peak_surprise: float | None = None
    high_surprise_count: int | None = None
    thinking_text: str = ""
    answer_text: str = ""
    events: tuple[CognitiveEvent, ...] = field(default=(), repr=False)

    @classmethod
    def from_tokens(
        cls,
        tokens_TF: NDArray[np.float32],
        *,
        token_ids: Sequence[int] | None = None,
        texts: Sequence[str] | None = None,
        surprises: Sequence[float | None] | None = None,
        query: str = "",
        request_id: str | None = None,
    ) -> CognitiveTrace:
        """The trace of recorded tokens.

        Args:
            tokens_TF: rows in the order of `TOKEN_FIELDS`.
            token_ids, texts, surprises: one for each row; surprises in bits.
            query, request_id: copied.

        Raises:
            InputError: the lengths do not agree.
        """
        builder = TraceBuilder(query=query, request_id=request_id)
        num_tokens = _checked_length(tokens_TF, token_ids=token_ids, texts=texts, surprises=surprises)
        for step in range(num_tokens):
            builder.add(
                tokens_TF[step],
                token_id=token_ids[step] if token_ids is not None else None,
                text=texts[step] if texts is not None else None,
                surprise=surprises[step] if surprises is not None else None,
            )
        return builder.trace()

    @classmethod
    def from_events(
        cls,
        events: Iterable[CognitiveEvent],
        *,
        query: str = "",
        request_id: str | None = None,
        text: str | None = None,
    ) -> CognitiveTrace:
        """The trace of finished events; `text` is the whole answer, by default the events' texts joined."""
        events = tuple(events)
        entropies = [event.entropy for event in events if event.entropy is not None]
        surprises = [event.token_surprise for event in events if event.token_surprise is not None]
        mean_surprise = _mean(surprises)
        actions = [event.boundary_action for event in events]
        decisions = [event.decision for event in events]
        thinking, answer = split_thinking(text if text is not None else "".join(event.text or "" for event in events))
        return cls(
            query=query,
            request_id=request_id,
            total_tokens=len(events),
            fast_count=decisions.count(Decision.FAST),
            deep_count=decisions.count(Decision.DEEP),
            hedge_count=actions.count(BoundaryAction.HEDGE),
            seek_count=actions.count(BoundaryAction.SEEK),
            refuse_count=actions.count(BoundaryAction.REFUSE),
            boosted_count=sum(event.boosted for event in events),
            peak_z_score=max((event.z_score for event in events if event.z_score is not None), default=None),
            mean_entropy=_mean(entropies),
            mean_confidence=_mean([event.confidence for event in events if event.confidence is not None]),
            entropy_trend_summary=trend_of_whole(entropies),
            mean_surprise=mean_surprise,
            peak_surprise=max(surprises, default=None),
            high_surprise_count=None
            if mean_surprise is None
            else sum(surprise > max(2 * mean_surprise, _LEAST_HIGH_SURPRISE_BITS) for surprise in surprises),
            thinking_text=thinking,
            answer_text=answer,
            events=events,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, numbers to six decimals, no NaN and no infinity."""
        summary = {name: _plain(getattr(self, name)) for name in _TRACE_FIELDS}
        return {"version": FORMAT_VERSION, **summary, "events": [_plain_event(event) for event in self.events]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> CognitiveTrace:
        """The trace that `to_dict` wrote.

        Raises:
            InputError: another version, unknown or missing keys, or a word that is not one of the labels.
        """
        if data.get("version") != FORMAT_VERSION:
            raise InputError(
                f"a trace of version {FORMAT_VERSION} is expected, and version {data.get('version')!r} was given."
            )
        try:
            values = {key: value for key, value in data.items() if key != "version"}
            values["events"] = tuple(_event(event) for event in values["events"])
            values["entropy_trend_summary"] = Trend(values["entropy_trend_summary"])
            return cls(**values)
        except (KeyError, TypeError, ValueError, AttributeError) as failure:
            raise InputError(f"the trace is damaged: {failure!r}.") from failure


class TraceBuilder:
    """Events one at a time, as tokens are recorded; `CognitiveTrace.from_tokens` is this in one go."""

    def __init__(self, *, query: str = "", request_id: str | None = None) -> None:
        self._query = query
        self._request_id = request_id
        self._events: list[CognitiveEvent] = []
        self._decisions = DecisionRule()
        self._phases = PhaseRule()
        self._recent: list[float] = []
        self._momentum = 0.0

    def add(
        self,
        values_F: NDArray[np.float32],
        *,
        token_id: int | None = None,
        text: str | None = None,
        surprise: float | None = None,
    ) -> CognitiveEvent:
        """The event of the next token, from its row in the order of `TOKEN_FIELDS`; surprise in bits."""
        value = dict(zip(COLUMN, values_F.tolist(), strict=True))
        action = Action(int(value["action"]))
        told = {
            "step": len(self._events),
            "token_id": token_id,
            "text": text,
            "token_surprise": surprise,
            "boundary_action": _ACTIONS[action],
            "cusum_alarm": action is not Action.GENERATE,
            "boosted": value["boosted"] > 0,
            "hedge_statistic": value["hedge_statistic"],
            "refuse_statistic": value["refuse_statistic"],
        }
        if math.isfinite(value["entropy"]):
            told |= self._read(value["entropy"], value["max_prob"], value["z"])
        event = CognitiveEvent(**told)
        self._events.append(event)
        return event

    def trace(self) -> CognitiveTrace:
        """The trace so far."""
        return CognitiveTrace.from_events(self._events, query=self._query, request_id=self._request_id)

    def _read(self, entropy: float, confidence: float, z: float) -> dict[str, Any]:
        gradient = entropy - self._recent[-1] if self._recent else 0.0
        self._momentum = _MOMENTUM_MEMORY * self._momentum + (1.0 - _MOMENTUM_MEMORY) * gradient
        self._recent = [*self._recent[-TREND_WINDOW_TOKENS + 1 :], entropy]
        verdict = self._decisions.step(entropy, confidence, z)
        return {
            "token_entropy": entropy,
            "confidence": confidence,
            "z_score": z,
            "entropy_gradient": gradient,
            "entropy_momentum": self._momentum,
            "decision": verdict.decision,
            "epistemic_state": verdict.epistemic_state,
            "cognitive_phase": self._phases.step(entropy, confidence, self._momentum, verdict.decision),
            "entropy_trend": trend_of(self._recent),
        }


def split_thinking(text: str) -> tuple[str, str]:
    """(thinking, answer) of a text; a thinking block that was cut off has no answer yet."""
    found = _THINKING.search(text)
    if found is not None:
        return found.group(1).strip(), (text[: found.start()] + found.group(2)).strip()
    # Chat templates of reasoning models open the block in the prompt, so an answer may hold its end alone.
    thinking, mark, answer = text.partition("</think>")
    return (thinking.strip(), answer.strip()) if mark else ("", text.strip())


def _checked_length(tokens_TF: NDArray[np.float32], **others: Sequence[Any] | None) -> int:
    if tokens_TF.ndim != 2 or tokens_TF.shape[1] != NUM_FIELDS:
        raise InputError(f"recorded tokens of shape {tokens_TF.shape} were given, and [T, {NUM_FIELDS}] is expected.")
    for name, values in others.items():
        if values is not None and len(values) != len(tokens_TF):
            raise InputError(
                f"{len(tokens_TF)} recorded tokens and {len(values)} {name} were given; one each is expected."
            )
    return len(tokens_TF)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _plain_event(event: CognitiveEvent) -> dict[str, Any]:
    return {name: _plain(getattr(event, name)) for name in _EVENT_FIELDS}


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, _DECIMALS) if math.isfinite(value) else None
    return value.value if isinstance(value, StrEnum) else value


_LABELS: dict[str, type[Phase | Decision | EpistemicState | BoundaryAction | Trend]] = {
    "cognitive_phase": Phase,
    "decision": Decision,
    "epistemic_state": EpistemicState,
    "boundary_action": BoundaryAction,
    "entropy_trend": Trend,
}


_EVENT_FIELDS = tuple(item.name for item in fields(CognitiveEvent))
_TRACE_FIELDS = tuple(item.name for item in fields(CognitiveTrace) if item.name != "events")


def _event(data: dict[str, Any]) -> CognitiveEvent:
    values: dict[str, Any] = {key: _LABELS[key](value) if key in _LABELS else value for key, value in data.items()}
    return CognitiveEvent(**values)
