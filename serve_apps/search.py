"""Serve builder of a searched model: `serve deploy serve_apps/search.yaml`, or `serve run serve_apps.search:build`.

Every served model has the page at `/` and `POST /v1/search` beside OpenAI's routes; this application sets the engine
up for many short paths of one prompt: small KV blocks, so that paths share more of it, and room for many at a time.
"""

from ray.serve.deployment import Application

from sparkray.config import ServeConfig
from sparkray.serving.deployment import build_app
from sparkray.serving.lifecycle import runs_on_cpu


def build(args: ServeConfig) -> Application:
    """The application for `args`; Serve parses them by this annotation, which must be the class, not its name."""
    engine = args.engine.model_copy(update={"extra": {"block_size": 32, **args.engine.extra}})
    return build_app(args.model_copy(update={"engine": engine}), on_cpu=runs_on_cpu(args))
