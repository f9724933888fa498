"""The page at `/`: plain HTML, CSS and JavaScript, served as they are."""

from __future__ import annotations

from pathlib import Path


def page_folder() -> Path:
    """The folder of the page's files."""
    return Path(__file__).parent / "static"
