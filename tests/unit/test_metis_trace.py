"""Traces from recorded tokens: what they say, what they leave open, and that they survive JSON."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from sparkray.errors import InputError
from sparkray.metis.fields import COLUMN, NUM_FIELDS, Action
from sparkray.metis.labels import BoundaryAction, Decision, EpistemicState, Phase, Trend
from sparkray.metis.trace import CognitiveTrace, TraceBuilder, split_thinking

COUNTS = ("fast_count", "deep_count", "hedge_count", "seek_count", "refuse_count", "boosted_count")


def recorded(entropies: list[float], **columns: Any) -> NDArray[np.float32]:
    tokens_TF = np.zeros((len(entropies), NUM_FIELDS), dtype=np.float32)
    tokens_TF[:, COLUMN["entropy"]] = entropies
    tokens_TF[:, COLUMN["confidence"]] = 0.9
    tokens_TF[:, COLUMN["max_prob"]] = 0.5
    for name, values in columns.items():
        tokens_TF[:, COLUMN[name]] = values
    return tokens_TF


def test_the_whole_of_a_short_answer_by_hand() -> None:
    trace = CognitiveTrace.from_tokens(
        recorded(
            [1.0, 3.0, 2.0, 2.0],
            max_prob=[0.5, 0.25, 0.75, 0.5],
            z=[0.0, 2.5, -1.0, 0.5],
            hedge_statistic=[0.0, 4.5, 1.0, 8.5],
            action=[Action.GENERATE, Action.HEDGE, Action.GENERATE, Action.REFUSE],
            boosted=[0, 1, 1, 0],
        ),
        token_ids=[5, 6, 7, 8],
        texts=["a", "b", "c", "d"],
        surprises=[1.0, 9.0, 0.5, 1.5],
        query="why?",
        request_id="r1",
    )
    assert (trace.query, trace.request_id, trace.total_tokens) == ("why?", "r1", 4)
    assert (trace.hedge_count, trace.seek_count, trace.refuse_count, trace.boosted_count) == (1, 0, 1, 2)
    assert trace.peak_z_score == 2.5
    assert trace.mean_entropy == 2.0
    assert trace.mean_confidence == 0.5
    assert trace.mean_surprise == 3.0
    assert trace.peak_surprise == 9.0
    assert trace.high_surprise_count == 1, "above 3 bits and above twice the mean of 3"
    assert trace.entropy_trend_summary is Trend.STABLE
    assert trace.answer_text == "abcd"
    second = trace.events[1]
    assert (second.step, second.token_id, second.text, second.token_entropy) == (1, 6, "b", 3.0)
    assert (second.entropy_gradient, second.entropy_momentum) == (2.0, pytest.approx(0.2))
    assert (second.boundary_action, second.cusum_alarm, second.boosted) == (BoundaryAction.HEDGE, True, True)
    assert second.hedge_statistic == 4.5
    third = trace.events[2]
    assert (third.entropy_gradient, third.entropy_momentum) == (-1.0, pytest.approx(0.9 * 0.2 - 0.1))
    assert not third.cusum_alarm
    assert trace.events[0].entropy_gradient == 0.0


def test_what_was_not_recorded_is_none_and_not_zero() -> None:
    trace = CognitiveTrace.from_tokens(recorded([1.0, 2.0]))
    assert trace.mean_surprise is trace.peak_surprise is trace.high_surprise_count is None
    assert all(event.semantic_entropy is event.token_surprise is None for event in trace.events)
    assert all(event.token_id is event.text is None for event in trace.events)
    empty = CognitiveTrace.from_tokens(recorded([]))
    assert empty.total_tokens == 0
    assert empty.mean_entropy is empty.mean_confidence is empty.peak_z_score is empty.mean_surprise is None


def test_a_token_without_distribution_keeps_its_place_and_spoils_no_mean() -> None:
    trace = CognitiveTrace.from_tokens(
        recorded([1.0, math.nan, 3.0], z=[0.0, math.nan, 1.0], max_prob=[0.5, math.nan, 0.7]), texts=["a", "b", "c"]
    )
    lost = trace.events[1]
    assert (lost.step, lost.text) == (1, "b")
    assert lost.token_entropy is lost.confidence is lost.z_score is lost.entropy_gradient is None
    assert trace.mean_entropy == 2.0
    assert trace.events[2].entropy_gradient == 2.0
    json.dumps(trace.to_dict(), allow_nan=False)


def test_high_surprise_needs_three_bits() -> None:
    trace = CognitiveTrace.from_tokens(recorded([1.0] * 4), surprises=[0.1, 0.1, 2.9, 0.1])
    assert trace.high_surprise_count == 0
    trace = CognitiveTrace.from_tokens(recorded([1.0] * 4), surprises=[0.1, 0.1, 3.1, 0.1])
    assert trace.high_surprise_count == 1


def test_some_surprises_may_be_missing() -> None:
    trace = CognitiveTrace.from_tokens(recorded([1.0] * 3), surprises=[2.0, None, 4.0])
    assert trace.mean_surprise == 3.0
    assert trace.events[1].token_surprise is None


@pytest.mark.parametrize(
    ("entropies", "trend"),
    [
        ([1.0] * 10 + [4.0] * 10, Trend.RISING),
        ([4.0] * 10 + [1.0] * 10, Trend.FALLING),
        ([1.0, 4.0] * 10, Trend.STABLE),
    ],
)
def test_trend_of_the_whole(entropies: list[float], trend: Trend) -> None:
    assert CognitiveTrace.from_tokens(recorded(entropies)).entropy_trend_summary is trend


@pytest.mark.parametrize(
    ("entropies", "trend"),
    [
        ([0.0] * 9, Trend.STABLE),
        (list(np.arange(10) * 0.11), Trend.RISING),
        (list(np.arange(10) * 0.09), Trend.STABLE),
        (list(5 - np.arange(10) * 0.11), Trend.FALLING),
        ([0.0, 3.0] * 5, Trend.OSCILLATING),
        ([0.0, 3.0] * 5 + list(np.arange(10) * 0.2), Trend.RISING),
    ],
)
def test_trend_at_a_token_is_of_the_last_ten(entropies: list[float], trend: Trend) -> None:
    assert CognitiveTrace.from_tokens(recorded(entropies)).events[-1].entropy_trend is trend


@pytest.mark.parametrize(
    ("z", "confidence", "state"),
    [
        (1.21, 0.5, EpistemicState.UNKNOWN),
        (1.19, 0.5, EpistemicState.UNCERTAIN),
        (0.99, 0.5, EpistemicState.LIKELY),
        (-0.51, 0.75, EpistemicState.KNOWN),
        (-0.51, 0.65, EpistemicState.LIKELY),
        (-0.49, 0.75, EpistemicState.LIKELY),
    ],
)
def test_epistemic_state(z: float, confidence: float, state: EpistemicState) -> None:
    trace = CognitiveTrace.from_tokens(recorded([1.0], z=z, max_prob=confidence))
    assert trace.events[0].epistemic_state is state


def test_fast_and_deep_while_cold() -> None:
    """The first nine tokens: FAST at 1.5 bits or less and half the probability on one token, DEEP from 2 bits."""
    tokens = recorded([1.5, 1.5, 1.6, 2.0], max_prob=[0.5, 0.4, 0.9, 0.2])
    decisions = [event.decision for event in CognitiveTrace.from_tokens(tokens).events]
    assert decisions == [Decision.FAST, Decision.NORMAL, Decision.NORMAL, Decision.DEEP]


def test_phases_of_a_made_up_answer() -> None:
    """Sure, then searching, then stuck: the window of 8 has to be full of it."""
    entropies = [0.05] * 60 + [3.0] * 8
    tokens = recorded(entropies, max_prob=[0.99] * 60 + [0.2] * 8)
    phases = [event.cognitive_phase for event in CognitiveTrace.from_tokens(tokens).events]
    assert set(phases[:7]) == {Phase.RECALL}
    assert phases[67] is Phase.CONFUSION, "far above its own level, not coming down, no candidate leads"
    leading = recorded(entropies, max_prob=[0.99] * 60 + [0.6] * 8)
    assert CognitiveTrace.from_tokens(leading).events[67].cognitive_phase is Phase.EXPLORATION
    back = recorded([3.0] * 30 + [0.05] * 30, max_prob=[0.2] * 30 + [0.99] * 30)
    late = {event.cognitive_phase for event in CognitiveTrace.from_tokens(back).events[45:]}
    assert late <= {Phase.FLUENT, Phase.RECALL}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ("", "")),
        ("plain", ("", "plain")),
        ("<think>a\nb</think> c", ("a\nb", "c")),
        ("<thinking>a</thinking>c", ("a", "c")),
        ("intro <think>a</think> c", ("a", "intro  c")),
        ("<think>cut off", ("cut off", "")),
        ("opened by the prompt</think>\n\nc", ("opened by the prompt", "c")),
    ],
)
def test_split_thinking(text: str, parts: tuple[str, str]) -> None:
    assert split_thinking(text) == parts


def test_thinking_and_answer_of_the_tokens() -> None:
    trace = CognitiveTrace.from_tokens(recorded([1.0] * 4), texts=["<think>", "hm", "</think>", "42"])
    assert (trace.thinking_text, trace.answer_text) == ("hm", "42")


def test_a_builder_gives_the_same_trace_token_by_token() -> None:
    rng = np.random.default_rng(0)
    tokens = recorded(list(rng.gamma(1, 1.2, 300)), z=rng.normal(size=300), max_prob=rng.random(300))
    builder = TraceBuilder(query="q")
    events = [builder.add(row) for row in tokens[:200]]
    assert builder.trace() == CognitiveTrace.from_tokens(tokens[:200], query="q")
    events += [builder.add(row) for row in tokens[200:]]
    assert tuple(events) == CognitiveTrace.from_tokens(tokens, query="q").events


@pytest.mark.parametrize("name", ["token_ids", "texts", "surprises"])
def test_lengths_must_agree(name: str) -> None:
    with pytest.raises(InputError, match=rf"2 recorded tokens and 3 {name}"):
        CognitiveTrace.from_tokens(recorded([1.0, 2.0]), **{name: [1, 2, 3]})


def test_the_shape_must_be_that_of_recorded_tokens() -> None:
    with pytest.raises(InputError, match=r"\[T, 8\]"):
        CognitiveTrace.from_tokens(np.zeros((3, 5), dtype=np.float32))


def test_json_names_what_the_issue_of_a_trace_is() -> None:
    """The keys that readers rely on."""
    data = CognitiveTrace.from_tokens(recorded([1.0]), surprises=[1.0]).to_dict()
    assert set(data) == {
        *("version", "query", "request_id", "total_tokens", "peak_z_score", "mean_entropy", "mean_confidence"),
        *("entropy_trend_summary", "mean_surprise", "peak_surprise", "high_surprise_count"),
        *("thinking_text", "answer_text", "events"),
        *COUNTS,
    }
    assert set(data["events"][0]) == {
        *("step", "token_id", "text", "token_entropy", "semantic_entropy", "confidence", "z_score"),
        *("token_surprise", "entropy_gradient", "entropy_momentum", "cognitive_phase", "decision"),
        *("epistemic_state", "boundary_action", "entropy_trend", "cusum_alarm"),
        *("hedge_statistic", "refuse_statistic", "boosted"),
    }


VALUES = arrays(
    np.float32,
    st.tuples(st.integers(0, 30), st.just(NUM_FIELDS)),
    elements=st.one_of(st.floats(0, 16, width=32), st.just(math.nan), st.just(math.inf)),
)


@given(VALUES, st.text(max_size=20))
@settings(max_examples=100, deadline=None)
def test_json_round_trip(tokens_TF: NDArray[np.float32], query: str) -> None:
    tokens_TF[:, COLUMN["action"]] = np.arange(len(tokens_TF)) % 3
    tokens_TF[:, COLUMN["boosted"]] = np.arange(len(tokens_TF)) % 2
    trace = CognitiveTrace.from_tokens(tokens_TF, query=query, texts=["x\n\u2028"] * len(tokens_TF))
    text = json.dumps(trace.to_dict(), allow_nan=False)
    again = CognitiveTrace.from_dict(json.loads(text))
    assert again.to_dict() == trace.to_dict()
    assert again.events[:1] == () or isinstance(again.events[0].decision, Decision)
    assert sum(event.decision is Decision.FAST for event in again.events) == again.fast_count


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"version": None},
        {"events": None},
        {"events": [3]},
        {"events": [{"step": 0, "decision": "slow"}]},
        {"events": [{"step": 0, "colour": "red"}]},
        {"entropy_trend_summary": "sideways"},
        {"extra": 1},
    ],
)
def test_damaged_json_is_refused(change: dict[str, Any]) -> None:
    data = CognitiveTrace.from_tokens(recorded([1.0])).to_dict()
    with pytest.raises(InputError):
        CognitiveTrace.from_dict({**data, **change})


@pytest.mark.parametrize("module", ["options", "fields", "trace", "profile", "reward", "decisions", "phases", "rules"])
def test_the_light_modules_need_no_torch(module: str) -> None:
    code = f"import sparkray.metis.{module}, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"


def test_public_names_exist_and_are_sorted() -> None:
    import sparkray.metis as metis

    assert metis.__all__ == sorted(metis.__all__, key=lambda name: (not name.isupper(), name))
    assert sorted(metis.__all__) == sorted(metis._HOME)
    for name in metis.__all__:
        assert getattr(metis, name) is not None
    with pytest.raises(AttributeError):
        _ = metis.nothing
