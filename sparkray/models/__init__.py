"""Finding a model: a local directory, a hub id, or the embedded one, made ready as a folder of safetensors."""

from sparkray.models.prepare import list_models, prepare_model, ready_path
from sparkray.models.source import EMBEDDED, ModelKind, ModelSource, resolve_model

__all__ = ["EMBEDDED", "ModelKind", "ModelSource", "list_models", "prepare_model", "ready_path", "resolve_model"]
