"""How a watched reply looks in a terminal: tokens coloured by entropy, a CUSUM bar at the side, a report at the end."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

HEDGE_THRESHOLD = 4.0
BAR_WIDTH = 16

# Upper edge in bits -> style. Under half a bit the next token is nearly certain; above four the model is guessing.
_ENTROPY_STYLES = ((0.5, "green"), (1.5, "cyan"), (2.5, "yellow"), (4.0, "dark_orange"), (float("inf"), "bold red"))
_ACTION_STYLES = {"generate": "dim", "hedge": "bold yellow", "refuse": "bold red"}
_BLOCKS = " ▁▂▃▄▅▆▇█"


def entropy_style(entropy: float | None) -> str:
    """The colour of a token of that entropy, in bits."""
    if entropy is None:
        return "dim"
    return next(style for edge, style in _ENTROPY_STYLES if entropy <= edge)


def cusum_bar(statistic: float | None, threshold: float = HEDGE_THRESHOLD, width: int = BAR_WIDTH) -> str:
    """The statistic as a bar that is full at the threshold."""
    share = 0.0 if statistic is None else min(1.0, max(0.0, statistic / threshold))
    filled = round(share * width)
    return "█" * filled + "░" * (width - filled)


def sparkline(entropies: Sequence[float | None], width: int = 60, ceiling: float = 6.0) -> str:
    """Entropies as a line of blocks, at most `width` of them, each the highest of its stretch."""
    values = [value or 0.0 for value in entropies]
    if not values:
        return ""
    width = min(width, len(values))
    edges = [len(values) * i // width for i in range(width + 1)]
    peaks = [max(values[a:b]) for a, b in pairwise(edges)]
    return "".join(_BLOCKS[min(len(_BLOCKS) - 1, round(peak / ceiling * (len(_BLOCKS) - 1)))] for peak in peaks)


def reply_text(rows: Sequence[dict[str, Any]]) -> Text:
    """The tokens of a reply, each in the colour of its entropy, alarms underlined."""
    text = Text()
    for row in rows:
        style = entropy_style(row["entropy"])
        text.append(row["text"], style=style if row["action"] == "generate" else f"{style} underline")
    return text


def side_panel(row: dict[str, Any] | None) -> RenderableType:
    """The state at the latest token."""
    table = Table.grid(padding=(0, 1))
    if row is None:
        table.add_row("waiting for the first token")
        return table
    table.add_row("step", str(row["step"]))
    table.add_row("H", Text(_number(row["entropy"], " bits"), style=entropy_style(row["entropy"])))
    table.add_row("z", _number(row["z"]))
    table.add_row("sure", _number(row["confidence"]))
    table.add_row("CUSUM", cusum_bar(row["hedge_statistic"]))
    table.add_row("says", Text(row["action"], style=_ACTION_STYLES[row["action"]]))
    return table


def live_view(rows: Sequence[dict[str, Any]]) -> RenderableType:
    """Reply at the left, state at the right."""
    grid = Table.grid(expand=True, padding=(0, 2))
    grid.add_column(ratio=1)
    grid.add_column(width=32)
    grid.add_row(reply_text(rows), side_panel(rows[-1] if rows else None))
    return grid


def report_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The report at the end of a reply, as plain lines."""
    known = [row for row in rows if row["entropy"] is not None]
    if not known:
        return ["no token was watched"]
    entropies = [row["entropy"] for row in known]
    most_unsure = max(known, key=lambda row: row["entropy"])
    return [
        f"tokens {len(rows)}   mean entropy {sum(entropies) / len(entropies):.2f} bits   "
        f"mean confidence {sum(row['confidence'] for row in known) / len(known):.2f}",
        f"hedges {_count(rows, 'hedge')}   refusals {_count(rows, 'refuse')}   "
        f"peak CUSUM {max(row['hedge_statistic'] or 0.0 for row in known):.2f}",
        f"least sure at {most_unsure['text']!r}: {most_unsure['entropy']:.2f} bits (step {most_unsure['step']})",
        f"entropy {sparkline(entropies)}",
    ]


def report(rows: Sequence[dict[str, Any]]) -> RenderableType:
    """The report as a panel."""
    return Panel(Group(*(Text(line) for line in report_lines(rows))), title="how sure", border_style="dim")


def _count(rows: Sequence[dict[str, Any]], action: str) -> int:
    return sum(row["action"] == action for row in rows)


def _number(value: float | None, unit: str = "") -> str:
    return "-" if value is None else f"{value:.2f}{unit}"
