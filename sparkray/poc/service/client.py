"""Asking a running service how it is."""

from __future__ import annotations

import os
from typing import Any

import httpx

from sparkray.errors import UnavailableError
from sparkray.poc.service.names import PREFIX, SIGNING_KEY_VARIABLE, TOKEN_VARIABLE, sign

_TIMEOUT_SECONDS = 10.0


def read_status(url: str) -> dict[str, Any]:
    """The body of `/pow/status`; token and signing key are taken from the environment.

    Raises:
        UnavailableError: nothing answers there, or it answers something else.
    """
    path = f"{PREFIX}/pow/status"
    headers = {}
    if token := os.environ.get(TOKEN_VARIABLE):
        headers["Authorization"] = f"Bearer {token}"
    if key := os.environ.get(SIGNING_KEY_VARIABLE):
        headers["X-Signature"] = sign(key, "GET", path, b"")
    try:
        answer = httpx.get(url.rstrip("/") + path, headers=headers, timeout=_TIMEOUT_SECONDS).raise_for_status()
        status: dict[str, Any] = answer.json()
    except (httpx.HTTPError, ValueError) as failure:
        raise UnavailableError(
            f"{url} does not answer as the service: {failure}.", hint="Deploy it by `serve deploy serve_apps/poc.yaml`."
        ) from failure
    return status
