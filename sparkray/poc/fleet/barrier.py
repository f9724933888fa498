"""A phase change and who has acknowledged it."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from sparkray.poc.fleet.messages import Ack
from sparkray.poc.phases import Phase


@dataclass(slots=True)
class Barrier:
    """Opens when every worker that is expected has acknowledged this generation, or is gone.

    Attributes:
        ordered_at: when the phase was ordered, on the caller's clock.
        opened_at: when the last word came; None while some are missing.
        opened: set at the same moment.
    """

    phase: Phase
    generation: int
    ordered_at: float
    opened_at: float | None = None
    opened: threading.Event = field(default_factory=threading.Event)
    num_acknowledged: int = 0
    _missing: set[int] = field(default_factory=set)

    @property
    def missing(self) -> tuple[int, ...]:
        """Groups that have not answered."""
        return tuple(sorted(self._missing))

    def expect(self, group_id: int) -> None:
        """The barrier stays closed until this group has answered."""
        self._missing.add(group_id)

    def acknowledge(self, ack: Ack, now: float) -> None:
        """A group's word; one of another generation is not for this barrier."""
        if ack.generation == self.generation:
            self.num_acknowledged += ack.group_id in self._missing
            self.leave(ack.group_id, now)

    def leave(self, group_id: int, now: float) -> None:
        """A group is gone: its successor starts in this phase."""
        self._missing.discard(group_id)
        self.update(now)

    def update(self, now: float) -> None:
        """Open where nobody is missing."""
        if not self._missing and self.opened_at is None:
            self.opened_at = now
            self.opened.set()
