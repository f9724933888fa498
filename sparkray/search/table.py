"""An evaluation as lines of text."""

from __future__ import annotations

from sparkray.search.suite import Comparison

_HEAD = (
    f"{'policy':21} {'right':>6} {'95 %':>15} {'against full':>22} {'tokens':>7} {'saved':>7} {'paths':>6} {'steps':>6}"
)


def comparison_table(compared: Comparison) -> str:
    """One line a policy, fewest tokens first, then the rates of false pruning."""
    lines = [f"{compared.num_questions} questions, {compared.num_paths} paths each: {', '.join(compared.tasks)}", _HEAD]
    for name, found in sorted(compared.figures.items(), key=lambda item: item[1].tokens):
        low, high = found.accuracy_delta_interval
        lines.append(
            f"{name:21} {found.accuracy:6.1%} {_interval(found.interval):>15} "
            f"{found.accuracy_delta:+7.1%} ({low:+.1%}, {high:+.1%}) {found.tokens:7.1f} {found.tokens_saved:7.1%} "
            f"{found.paths:6.1f} {found.steps:6.1f}"
        )
    lines.extend(
        f"right paths pruned at alpha {rule.alpha:g}: {rule.rate:.1%} {_interval(rule.interval)}, "
        f"{rule.num_pruned} of {rule.num_right}"
        for rule in compared.false_pruning
    )
    return "\n".join(lines)


def _interval(bounds: tuple[float, float]) -> str:
    return f"({bounds[0]:.1%}, {bounds[1]:.1%})"
