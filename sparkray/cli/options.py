"""Options that many verbs share, and the one place where verbs read settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from pydantic import BaseModel

ConfigFiles = Annotated[
    list[Path] | None, typer.Option("--config", help="Settings file, TOML or YAML; several merge in order.")
]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="One setting, as engine.max_num_seqs=8.")]
JsonFlag = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, everything else on stderr.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done and do nothing.")]
SessionName = Annotated[str, typer.Option("--name", help="Name of the session.")]

ModelT = TypeVar("ModelT", bound="BaseModel")


def read_settings(
    kind: type[ModelT],
    files: Sequence[Path] | None,
    overrides: Sequence[str] | None,
    flags: Mapping[str, Any] | None = None,
) -> ModelT:
    """Settings from files, then flags that were given, then `--set`."""
    from sparkray.config.base import load_settings

    given = {key: value for key, value in (flags or {}).items() if value is not None}
    return load_settings(kind, files or (), overrides or (), given)
