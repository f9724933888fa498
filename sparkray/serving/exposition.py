"""Joining the Prometheus expositions of several replicas into one page, each sample marked by its replica."""

from __future__ import annotations

from collections.abc import Mapping


def merge_expositions(pages: Mapping[str, str]) -> str:
    """One exposition from one a replica.

    Args:
        pages: replica id -> Prometheus text format 0.0.4.

    Returns:
        The same families, each HELP and TYPE once, every sample with a label `replica`.
    """
    headers: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for replica, page in pages.items():
        family = ""
        for line in page.splitlines():
            if line.startswith(("# HELP ", "# TYPE ")):
                family = line.split(" ", 3)[2]
                lines = headers.setdefault(family, [])
                # A family says HELP and TYPE once, whoever exposes it.
                if not any(old.split(" ", 3)[1] == line.split(" ", 3)[1] for old in lines):
                    lines.append(line)
            elif line and not line.startswith("#"):
                samples.setdefault(family, []).append(_labelled(line, replica))
    parts = [line for family in samples for line in (*headers.get(family, ()), *samples[family])]
    return "\n".join(parts) + "\n" if parts else ""


def _labelled(sample: str, replica: str) -> str:
    name, brace, rest = sample.partition("{")
    if brace:
        return f'{name}{{replica="{replica}",{rest}'
    name, _, value = sample.partition(" ")
    return f'{name}{{replica="{replica}"}} {value}'
