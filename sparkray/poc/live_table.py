"""A table of all groups that is drawn anew as they report; on something that is no terminal, nothing is drawn."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from rich.live import Live
from rich.table import Table

from sparkray.telemetry.console import stderr_console

_MAX_ROWS = 48


class Rates:
    """Nonces a minute of each group between two looks."""

    def __init__(self) -> None:
        self._last: tuple[float, list[int]] | None = None

    def update(self, cursors: list[int], now: float) -> list[float]:
        """Rates since the last look; zeros at the first one, or where the groups changed."""
        last, self._last = self._last, (now, cursors)
        if last is None or len(last[1]) != len(cursors) or now <= last[0]:
            return [0.0] * len(cursors)
        return [60 * max(0, new - old) / (now - last[0]) for new, old in zip(cursors, last[1], strict=True)]


def build_table(status: dict[str, Any], rates: list[float]) -> Table:
    """One row a group, what concerns all of them below."""
    title = f"{status['num_loaded']} of {status['num_groups']} groups, phase generation {status['generation']}"
    caption = (
        f"recorded {status['num_recorded']:,}, valid {status['num_valid']:,} (z {status['share_z_score']:+.1f}"
        f"{', ALARM' if status['share_alarm'] else ''}), {sum(rates):,.0f} a minute, restarts {status['num_restarts']},"
        f" to send {status.get('num_unsent', 0)}, to validate {status['num_batches_waiting']}"
    )
    table = Table("group", "nonces", "a minute", "last failure", title=title, caption=caption)
    for group_id, (cursor, rate) in list(enumerate(zip(status["cursors"], rates, strict=True)))[:_MAX_ROWS]:
        table.add_row(str(group_id), f"{cursor:,}", f"{rate:,.0f}", status["last_failures"].get(str(group_id), ""))
    return table


class LiveTable:
    """Shows status after status on stderr.

    Args:
        quiet: show nothing.
        clock: of the rates.
    """

    def __init__(self, *, quiet: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        console = stderr_console()
        self._shown = console.is_terminal and not quiet
        self._live = Live(console=console, auto_refresh=False)
        self._rates = Rates()
        self._clock = clock

    def __enter__(self) -> Self:
        if self._shown:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def show(self, status: dict[str, Any]) -> None:
        """Draw this one; its keys are those of a controller's summary."""
        rates = self._rates.update(status["cursors"], self._clock())
        if self._shown:
            self._live.update(build_table(status, rates), refresh=True)
