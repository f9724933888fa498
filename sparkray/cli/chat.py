"""`sparkray chat`."""

from __future__ import annotations


def chat() -> None:
    """."""
