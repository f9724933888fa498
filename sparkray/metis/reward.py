"""METIS's cognitive reward: how a trace was thought, as one number, with every term by its name.

    total = 0.20 coherence + 0.34 calibration + 0.23 phase + 0.15 epistemic + 0.08 efficiency + 0.0 thinking
            + completeness - length

The terms are those of CARBON-XXX/METIS at the time of its `dgx` folder. They judge the manner and not the answer:
beside a verifiable reward they may break ties, alone they can be played.

METIS computes from a surprise of 0 where none was recorded, which gives every trace a perfect calibration. Here a
trace without surprise has a calibration of 0 and an epistemic term from its labels alone, and the result says so
(`surprise_recorded`); completeness then hangs on coherence alone.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

from sparkray.metis.labels import BoundaryAction, Decision, EpistemicState, Phase
from sparkray.metis.trace import CognitiveEvent, CognitiveTrace


@dataclass(frozen=True, slots=True)
class RewardWeights:
    """How much each term counts."""

    coherence: float = 0.20
    calibration: float = 0.34
    phase: float = 0.23
    epistemic: float = 0.15
    efficiency: float = 0.08
    thinking: float = 0.0


@dataclass(frozen=True, slots=True)
class CognitiveReward:
    """A reward and what it is made of.

    Attributes:
        total: the weighted sum; 0 for fewer than two tokens, -1 where degenerate.
        coherence, calibration, phase, epistemic, efficiency, thinking: each in [-1, 1], before its weight.
        completeness: what is added for a full answer, 0 to 0.25.
        length: what is taken off a very long one.
        degenerate: whether the entropy hardly varies and every decision is the same, as when a word repeats.
        surprise_recorded: whether every token had a surprise.
    """

    total: float
    coherence: float = 0.0
    calibration: float = 0.0
    phase: float = 0.0
    epistemic: float = 0.0
    efficiency: float = 0.0
    thinking: float = 0.0
    completeness: float = 0.0
    length: float = 0.0
    degenerate: bool = False
    surprise_recorded: bool = True

    def to_dict(self) -> dict[str, float | bool]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Step:
    """A token with everything that the terms need; `surprise` is None where any token lacks it."""

    entropy: float
    token_entropy: float
    confidence: float
    z: float
    surprise: float | None
    event: CognitiveEvent


class CognitiveRewardComputer:
    """Computes rewards with fixed weights.

    Tokens without an entropy (their logits held no distribution) are left out.
    """

    def __init__(self, weights: RewardWeights | None = None) -> None:
        self.weights = weights if weights is not None else RewardWeights()

    def compute(self, trace: CognitiveTrace) -> CognitiveReward:
        steps = _steps(trace)
        recorded = all(step.surprise is not None for step in steps)
        if len(steps) < 2:
            return CognitiveReward(total=0.0, surprise_recorded=recorded)
        if _variance([step.entropy for step in steps]) < 0.001 and len({step.event.decision for step in steps}) == 1:
            return CognitiveReward(total=-1.0, coherence=-1.0, degenerate=True, surprise_recorded=recorded)
        coherence = coherence_term([step.entropy for step in steps])
        calibration = _calibration(steps)
        phase = _phase(steps)
        epistemic = _epistemic(steps)
        efficiency = _efficiency(steps)
        thinking = thinking_term(trace.thinking_text, trace.answer_text)
        num = len(steps)
        full = num > 30 and coherence > 0 and (calibration > 0 or not recorded)
        completeness = min(0.25, (num - 30) * 0.005) if full else 0.0
        length = 0.001 * max(0, num - 512)
        weights = self.weights
        return CognitiveReward(
            total=weights.coherence * coherence
            + weights.calibration * calibration
            + weights.phase * phase
            + weights.epistemic * epistemic
            + weights.efficiency * efficiency
            + weights.thinking * thinking
            + completeness
            - length,
            coherence=coherence,
            calibration=calibration,
            phase=phase,
            epistemic=epistemic,
            efficiency=efficiency,
            thinking=thinking,
            completeness=completeness,
            length=length,
            surprise_recorded=recorded,
        )


def coherence_term(entropies: Sequence[float]) -> float:
    """How little the entropy varies within windows of 16 tokens that overlap by half, less a collapse towards 0."""
    window = min(16, len(entropies))
    if window < 2:
        smooth = 0.0
    else:
        starts = range(0, len(entropies) - window + 1, window // 2)
        variations = [_variation(entropies[start : start + window]) for start in starts]
        smooth = _clip(0.6 - 0.5 * math.log1p(_mean(variations)), -1.0, 0.6)
    mean = _mean(entropies)
    collapse = min(0.4, 2.0 * (0.3 - mean) / 0.3) if mean < 0.3 else 0.0
    return _clip(smooth - collapse)


def thinking_term(thinking: str, answer: str) -> float:
    """Whether the thinking says something that the answer does not.

    1 where they share no pair of letters, 0 at a Jaccard overlap of 0.3, towards -1 where they are alike; 0 where
    either is too short to tell.
    """
    thinking, answer = re.sub(r"<[^>]+>", "", thinking.strip()).strip(), answer.strip()
    if len(thinking) < 4 or len(answer) < 4:
        return 0.0
    pairs, other = set(pairwise(thinking)), set(pairwise(answer))
    overlap = len(pairs & other) / len(pairs | other)
    if overlap > 0.3:
        return -min(1.0, 1.5 * (overlap - 0.3) / 0.7)
    return (0.3 - overlap) / 0.3


def _calibration(steps: Sequence[_Step]) -> float:
    """What confident tokens lose by surprises of more than 3 bits."""
    surprises = [step.surprise for step in steps if step.surprise is not None]
    if len(surprises) < len(steps):
        return 0.0
    lost = [step.confidence * max(0.0, surprise - 3.0) for step, surprise in zip(steps, surprises, strict=True)]
    return _clip(1.0 - 4.0 * _mean(lost))


def _phase(steps: Sequence[_Step]) -> float:
    """Variety of phases, an arc of rise and fall, confusion that was overcome or not, and restlessness."""
    phases = [step.event.cognitive_phase for step in steps]
    num = len(phases)
    counts = Counter(phases)
    if len(counts) == 1:
        variety = -0.5
    else:
        shares = [count / num for count in counts.values()]
        variety = 0.4 * -sum(share * math.log(share) for share in shares) / math.log(len(counts))
    confused = phases.count(Phase.CONFUSION) / num
    outcome = min(0.3, 2.0 * confused) if _recovered(steps) else -2.0 * confused * 0.5
    switches = sum(before != after for before, after in pairwise(phases)) / (num - 1)
    return _clip(variety + _arc([step.entropy for step in steps]) + outcome - max(0.0, switches - 0.4))


def _arc(entropies: Sequence[float]) -> float:
    """0.15 where the middle third is 5 % above the first, 0.15 where the last is 5 % below the middle."""
    third = len(entropies) // 3
    if len(entropies) < 8:
        return 0.0
    early, middle = _mean(entropies[:third]), _mean(entropies[third : 2 * third])
    late = _mean(entropies[2 * third :])
    return 0.15 * (middle > 1.05 * early) + 0.15 * (late < 0.95 * middle)


def _recovered(steps: Sequence[_Step]) -> bool:
    """Whether a stretch of confusion in which a DEEP decision fell led on to anything but exploration."""
    had_deep = False
    for step, following in pairwise(steps):
        if step.event.cognitive_phase is not Phase.CONFUSION:
            continue
        had_deep = had_deep or step.event.decision is Decision.DEEP
        after = following.event.cognitive_phase
        if after is Phase.CONFUSION:
            continue
        if had_deep and after is not Phase.EXPLORATION:
            return True
        had_deep = False
    return False


def _epistemic(steps: Sequence[_Step]) -> float:
    """Whether confidence went with what came true (0.6), and uncertainty was owned up to (0.4)."""
    labels = _clip(_mean([_honesty(step) for step in steps]))
    gaps = [abs(step.confidence - (1.0 - min(step.surprise / 3.0, 1.0))) for step in steps if step.surprise is not None]
    if len(gaps) < len(steps):
        return 0.4 * labels
    return _clip(0.6 * _clip(1.0 - 3.0 * _mean(gaps)) + 0.4 * labels)


def _honesty(step: _Step) -> float:
    state, confident = step.event.epistemic_state, step.confidence > 0.7
    if state not in (EpistemicState.UNCERTAIN, EpistemicState.UNKNOWN):
        return 1.0 if confident else 0.0
    if confident:
        return -3.0 if state is EpistemicState.UNKNOWN else -1.0
    if step.event.boundary_action is BoundaryAction.SEEK:
        return 2.0
    if step.event.decision is Decision.DEEP:
        return 1.5
    return 1.0 if step.event.boundary_action in (BoundaryAction.HEDGE, BoundaryAction.REFUSE) else 0.0


def _efficiency(steps: Sequence[_Step]) -> float:
    """Whether thought went where z was high, and whether it helped: entropy down by 30 % within three tokens."""
    num = len(steps)
    resolved = num_deep = 0
    for at, step in enumerate(steps):
        if step.event.decision is not Decision.DEEP:
            continue
        num_deep += 1
        resolved += any(later.token_entropy < 0.7 * step.token_entropy for later in steps[at + 1 : at + 4])
    fitting = _mean([_fit(step.event.decision, step.z) for step in steps])
    return _clip((fitting + 0.3 * resolved / max(num_deep, 1)) * min(1.0, num / 40.0))


def _fit(decision: Decision, z: float) -> float:
    """How well a decision suits a z."""
    if decision is Decision.FAST:
        return 1.0 if z <= 0.0 else 0.5 if z <= 0.5 else 0.0
    if decision is Decision.DEEP:
        return 1.0 if z > 0.3 else 0.5 if z > -0.2 else 0.0
    return 0.0 if z > 0.4 else 0.35 if z > 0.0 else 0.7


def _steps(trace: CognitiveTrace) -> list[_Step]:
    return [
        _Step(event.entropy, event.token_entropy, event.confidence, event.z_score, event.token_surprise, event)
        for event in trace.events
        if event.entropy is not None
        and event.token_entropy is not None
        and event.confidence is not None
        and event.z_score is not None
    ]


def _variation(entropies: Sequence[float]) -> float:
    """Coefficient of variation; 0 where the mean is nothing."""
    mean = _mean(entropies)
    return 0.0 if mean < 1e-6 else math.sqrt(_variance(entropies)) / mean


def _variance(values: Sequence[float]) -> float:
    mean = _mean(values)
    return _mean([(value - mean) ** 2 for value in values])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _clip(value: float, low: float = -1.0, high: float = 1.0) -> float:
    return max(low, min(high, value))
