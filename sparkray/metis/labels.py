"""The words that a trace uses, spelled as METIS spells them."""

from __future__ import annotations

from enum import StrEnum


class Decision(StrEnum):
    """How much thought a token took."""

    FAST = "fast"
    NORMAL = "normal"
    DEEP = "deep"


class EpistemicState(StrEnum):
    """How well the model knew, by z and confidence."""

    KNOWN = "known"
    LIKELY = "likely"
    UNCERTAIN = "uncertain"
    UNKNOWN = "unknown"


class BoundaryAction(StrEnum):
    """What should follow. The detectors here say all but SEEK, which METIS takes from embeddings of candidates."""

    GENERATE = "generate"
    HEDGE = "hedge"
    SEEK = "seek"
    REFUSE = "refuse"


class Phase(StrEnum):
    """What the last few tokens were like together."""

    FLUENT = "fluent"
    RECALL = "recall"
    REASONING = "reasoning"
    EXPLORATION = "exploration"
    CONFUSION = "confusion"


class Trend(StrEnum):
    """Where the entropy is going."""

    STABLE = "stable"
    RISING = "rising"
    FALLING = "falling"
    OSCILLATING = "oscillating"
