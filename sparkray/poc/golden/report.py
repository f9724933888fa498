"""What was compared in one section, what differed, and by how much."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Status = Literal["matched", "mismatched", "unknown", "nothing to compare"]
_MAX_LISTED = 20


@dataclass(frozen=True, slots=True)
class Tolerances:
    """Largest accepted differences of distances, from the file's `meta` where it has them.

    Attributes:
        exact_model: ours in float32 against a float32 or float64 model.
        fp16_small: against the original in float16, dim <= 128 and vocabulary <= 517.
        fp16_large: against the original in float16, larger models.
    """

    exact_model: float = 1e-6
    fp16_small: float = 3e-4
    fp16_large: float = 1e-4

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> Tolerances:
        """Read the numbers beside the descriptions that `meta.tolerances` uses as keys."""
        found: dict[str, float] = {}
        for description, value in meta.get("tolerances", {}).items():
            if not isinstance(value, int | float):
                continue
            if "fp32/fp64" in description:
                found["exact_model"] = float(value)
            elif "dim<=" in description:
                found["fp16_small"] = float(value)
            elif "V1" in description:
                found["fp16_large"] = float(value)
        return cls(**found)


@dataclass(slots=True)
class SectionReport:
    """Counts and findings of one section.

    Attributes:
        worst_error: largest difference of any number that was compared within a tolerance.
        findings: the first mismatches, as sentences.
        notes: what was assumed or left out.
    """

    name: str
    num_matched: int = 0
    num_mismatched: int = 0
    worst_error: float = 0.0
    worst_where: str = ""
    findings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    known: bool = True

    @property
    def status(self) -> Status:
        if not self.known:
            return "unknown"
        if self.num_mismatched:
            return "mismatched"
        return "matched" if self.num_matched else "nothing to compare"

    def equal(self, where: str, computed: object, expected: object) -> None:
        """Compare values that must be the same."""
        if computed == expected:
            self.num_matched += 1
        else:
            self.differs(where, f"computed {_short(computed)}, expected {_short(expected)}")

    def close(self, where: str, computed: Any, expected: Any, tolerance: float) -> None:
        """Compare numbers, or lists of them, within an absolute tolerance."""
        ours, theirs = np.asarray(computed, dtype=np.float64), np.asarray(expected, dtype=np.float64)
        if ours.shape != theirs.shape:
            self.differs(where, f"computed {ours.size} numbers, expected {theirs.size}")
            return
        error = float(np.max(np.abs(ours - theirs), initial=0.0))
        if not error <= self.worst_error:
            self.worst_error, self.worst_where = error, where
        # Written so that a NaN on either side is a mismatch.
        if error <= tolerance:
            self.num_matched += max(1, ours.size)
        else:
            self.differs(where, f"off by {error:.3e}, accepted is {tolerance:.1e}")

    def digest(self, where: str, array: npt.NDArray[Any], expected: str) -> None:
        """Compare the SHA-256 of an array's bytes."""
        self.equal(where, sha256(array), expected)

    def differs(self, where: str, what: str) -> None:
        """Record a mismatch."""
        self.num_mismatched += 1
        if len(self.findings) < _MAX_LISTED:
            self.findings.append(f"{where}: {what}")

    def summary(self) -> str:
        """Lines for a person."""
        line = f"{self.name}: {self.status}, {self.num_matched} values"
        if self.num_mismatched:
            line += f" matched, {self.num_mismatched} differ"
        line += f", worst error {self.worst_error:.2e}"
        if self.worst_where:
            line += f" at {self.worst_where}"
        return "\n".join(
            [line, *(f"  differs: {each}" for each in self.findings), *(f"  note: {each}" for each in self.notes)]
        )

    def to_json(self) -> dict[str, Any]:
        """The section as JSON; an error that is not a number becomes null."""
        return {
            "status": self.status,
            "num_matched": self.num_matched,
            "num_mismatched": self.num_mismatched,
            "worst_error": self.worst_error if np.isfinite(self.worst_error) else None,
            "worst_where": self.worst_where,
            "findings": self.findings,
            "notes": self.notes,
        }


def sha256(array: npt.NDArray[Any]) -> str:
    """Hex SHA-256 of an array's little-endian bytes."""
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def _short(value: object) -> str:
    text = repr(value)
    if isinstance(value, Sequence) and len(text) > 120:
        return text[:117] + "..."
    return text
