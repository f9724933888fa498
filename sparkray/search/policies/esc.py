"""Early-stopping self-consistency: windows of paths, until one window agrees (Li et al., arXiv 2401.10480)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparkray.search.paths import Lane
from sparkray.search.policies.base import CONTINUE, MajorityRun, StepDecision


@dataclass(frozen=True, slots=True)
class EarlyStopping:
    """Stops after the first window of `window` paths that all give one answer."""

    window: int = 5
    name: str = "esc"

    def start(self, max_paths: int) -> _Run:
        return _Run(self, max_paths)


class _Run(MajorityRun):
    def __init__(self, policy: EarlyStopping, max_paths: int) -> None:
        super().__init__(max_paths)
        self._window = policy.window

    def next_wave(self, lanes: Sequence[Lane]) -> int:
        return min(self._window, self.max_paths - len(lanes))

    def after_step(self, lanes: Sequence[Lane]) -> StepDecision:
        newest = [lane for lane in lanes if lane.wave == lanes[-1].wave]
        if len(newest) < self._window or any(lane.running for lane in newest):
            return CONTINUE
        keys = {lane.answer.key if lane.answer else None for lane in newest}
        return StepDecision(close="window") if len(keys) == 1 and None not in keys else CONTINUE
