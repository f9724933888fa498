"""Serve builder of the handoff's coordinator: `serve deploy serve_apps/handoff.yaml`."""

from ray.serve.deployment import Application

from sparkray.config.handoff import HandoffConfig
from sparkray.handoff.deployment import build_handoff_app


def build(args: HandoffConfig) -> Application:
    """The application for `args`; Serve parses them by this annotation, which must be the class, not its name."""
    return build_handoff_app(args)
