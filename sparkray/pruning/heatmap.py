"""A picture of a plan: the saliency of every expert of every layer, and which of them are cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sparkray.errors import MissingExtraError
from sparkray.pruning.plan import PrunePlan
from sparkray.pruning.statistics import Array

_CELL_INCHES = 0.16
_MARGIN_INCHES = 1.6
_MAX_INCHES = 40.0


def relative_scores(plan: PrunePlan) -> Array:
    """[layers, experts]: scores as shares of their layer's largest, so that layers can be compared by eye."""
    scores = np.array([plan.scores[layer] for layer in plan.scores], dtype=np.float64)
    largest = scores.max(axis=1, keepdims=True)
    shares: Array = scores / np.where(largest > 0, largest, 1.0)
    return shares


def write_heatmap(plan: PrunePlan, path: Path) -> None:
    """Write the picture as PNG; a cross marks an expert that is cut.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as failure:
        raise MissingExtraError.for_module("matplotlib", "search") from failure
    shares = relative_scores(plan)
    num_layers, num_experts = shares.shape
    width = min(_MAX_INCHES, num_experts * _CELL_INCHES + 2 * _MARGIN_INCHES)
    height = min(_MAX_INCHES, num_layers * _CELL_INCHES + _MARGIN_INCHES)
    figure = Figure(figsize=(max(width, 5.0), max(height, 2.5)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, aspect="auto", cmap="viridis", vmin=0.0, vmax=1.0, interpolation="nearest")
    cut = [
        (expert, row)
        for row, layer in enumerate(plan.scores)
        for expert in range(num_experts)
        if expert not in plan.kept[layer]
    ]
    columns, rows = zip(*cut, strict=True)
    # Dark under light, so that a cross is seen on every colour.
    axes.scatter(columns, rows, marker="x", s=18, linewidths=1.8, color="black")
    axes.scatter(columns, rows, marker="x", s=12, linewidths=0.8, color="white")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.set_yticks(range(num_layers), list(plan.scores), fontsize=6)
    axes.set_title(
        f"{plan.family}: {plan.criterion}, {plan.num_experts_before} to {plan.num_experts_after} experts (x: cut)",
        fontsize=8,
    )
    figure.colorbar(image, ax=axes, label=f"{plan.criterion}, share of the layer's largest")
    temporary = path.with_name(f".{path.name}.tmp")
    FigureCanvasAgg(figure)
    figure.savefig(temporary, format="png")
    temporary.replace(path)
