"""Every term of the cognitive reward, against numbers worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkray.metis.labels import BoundaryAction, Decision, EpistemicState, Phase
from sparkray.metis.reward import CognitiveReward, CognitiveRewardComputer, RewardWeights, coherence_term, thinking_term
from sparkray.metis.trace import CognitiveEvent, CognitiveTrace

PLAIN = CognitiveEvent(
    step=0,
    token_entropy=1.0,
    confidence=0.5,
    z_score=-1.0,
    token_surprise=1.0,
    cognitive_phase=Phase.RECALL,
    decision=Decision.NORMAL,
    epistemic_state=EpistemicState.LIKELY,
    boundary_action=BoundaryAction.GENERATE,
)


def trace(*events: CognitiveEvent, text: str = "") -> CognitiveTrace:
    return CognitiveTrace.from_events([replace(event, step=step) for step, event in enumerate(events)], text=text)


def reward(*events: CognitiveEvent, text: str = "") -> CognitiveReward:
    return CognitiveRewardComputer().compute(trace(*events, text=text))


def varied(num: int, **changes: object) -> list[CognitiveEvent]:
    """Events whose entropies alternate between 0.5 and 1.5, so that nothing is degenerate."""
    return [replace(PLAIN, token_entropy=0.5 + step % 2, **changes) for step in range(num)]  # type: ignore[arg-type]


@pytest.mark.parametrize("num", [0, 1])
def test_fewer_than_two_tokens_are_worth_nothing(num: int) -> None:
    assert reward(*[PLAIN] * num) == CognitiveReward(total=0.0)


def test_a_repeating_word_is_worth_minus_one() -> None:
    got = reward(*[PLAIN] * 40)
    assert (got.total, got.coherence, got.degenerate) == (-1.0, -1.0, True)
    assert got.calibration == got.phase == got.completeness == 0.0


def test_constant_entropy_with_two_decisions_is_not_degenerate() -> None:
    got = reward(PLAIN, replace(PLAIN, decision=Decision.FAST))
    assert not got.degenerate
    assert got.coherence == pytest.approx(0.6)


def test_the_degenerate_bound_is_a_variance_of_a_thousandth() -> None:
    """Two entropies 2 d apart have the variance d^2."""
    for gap, degenerate in ((0.0316, True), (0.0317, False)):
        pair = [replace(PLAIN, token_entropy=1.0 - gap), replace(PLAIN, token_entropy=1.0 + gap)]
        assert reward(*pair).degenerate is degenerate


def test_coherence_of_one_window() -> None:
    """0.5 and 1.5 in turn: deviation 0.5, mean 1, variation 0.5."""
    assert coherence_term([0.5, 1.5] * 4) == pytest.approx(0.6 - 0.5 * math.log(1.5))


def test_coherence_is_the_mean_over_windows_that_overlap_by_half() -> None:
    """24 tokens, windows 0..15 and 8..23: the first is constant, half of the second is 0 and half is 2."""
    entropies = [2.0] * 16 + [0.0, 2.0] * 4
    second = math.sqrt(12 / 16 * 4 - 1.5**2) / 1.5
    assert coherence_term(entropies) == pytest.approx(0.6 - 0.5 * math.log1p(second / 2))


@pytest.mark.parametrize(("level", "lost"), [(0.3, 0.0), (0.27, 0.2), (0.15, 0.4), (0.0, 0.4)])
def test_coherence_loses_by_a_collapse_of_entropy(level: float, lost: float) -> None:
    assert coherence_term([level] * 8) == pytest.approx(0.6 - lost)


def test_coherence_does_not_fall_below_minus_one() -> None:
    assert coherence_term([0.0] * 63 + [1e9]) >= -1.0


def test_calibration_counts_confident_surprises_over_three_bits() -> None:
    """One token of four: confidence 0.5, surprise 4.2; 1 - 4 * 0.5 * 1.2 / 4."""
    events = varied(4)
    assert reward(*events).calibration == 1.0
    events[2] = replace(events[2], token_surprise=4.2)
    assert reward(*events).calibration == pytest.approx(1 - 0.6)
    events[2] = replace(events[2], token_surprise=3.0)
    assert reward(*events).calibration == 1.0
    assert reward(*varied(4, token_surprise=30.0)).calibration == -1.0


def test_phase_of_one_kind_loses_a_half() -> None:
    assert reward(*varied(6)).phase == -0.5


def test_phase_gains_by_variety() -> None:
    """Three quarters and a quarter: 0.811 bits of one; 1 switch of 7 is under 0.4."""
    events = varied(6) + varied(2, cognitive_phase=Phase.FLUENT)
    share = 0.4 * (-0.75 * math.log2(0.75) - 0.25 * math.log2(0.25))
    assert reward(*events[:4], *events[6:], *events[4:6]).phase == pytest.approx(share)


def test_phase_gains_by_an_arc_up_and_down() -> None:
    """Thirds of nine: means 1, 2, 1: up by more than 5 %, down by more than 5 %."""
    levels = [1.0] * 3 + [2.0] * 3 + [1.0] * 3
    both = reward(*(replace(PLAIN, token_entropy=level) for level in levels))
    assert both.phase == pytest.approx(-0.5 + 0.3)
    rising = reward(*(replace(PLAIN, token_entropy=level) for level in [1.0] * 3 + [2.0] * 6))
    assert rising.phase == pytest.approx(-0.5 + 0.15)
    falling = reward(*(replace(PLAIN, token_entropy=level) for level in [2.0] * 6 + [1.0] * 3))
    assert falling.phase == pytest.approx(-0.5 + 0.15)
    short = reward(*(replace(PLAIN, token_entropy=level) for level in levels[1:8]))
    assert short.phase == pytest.approx(-0.5), "seven tokens have no arc"


def confusion(before: int, confused: int, after: int, then: Phase, decision: Decision) -> CognitiveReward:
    kinds = [Phase.RECALL] * before + [Phase.CONFUSION] * confused + [then] * after
    events = [
        replace(event, cognitive_phase=kind, decision=decision if kind is Phase.CONFUSION else Decision.NORMAL)
        for event, kind in zip(varied(before + confused + after), kinds, strict=True)
    ]
    return reward(*events)


def test_phase_rewards_confusion_that_was_overcome() -> None:
    """One of twelve confused: + 2 / 12 after a DEEP decision and a return, - 2 / 12 * 0.5 otherwise; four: at most 0.3.

    Thirds of four tokens have equal means, so there is no arc.
    """
    variety = 0.4 * (-11 / 12 * math.log2(11 / 12) - 1 / 12 * math.log2(1 / 12))
    assert confusion(4, 1, 7, Phase.RECALL, Decision.DEEP).phase == pytest.approx(variety + 2 / 12)
    assert confusion(4, 1, 7, Phase.RECALL, Decision.NORMAL).phase == pytest.approx(variety - 1 / 12)
    assert confusion(11, 1, 0, Phase.RECALL, Decision.DEEP).phase == pytest.approx(variety - 1 / 12), "it never ended"
    three_kinds = 0.4 * -sum(p * math.log(p, 3) for p in (4 / 12, 1 / 12, 7 / 12))
    assert confusion(4, 1, 7, Phase.REASONING, Decision.DEEP).phase == pytest.approx(three_kinds + 2 / 12)
    assert confusion(4, 1, 7, Phase.EXPLORATION, Decision.DEEP).phase == pytest.approx(three_kinds - 1 / 12)
    third = 0.4 * (-2 / 3 * math.log2(2 / 3) - 1 / 3 * math.log2(1 / 3))
    assert confusion(4, 4, 4, Phase.RECALL, Decision.DEEP).phase == pytest.approx(third + 0.3)


def test_phase_loses_by_restlessness() -> None:
    """A switch at every token: rate 1, 0.6 above the allowed 0.4; two phases in equal parts: 0.4; no arc."""
    events = varied(12)
    events = [
        replace(event, cognitive_phase=Phase.FLUENT if step % 2 else Phase.RECALL) for step, event in enumerate(events)
    ]
    assert reward(*events).phase == pytest.approx(0.4 - 0.6)


def test_epistemic_is_the_gap_between_confidence_and_surprise_and_the_labels() -> None:
    """Confidence 0.5 against 1 - 1/3: gap 1/6, so 1 - 3/6; unsure tokens that were likely earn no label."""
    assert reward(*varied(4)).epistemic == pytest.approx(0.6 * 0.5)
    """Confidence 1 and no surprise: no gap, and every token confident where it may be."""
    assert reward(*varied(4, confidence=1.0, token_surprise=0.0)).epistemic == pytest.approx(1.0)
    """Confidence 1 and 3 bits or more of surprise: gap 1."""
    assert reward(*varied(4, confidence=1.0, token_surprise=9.0)).epistemic == pytest.approx(-0.6 + 0.4)


@pytest.mark.parametrize(
    ("state", "confidence", "action", "decision", "score"),
    [
        (EpistemicState.KNOWN, 0.8, BoundaryAction.GENERATE, Decision.FAST, 1.0),
        (EpistemicState.LIKELY, 0.7, BoundaryAction.GENERATE, Decision.FAST, 0.0),
        (EpistemicState.UNCERTAIN, 0.8, BoundaryAction.HEDGE, Decision.DEEP, -1.0),
        (EpistemicState.UNKNOWN, 0.8, BoundaryAction.SEEK, Decision.DEEP, -1.0),
        (EpistemicState.UNCERTAIN, 0.4, BoundaryAction.SEEK, Decision.NORMAL, 1.0),
        (EpistemicState.UNKNOWN, 0.4, BoundaryAction.HEDGE, Decision.DEEP, 1.0),
        (EpistemicState.UNKNOWN, 0.4, BoundaryAction.REFUSE, Decision.NORMAL, 1.0),
        (EpistemicState.UNCERTAIN, 0.4, BoundaryAction.GENERATE, Decision.NORMAL, 0.0),
    ],
)
def test_epistemic_labels(
    state: EpistemicState, confidence: float, action: BoundaryAction, decision: Decision, score: float
) -> None:
    """The label score of equal tokens, which is held to [-1, 1]; the surprise is chosen so that its part is 0.6."""
    events = varied(
        4,
        epistemic_state=state,
        confidence=confidence,
        boundary_action=action,
        decision=decision,
        token_surprise=3.0 * (1.0 - confidence),
    )
    assert reward(*events).epistemic == pytest.approx(0.6 + 0.4 * score)


def test_epistemic_labels_by_their_weight_in_a_mixture() -> None:
    """One UNKNOWN token that was confident (-3) among nine likely ones that were confident (+1): 0.6 a token."""
    events = varied(10, confidence=1.0, token_surprise=0.0)
    events[3] = replace(events[3], epistemic_state=EpistemicState.UNKNOWN)
    assert reward(*events).epistemic == pytest.approx(0.6 + 0.4 * 0.6)
    seek = varied(10, confidence=0.4, token_surprise=1.8)
    for at, changes in (
        (1, {"boundary_action": BoundaryAction.SEEK}),
        (2, {"decision": Decision.DEEP}),
        (3, {"boundary_action": BoundaryAction.HEDGE}),
    ):
        seek[at] = replace(seek[at], epistemic_state=EpistemicState.UNCERTAIN, **changes)  # type: ignore[arg-type]
    assert reward(*seek).epistemic == pytest.approx(0.6 + 0.4 * (2 + 1.5 + 1) / 10)


@pytest.mark.parametrize(
    ("decision", "z", "fit"),
    [
        (Decision.FAST, 0.0, 1.0),
        (Decision.FAST, 0.5, 0.5),
        (Decision.FAST, 0.51, 0.0),
        (Decision.DEEP, 0.31, 1.0),
        (Decision.DEEP, 0.3, 0.5),
        (Decision.DEEP, -0.2, 0.0),
        (Decision.NORMAL, 0.0, 0.7),
        (Decision.NORMAL, 0.4, 0.35),
        (Decision.NORMAL, 0.41, 0.0),
    ],
)
def test_efficiency_is_how_well_decisions_fit(decision: Decision, z: float, fit: float) -> None:
    """Forty tokens whose entropy never falls by 30 %."""
    events = [replace(PLAIN, token_entropy=1.0 + 0.001 * step, decision=decision, z_score=z) for step in range(40)]
    events[0] = replace(events[0], token_entropy=2.0, decision=Decision.NORMAL, z_score=1.0)
    assert reward(*events).efficiency == pytest.approx(39 / 40 * fit)


def test_efficiency_grows_with_length_to_forty_tokens() -> None:
    for num in (10, 40, 80):
        events = varied(num, decision=Decision.FAST, z_score=-1.0)
        assert reward(*events).efficiency == pytest.approx(min(1.0, num / 40))


def test_efficiency_counts_deep_thought_that_helped_within_three_tokens() -> None:
    """Two DEEP tokens of forty at entropy 4; one is followed by 2.7 (< 2.8) three tokens on, one by it four on."""
    entropies = [4.0] * 40
    entropies[13], entropies[24] = 2.7, 2.7
    events = [replace(PLAIN, token_entropy=entropy, z_score=0.41) for entropy in entropies]
    for at in (10, 20):
        events[at] = replace(events[at], decision=Decision.DEEP)
    assert reward(*events).efficiency == pytest.approx(2 / 40 + 0.3 * 0.5)


def test_thinking_by_hand() -> None:
    """Pairs of "abcde" are ab bc cd de, of "abcxyz" ab bc cx xy yz: two shared of seven."""
    assert thinking_term("abcde", "abcxyz") == pytest.approx((0.3 - 2 / 7) / 0.3)
    assert thinking_term("abcde", "vwxyz") == 1.0
    assert thinking_term("abcde", "abcde") == -1.0
    assert thinking_term("abcdef", "abcdxy") == pytest.approx(-1.5 * (3 / 7 - 0.3) / 0.7)
    assert thinking_term("abc", "abcdef") == thinking_term("", "abcdef") == thinking_term("abcdef", " abc ") == 0.0
    assert thinking_term("<b>abcde</b>", "vwxyz") == 1.0


def test_thinking_counts_only_with_a_weight() -> None:
    events = varied(4)
    text = "<think>abcde</think>vwxyz"
    plain = reward(*events, text=text)
    assert plain.thinking == 1.0
    assert plain.total == reward(*events).total
    weighted = CognitiveRewardComputer(RewardWeights(thinking=0.5)).compute(trace(*events, text=text))
    assert weighted.total == pytest.approx(plain.total + 0.5)


@pytest.mark.parametrize(("num", "bonus"), [(30, 0.0), (31, 0.005), (60, 0.15), (80, 0.25), (300, 0.25)])
def test_completeness(num: int, bonus: float) -> None:
    assert reward(*varied(num)).completeness == pytest.approx(bonus)


def test_completeness_needs_coherence_and_calibration() -> None:
    assert reward(*varied(100, token_surprise=30.0)).completeness == 0.0
    wild = [replace(PLAIN, token_entropy=1e6 if step % 16 == 0 else 0.0) for step in range(100)]
    got = reward(*wild)
    assert got.coherence < 0
    assert got.completeness == 0.0


@pytest.mark.parametrize(("num", "lost"), [(512, 0.0), (513, 0.001), (1012, 0.5)])
def test_length(num: int, lost: float) -> None:
    assert reward(*varied(num)).length == pytest.approx(lost)


def test_the_total_is_the_weighted_sum_of_the_named_terms() -> None:
    """A trace worked out term by term: 42 tokens, 0.5 and 1.5 in turn, one phase, plain."""
    got = reward(*varied(42))
    coherence, calibration, phase, epistemic, efficiency = 0.6 - 0.5 * math.log(1.5), 1.0, -0.5, 0.3, 0.7
    assert got.coherence == pytest.approx(coherence)
    assert got.efficiency == pytest.approx(efficiency)
    assert got.total == pytest.approx(
        0.20 * coherence + 0.34 * calibration + 0.23 * phase + 0.15 * epistemic + 0.08 * efficiency + 0.06
    )
    halved = CognitiveRewardComputer(RewardWeights(0.1, 0.2, 0.3, 0.4, 0.5)).compute(trace(*varied(42)))
    assert halved.total == pytest.approx(
        0.1 * coherence + 0.2 * calibration + 0.3 * phase + 0.4 * epistemic + 0.5 * efficiency + 0.06
    )


def test_without_surprise_nothing_is_made_up() -> None:
    """Calibration 0, epistemic from labels alone, completeness from coherence alone, and a flag."""
    events = varied(40, token_surprise=None, confidence=0.8)
    got = reward(*events)
    assert not got.surprise_recorded
    assert got.calibration == 0.0
    assert got.epistemic == pytest.approx(0.4)
    assert got.completeness == pytest.approx(0.05)
    assert reward(*varied(40, confidence=0.8)).surprise_recorded
    one_lacks = [*varied(39), replace(PLAIN, token_surprise=None)]
    assert not reward(*one_lacks).surprise_recorded


def test_tokens_without_a_distribution_are_left_out() -> None:
    blank = CognitiveEvent(step=0)
    events = varied(40)
    assert reward(*events[:20], blank, *events[20:]) == reward(*events)


def test_semantic_entropy_counts_where_there_is_one() -> None:
    events = [replace(event, semantic_entropy=2.0 * (event.token_entropy or 0.0)) for event in varied(8)]
    events[0] = replace(events[0], semantic_entropy=1.5)
    wanted = coherence_term([1.5, *([3.0, 1.0] * 4)[:7]])
    assert reward(*events).coherence == pytest.approx(wanted)


EVENTS = st.builds(
    CognitiveEvent,
    step=st.just(0),
    token_entropy=st.floats(0, 17),
    confidence=st.floats(0, 1),
    z_score=st.floats(-5, 5),
    token_surprise=st.one_of(st.none(), st.floats(0, 50)),
    cognitive_phase=st.sampled_from(Phase),
    decision=st.sampled_from(Decision),
    epistemic_state=st.sampled_from(EpistemicState),
    boundary_action=st.sampled_from(BoundaryAction),
)


@given(st.lists(EVENTS, max_size=60))
def test_every_term_stays_within_its_bounds(events: list[CognitiveEvent]) -> None:
    got = reward(*events)
    for term in (got.coherence, got.calibration, got.phase, got.epistemic, got.efficiency, got.thinking):
        assert -1.0 <= term <= 1.0
    assert 0.0 <= got.completeness <= 0.25
    assert -1.0 - 1e-9 <= got.total <= 1.25
