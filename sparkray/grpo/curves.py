"""What a finished run shows: a picture of its curves and a page that holds all of it."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparkray.errors import MissingExtraError

CURVES_NAME, REPORT_NAME = "curves.png", "report.html"
_COLLAPSE_SHARE = 0.5

_PANELS = (
    ("Reward", ("reward", "eval_reward")),
    ("Entropy of the policy, nats", ("entropy_nats",)),
    ("Gap between trainer and engine", ("gap_mean", "canary_gap_max")),
    ("Completion tokens", ("completion_tokens",)),
    ("Groups without a signal, share", ("zero_variance_share",)),
    ("Tokens trained a second", ("tokens_per_second",)),
)

Log = Sequence[Mapping[str, Any]]


def entropy_collapse(rows: Log) -> dict[str, Any]:
    """Whether the policy's entropy fell by more than half: mean of the last fifth of steps over the first.

    A reward that sees only how sure the model is can be raised by being sure of anything; this is what it looks like.
    """
    known = [row["entropy_nats"] for row in rows if row.get("entropy_nats") is not None and row.get("num_tokens")]
    if len(known) < 2:
        return {"entropy_first": None, "entropy_last": None, "entropy_ratio": None, "entropy_collapsed": False}
    width = max(1, len(known) // 5)
    first, last = sum(known[:width]) / width, sum(known[-width:]) / width
    ratio = last / first if first > 0 else 1.0
    return {
        "entropy_first": first,
        "entropy_last": last,
        "entropy_ratio": ratio,
        "entropy_collapsed": ratio < _COLLAPSE_SHARE,
    }


def draw_curves(rows: Log, into: Path) -> Path:
    """The curves of a run as a PNG.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as failure:
        raise MissingExtraError.for_module("matplotlib", "search") from failure

    figure = Figure(figsize=(12, 6), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (title, names) in enumerate(_PANELS, start=1):
        axes = figure.add_subplot(2, 3, place)
        for name in names:
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 40 else None)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if len(names) > 1:
            axes.legend(fontsize=8)
    draft = into.with_suffix(".tmp.png")
    figure.savefig(draft, dpi=110)
    draft.replace(into)
    return into


def write_report(rows: Log, settings: Mapping[str, Any], summary: Mapping[str, Any], run_dir: Path) -> Path:
    """One page without any other file: the curves, the summary, the settings and the last steps."""
    picture = base64.b64encode(draw_curves(rows, run_dir / CURVES_NAME).read_bytes()).decode()
    columns = ("step", "reward", "eval_reward", "entropy_nats", "completion_tokens", "gap_mean", "zero_variance_share")
    head = "".join(f"<th>{name}</th>" for name in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{_shown(row.get(name))}</td>" for name in columns) + "</tr>" for row in rows[-40:]
    )
    facts = "".join(f"<tr><th>{html.escape(str(k))}</th><td>{_shown(v)}</td></tr>" for k, v in summary.items())
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(str(settings["run_name"]))}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; font-size: 13px; }}
th, td {{ padding: .2rem .7rem; border-bottom: 1px solid #ddd; text-align: left; }}
img {{ max-width: 100%; }} pre {{ background: #f5f5f5; padding: 1rem; overflow: auto; font-size: 12px; }}
</style></head><body>
<h1>Training run {html.escape(str(settings["run_name"]))}</h1>
<table>{facts}</table>
<img alt="Curves of the run" src="data:image/png;base64,{picture}">
<h2>Last steps</h2><table><tr>{head}</tr>{body}</table>
<h2>Settings</h2><pre>{html.escape(json.dumps(settings, indent=2))}</pre>
</body></html>
"""
    path = run_dir / REPORT_NAME
    draft = path.with_suffix(".tmp")
    draft.write_text(page, encoding="utf-8")
    draft.replace(path)
    return path


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else html.escape(str(value))
