"""Progress of a long run on stderr: a bar on a terminal, else a line now and then, as in the log of a job."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from sparkray.telemetry.console import progress_bar

_SECONDS_BETWEEN_LINES = 5.0
_WIDTH = 24


class RunProgress:
    """Counts done of all; `update` may be called for every item.

    Args:
        what: what is counted, as "prompts".
        quiet: show nothing.
    """

    def __init__(self, what: str, *, quiet: bool = False) -> None:
        self._what = what
        self._quiet = quiet
        self._bar = progress_bar(disable=quiet)
        self._task = self._bar.add_task(what, total=None)
        self._last_line = float("-inf")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, done: int, total: int) -> None:
        """`done` of `total` are finished."""
        self._bar.update(self._task, completed=done, total=total)
        if self._quiet or self._bar.console.is_terminal:
            return
        now = time.monotonic()
        if done == total or now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            filled = _WIDTH * done // total
            sys.stderr.write(f"[{'#' * filled}{'.' * (_WIDTH - filled)}] {done}/{total} {self._what}\n")
            sys.stderr.flush()
