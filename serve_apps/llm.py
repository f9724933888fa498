"""Serve builder of one watched model: `serve deploy serve_apps/llm.yaml`, or `serve run serve_apps.llm:build`."""

from ray.serve.deployment import Application

from sparkray.config import ServeConfig
from sparkray.serving.deployment import build_app
from sparkray.serving.lifecycle import runs_on_cpu


def build(args: ServeConfig) -> Application:
    """The application for `args`; Serve parses them by this annotation, which must be the class, not its name."""
    return build_app(args, on_cpu=runs_on_cpu(args))
