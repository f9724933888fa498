"""Settings of a search over many paths."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from sparkray.config.base import Settings

PolicyName = Literal["certified", "full", "adaptive_consistency", "esc", "deepconf_offline", "deepconf_online", "metis"]
AnswerKindName = Literal["auto", "number", "choice", "code", "text", "math"]

# The most careful level that saves 60 % of the tokens on the calibration questions of the packaged profile.
DEFAULT_RISK = 0.0225


class MetisPolicyConfig(Settings):
    """The knobs of METIS's own parallel search."""

    prune_ratio: float = Field(0.5, ge=0, lt=1, description="Part of the running paths pruned at each checkpoint.")
    checkpoints: tuple[int, ...] = Field((64, 128, 256), description="Numbers of tokens at which paths are pruned.")
    hedge_weight: float = Field(-0.1, description="Score for each HEDGE.")
    entropy_weight: float = Field(0.05, description="Score for each token while the mean entropy is 0.5 to 2 bits.")
    confidence_weight: float = Field(0.3, description="Score for the mean confidence.")
    majority: bool = Field(False, description="Let the surviving paths vote instead of taking the best score.")

    @model_validator(mode="after")
    def _rising(self) -> Self:
        if any(mark < 1 for mark in self.checkpoints) or list(self.checkpoints) != sorted(set(self.checkpoints)):
            raise ValueError(f"checkpoints are {self.checkpoints}, and rising numbers of at least 1 are expected")
        return self


class SearchConfig(Settings):
    """One search: how paths are drawn, which policy spends them, how the answer is read."""

    policy: PolicyName = Field("adaptive_consistency", description="`certified` needs a profile.")
    num_paths: int = Field(32, ge=1, le=1024, description="Paths at most.")
    max_tokens: int = Field(256, ge=1, le=1_048_576, description="Tokens of one path at most.")
    temperature: float = Field(0.7, gt=0, le=2)
    temperature_spread: float = Field(
        0.0, ge=0, le=1, description="Paths are drawn at temperatures spread evenly over temperature +- spread / 2."
    )
    top_p: float = Field(1.0, gt=0, le=1)
    stop: tuple[str, ...] = ()
    answer_kind: AnswerKindName = "auto"
    profile: str | None = Field(None, description="File of a calibrated profile, or `packaged`; for `certified`.")
    task: str | None = Field(None, description="The task the question belongs to; checked against the profile.")
    alpha: float = Field(0.05, gt=0, lt=1, description="certified: P(prune a path whose answer is right) at most.")
    risk: float = Field(
        DEFAULT_RISK, gt=0, lt=1, description="certified: P(stopping early costs a right answer) at most."
    )
    wave: int = Field(4, ge=1, le=64, description="Paths launched together, where the policy works in waves.")
    certainty: float = Field(0.95, gt=0.5, lt=1, description="adaptive_consistency: stop at this certainty.")
    window: int = Field(5, ge=1, description="esc: paths in a window.")
    warm_up: int = Field(8, ge=1, description="deepconf_online: paths that set the threshold.")
    keep: float = Field(0.9, gt=0, le=1, description="deepconf: part of the paths that is confident enough.")
    group_tokens: int = Field(16, ge=1, description="deepconf: tokens in a group.")
    metis: MetisPolicyConfig = Field(default_factory=MetisPolicyConfig)
    stub_tokens: int = Field(
        0, ge=0, le=256, description="A pruned path is asked for its answer in so many tokens; 0 drops it."
    )
    timeout_seconds: float = Field(600.0, gt=0)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.policy == "certified" and self.profile is None:
            raise ValueError("policy 'certified' needs a profile: make one with `sparkray search calibrate`")
        if self.temperature_spread / 2 >= self.temperature:
            raise ValueError(
                f"temperature_spread {self.temperature_spread:g} reaches temperature 0 from {self.temperature:g}"
            )
        return self


class IterativeConfig(Settings):
    """The rounds of an iterative search. A later round forks the calmest paths of the rounds before it."""

    rounds: int = Field(3, ge=1, le=16)
    shrink: tuple[float, ...] = Field((0.25, 0.1), description="Paths of each later round, in parts of the first.")
    min_paths: tuple[int, ...] = Field((4, 2), description="Paths of each later round at least.")
    cooling: tuple[float, ...] = Field((0.7, 0.4), description="Temperatures of the later rounds, in parts of it.")
    survivors: int = Field(2, ge=1, description="Paths that are forked; their forks take turns.")

    @model_validator(mode="after")
    def _covers_rounds(self) -> Self:
        for name in ("shrink", "min_paths", "cooling"):
            values = getattr(self, name)
            if len(values) < self.rounds - 1 or any(value <= 0 for value in values):
                raise ValueError(
                    f"{name} is {values}, and {self.rounds - 1} numbers above 0 are expected for {self.rounds} rounds"
                )
        return self


class RecordConfig(Settings):
    """What `sparkray search record` records."""

    model: str = Field("embedded", min_length=1)
    tasks: tuple[str, ...] = Field(
        ("chain_sum", "products", "letter_counting", "gcd"), description="Names of tasks; none means all packaged ones."
    )
    num_calibration: int = Field(100, ge=0, le=100, description="Questions a task in the calibration split.")
    num_held_out: int = Field(100, ge=0, le=100, description="Questions a task in the held-out split.")
    num_paths: int = Field(32, ge=1, le=1024)
    temperature: float = Field(0.7, gt=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    max_tokens: int = Field(64, ge=1)
    max_running: int = Field(160, ge=1, le=4096, description="Paths in flight.")
