"""Serve builder of proof of compute: `serve deploy serve_apps/poc.yaml`, or `serve run serve_apps.poc:build`."""

from __future__ import annotations

from typing import Any

from ray.serve.deployment import Application

from sparkray.config.base import validate_settings
from sparkray.config.poc import PocServiceConfig
from sparkray.poc.deployment import build_app


def build(args: dict[str, Any]) -> Application:
    """The application for `args`, the settings of PocServiceConfig."""
    return build_app(validate_settings(PocServiceConfig, args))
