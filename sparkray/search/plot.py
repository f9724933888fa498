"""A picture of accuracy against tokens, one point with its interval for each policy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sparkray.errors import MissingExtraError
from sparkray.search.evaluate import PolicyFigures

_OURS = "#0b6e4f"
_OTHERS = "#5b6472"
_STEP = 0.02


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
    figure = Figure(figsize=(8, 5), dpi=140, layout="constrained")
    axes = figure.add_subplot()
    labelled: list[tuple[float, float]] = []
    for name, found in sorted(figures.items(), key=lambda item: item[1].tokens):
        ours = name == "ours"
        below, above = found.accuracy - found.interval[0], found.interval[1] - found.accuracy
        axes.errorbar(
            found.tokens,
            100 * found.accuracy,
            yerr=[[100 * below], [100 * above]],
            fmt="D" if ours else "o",
            color=_OURS if ours else _OTHERS,
            markersize=9 if ours else 6,
            elinewidth=1,
            capsize=3,
            alpha=1.0 if ours else 0.8,
        )
        axes.annotate(
            name.replace("_", " "),
            (found.tokens, 100 * found.accuracy),
            xytext=(8, _label_offset(found, labelled, figures)),
            textcoords="offset points",
            color=_OURS if ours else "#2b303a",
            weight="bold" if ours else "normal",
            fontsize=9,
        )
        labelled.append((found.tokens, found.accuracy))
    axes.set_xlabel("tokens for one question (all paths)")
    axes.set_ylabel("questions answered right, %")
    axes.set_title(title, fontsize=10)
    axes.set_xlim(left=0, right=1.22 * max(found.tokens for found in figures.values()))
    axes.grid(alpha=0.25)
    into.parent.mkdir(parents=True, exist_ok=True)
    temporary = into.with_name(into.name + ".tmp")
    figure.savefig(temporary, format="png")
    temporary.replace(into)


def _label_offset(
    found: PolicyFigures, labelled: list[tuple[float, float]], figures: Mapping[str, PolicyFigures]
) -> float:
    """Points to move a label up or down by, so that it does not lie on that of a neighbour."""
    widest = max(other.tokens for other in figures.values())
    crowd = sum(
        abs(tokens - found.tokens) < 0.2 * widest and abs(accuracy - found.accuracy) < _STEP
        for tokens, accuracy in labelled
    )
    return 6.0 if crowd == 0 else (-14.0 if crowd == 1 else 6.0 + 12.0 * (crowd - 1))
