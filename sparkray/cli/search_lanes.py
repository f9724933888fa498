"""A running search in the terminal: one lane a path, entropy as colour, votes as bars."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

_WIDTH = 48
_BAR = 24
_CALM, _MIDDLING, _UNSURE = "green", "yellow", "red"
_MARKS = {"stop": "done", "length": "cut", "pruned": "pruned", "closed": "aborted"}


@dataclass(slots=True)
class _Shown:
    entropies: list[float | None] = field(default_factory=list)
    state: str = "running"
    answer: str | None = None


class SearchLanes:
    """Shows the events of one search (as dictionaries) while they come.

    On a terminal the picture changes in place; elsewhere only `finish` prints.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lanes: dict[int, _Shown] = {}
        self._votes: list[tuple[str, float]] = []
        self._live = Live(console=console, refresh_per_second=8, transient=True) if console.is_terminal else None

    def __enter__(self) -> SearchLanes:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def take(self, event: Mapping[str, Any]) -> None:
        """One event."""
        match event["kind"]:
            case "wave":
                for index in event["paths"]:
                    self._lanes[index] = _Shown()
            case "tokens":
                self._lanes[event["path"]].entropies.extend(event["entropies"])
            case "prune":
                self._lanes[event["path"]].state = "pruned"
            case "vote":
                lane = self._lanes[event["path"]]
                lane.answer = event["answer"]
                lane.state = "asked" if event["forced"] else "done"
                self._votes = [(str(answer), float(weight)) for answer, weight in event["votes"]]
            case "done":
                for path in event["report"]["paths"]:
                    self._lanes[path["index"]].state = _MARKS.get(path["finish_reason"], path["finish_reason"])
        if self._live is not None:
            self._live.update(self._picture())

    def finish(self, report: Mapping[str, Any]) -> None:
        """Print the outcome."""
        self._console.print(self._picture())
        share = f" ({report['share']:.0%} of the votes)" if report["answer"] is not None else ""
        self._console.print(Text.assemble(("answer  ", "bold"), f"{report['answer']}{share}"))
        self._console.print(
            f"{report['num_paths']} of {report['max_paths']} paths, {report['num_pruned']} pruned, "
            f"{report['num_aborted']} aborted, {report['num_tokens']} tokens, {report['seconds']:.1f} s, "
            f"closed by {report['closed_by'] or 'the last path'} ({report['policy']})"
        )
        if report["note"]:
            self._console.print(Text(f"note: {report['note']}", style="yellow"))

    def _picture(self) -> RenderableType:
        lines = [_lane_line(index, lane) for index, lane in sorted(self._lanes.items())]
        heaviest = max((weight for _, weight in self._votes), default=0.0) or 1.0
        for answer, weight in self._votes[:6]:
            bar = "█" * max(1, round(_BAR * weight / heaviest))
            lines.append(Text(f"{answer[:20]:>20} {bar} {weight:.2f}", style="bold" if weight == heaviest else ""))
        return Group(*lines)


def _lane_line(index: int, lane: _Shown) -> Text:
    line = Text(f"{index:>3} ")
    for entropy in lane.entropies[-_WIDTH:]:
        line.append("▪", style=_colour(entropy))
    line.append(" " * (_WIDTH - min(_WIDTH, len(lane.entropies))))
    line.append(f" {len(lane.entropies):>4} {lane.state:8}")
    if lane.answer is not None:
        line.append(f" {lane.answer[:24]}", style="bold")
    if lane.state in ("pruned", "aborted"):
        line.stylize("dim")
    return line


def _colour(entropy: float | None) -> str:
    if entropy is None:
        return "dim"
    return _CALM if entropy < 1.0 else _MIDDLING if entropy < 3.0 else _UNSURE
