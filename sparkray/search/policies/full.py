"""Self-consistency: all paths to their end, majority vote (Wang et al., arXiv 2203.11171)."""

from __future__ import annotations

from dataclasses import dataclass

from sparkray.search.policies.base import MajorityRun


@dataclass(frozen=True, slots=True)
class Full:
    """The reference that the others are measured against."""

    name: str = "full"

    def start(self, max_paths: int) -> MajorityRun:
        return MajorityRun(max_paths)
