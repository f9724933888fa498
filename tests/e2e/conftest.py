"""One engine for all tests of this folder that need no settings of their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from live_engine import LiveEngine


@pytest.fixture(scope="session")
def embedded_path() -> str:
    """The embedded model, made ready."""
    from sparkray.models import EMBEDDED, prepare_model

    return str(prepare_model(EMBEDDED))


@pytest.fixture(scope="session")
def engine(embedded_path: str) -> Iterator[LiveEngine]:
    """The embedded model in bfloat16, on an engine that is short of everything (see `live_engine`)."""
    pytest.importorskip("vllm")
    from live_engine import live_engine

    with live_engine(embedded_path, "bfloat16") as live:
        yield live
