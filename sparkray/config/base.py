"""Reading settings: files merged in order, then single values, then validation with errors a user can act on."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from sparkray.errors import UsageError


class Settings(BaseModel):
    """Base of all settings: frozen, unknown keys refused, NaN and infinity refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


SettingsT = TypeVar("SettingsT", bound=BaseModel)


def load_settings(
    kind: type[SettingsT],
    files: Iterable[Path] = (),
    overrides: Iterable[str] = (),
    values: Mapping[str, Any] | None = None,
) -> SettingsT:
    """Build `kind` from TOML or YAML files, then `values`, then `a.b=1` overrides; later ones win.

    Raises:
        UsageError: a file that cannot be read or parsed, an override without `=`, or a value that the
            settings refuse; the message names the key, the value and what is accepted.
    """
    merged: dict[str, Any] = {}
    for path in files:
        merged = _merge(merged, _read(path))
    merged = _merge(merged, dict(values or {}))
    for override in overrides:
        merged = _merge(merged, _parse_override(override))
    return validate_settings(kind, merged)


def validate_settings(kind: type[SettingsT], values: Mapping[str, Any]) -> SettingsT:
    """`kind(**values)`, with pydantic's findings as one UsageError."""
    try:
        return kind.model_validate(dict(values))
    except ValidationError as failure:
        raise UsageError(_explain(kind, failure), hint=_accepted(kind, failure)) from failure


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as failure:
        raise UsageError(f"settings file {path} cannot be read: {failure.strerror}.") from failure
    try:
        data = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except (tomllib.TOMLDecodeError, yaml.YAMLError) as failure:
        raise UsageError(f"settings file {path} is not valid {path.suffix[1:] or 'YAML'}: {failure}.") from failure
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UsageError(f"settings file {path} holds a {type(data).__name__}, and a table of keys is expected.")
    return data


def _parse_override(override: str) -> dict[str, Any]:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise UsageError(f"--set {override!r} was given, and KEY=VALUE is expected: --set engine.max_num_seqs=32.")
    parts = key.strip().split(".")
    value = yaml.safe_load(text) if text else ""
    # A hash such as 0xabc123 is a number to YAML, and the number has forgotten how it was written.
    if isinstance(value, int) and not isinstance(value, bool) and str(value) != text.strip():
        value = text.strip()
    nested: dict[str, Any] = {parts[-1]: value}
    for part in reversed(parts[:-1]):
        nested = {part: nested}
    return nested


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return merged


def _explain(kind: type[BaseModel], failure: ValidationError) -> str:
    lines = []
    for finding in failure.errors():
        key = ".".join(str(part) for part in finding["loc"]) or kind.__name__
        given = "" if finding["type"] == "missing" else f" (given: {finding['input']!r})"
        lines.append(f"{key}: {finding['msg']}{given}")
    return "the settings were refused: " + "; ".join(lines) + "."


def _accepted(kind: type[BaseModel], failure: ValidationError) -> str | None:
    if any(finding["type"] == "extra_forbidden" for finding in failure.errors()):
        return f"{kind.__name__} has the keys {', '.join(kind.model_fields)}."
    return None
