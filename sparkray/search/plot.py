"""A picture of accuracy against tokens, one point with its interval for each policy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sparkray.errors import MissingExtraError
from sparkray.search.evaluate import PolicyFigures

_OURS = "#0b6e4f"
# By rising tokens, for up to nine other policies: points lie close, so that labels beside them would cover each other.
_MARKERS = "os^vPX*<>"
_COLOURS = ("#7a4fbf", "#c2571a", "#1f6fb2", "#a3315d", "#5b6472", "#8a7a00", "#2b303a", "#1d8a8a", "#9a6a4f")


def plot_accuracy(figures: Mapping[str, PolicyFigures], into: Path, title: str) -> None:
    """Write the picture as PNG, to a temporary file first.

    Args:
        figures: a line of the comparison for each policy.
        into: the file.
        title: what was compared on.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as failure:
        raise MissingExtraError.for_module("matplotlib", "search") from failure
    figure = Figure(figsize=(8, 6), dpi=140, layout="constrained")
    axes = figure.add_subplot()
    others = zip(_MARKERS, _COLOURS, strict=True)
    for name, found in sorted(figures.items(), key=lambda item: item[1].tokens):
        marker, colour = ("D", _OURS) if name == "ours" else next(others)
        below, above = found.accuracy - found.interval[0], found.interval[1] - found.accuracy
        axes.errorbar(
            found.tokens,
            100 * found.accuracy,
            yerr=[[100 * below], [100 * above]],
            fmt=marker,
            color=colour,
            markersize=9 if name == "ours" else 7,
            elinewidth=1,
            capsize=3,
            label=f"{name.replace('_', ' ')}: {100 * found.accuracy:.1f} %, {found.tokens:.0f} tokens",
        )
    axes.set_xlabel("tokens for one question (all paths)")
    axes.set_ylabel("questions answered right, %")
    axes.set_title(title, fontsize=10)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    into.parent.mkdir(parents=True, exist_ok=True)
    temporary = into.with_name(into.name + ".tmp")
    figure.savefig(temporary, format="png")
    temporary.replace(into)
