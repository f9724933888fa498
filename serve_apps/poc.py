"""Serve builder of proof of compute: `serve deploy serve_apps/poc.yaml`, or `serve run serve_apps.poc:build`."""

from ray.serve.deployment import Application

from sparkray.config.poc import PocServiceConfig
from sparkray.poc.deployment import build_app


def build(args: PocServiceConfig) -> Application:
    """The application for `args`; Serve parses them by this annotation, which must be the class, not its name."""
    return build_app(args)
