"""Logging: one line a record on stderr, secrets masked."""

from __future__ import annotations

import logging
import os
import re

_SECRET = re.compile(
    r"(?i)(authorization:\s*\w+\s+|(?:api[_-]?key|token|secret|password)[\"']?\s*[=:]\s*[\"']?)([^\s\"',]{4,})"
)


class _MaskSecrets(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        masked = mask_secrets(message)
        if masked != message:
            record.msg, record.args = masked, None
        return True


def mask_secrets(text: str) -> str:
    """`text` with the values of keys, tokens and passwords replaced by `***`."""
    return _SECRET.sub(r"\1***", text)


def configure_logging(level: str | None = None) -> None:
    """Send sparkray's records to stderr at `level` (default: the environment's SPARKRAY_LOG_LEVEL, or WARNING)."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.addFilter(_MaskSecrets())
    logger = logging.getLogger("sparkray")
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel((level or os.environ.get("SPARKRAY_LOG_LEVEL", "WARNING")).upper())


def silence_libraries() -> None:
    """Keep the libraries' own records off a command's stderr, unless SPARKRAY_LOG_LEVEL asks for records.

    Ray Serve and vLLM install handlers on the root logger when they are imported, so their levels cannot be set
    ahead of time.
    """
    if "SPARKRAY_LOG_LEVEL" not in os.environ:
        logging.disable(logging.WARNING)
