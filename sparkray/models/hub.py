"""The hub and its local cache, through huggingface_hub; without that package the cache is empty."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from sparkray.errors import MissingExtraError, NotFoundError, UnavailableError

# What an engine or a trainer reads; other weight formats of the same repository would double the download.
_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.py")


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE switches the hub off."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def hub_cache() -> Path:
    """The folder of huggingface_hub's cache: HF_HUB_CACHE, or `hub` under HF_HOME."""
    if chosen := os.environ.get("HF_HUB_CACHE"):
        return Path(chosen).expanduser()
    default_home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "huggingface"
    return Path(os.environ.get("HF_HOME") or default_home).expanduser() / "hub"


def cached_hub_ids() -> list[str]:
    """Hub ids of the models in the local cache, sorted."""
    folders = sorted(hub_cache().glob("models--*--*"))
    return [folder.name.removeprefix("models--").replace("--", "/", 1) for folder in folders]


def cached_snapshot(hub_id: str) -> Path | None:
    """The newest snapshot of a model in the local cache that holds a config.json, or None."""
    snapshots = hub_cache() / f"models--{hub_id.replace('/', '--')}" / "snapshots"
    found = [folder.parent for folder in snapshots.glob("*/config.json")]
    return max(found, key=lambda folder: folder.stat().st_mtime, default=None)


def download_snapshot(hub_id: str) -> Path:
    """The folder of a hub model, fetched if the hub is on, else from the local cache.

    Raises:
        NotFoundError: the hub has no such model, or it asks for a permission that is not given.
        UnavailableError: the hub does not answer and the cache does not hold the model.
        MissingExtraError: huggingface_hub is not installed.
    """
    if find_spec("huggingface_hub") is None:
        raise MissingExtraError.for_module("huggingface_hub", "cpu")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        folder = snapshot_download(
            hub_id, allow_patterns=list(_FILES), cache_dir=hub_cache(), local_files_only=is_offline()
        )
        return Path(folder)
    except RepositoryNotFoundError as failure:
        raise NotFoundError(
            f"the hub has no model {hub_id!r}, or it is gated and no permission was given.",
            hint="Check the spelling; for a gated model accept its licence and set HF_TOKEN.",
            param="model",
        ) from failure
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as failure:
        raise UnavailableError(
            f"model {hub_id!r} could not be fetched from the hub: {failure}.",
            hint="Check the network, or give a local directory or 'embedded'.",
            param="model",
        ) from failure
