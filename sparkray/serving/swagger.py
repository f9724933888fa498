"""Where the files of the API page are, so that it works without a network."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path


def swagger_folder() -> Path | None:
    """The folder of Swagger UI's script and style that vLLM ships, found without importing vLLM."""
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "entrypoints" / "serve" / "instrumentator" / "static"
    return folder if (folder / "swagger-ui-bundle.js").exists() else None
