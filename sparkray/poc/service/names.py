"""What client and service agree on: the path, the variables with secrets, and how a request is signed."""

from __future__ import annotations

import hashlib
import hmac

PREFIX = "/api/v1"
TOKEN_VARIABLE = "SPARKRAY_POC_TOKEN"
SIGNING_KEY_VARIABLE = "SPARKRAY_POC_SIGNING_KEY"


def sign(key: str, method: str, path: str, body: bytes) -> str:
    """Hex HMAC-SHA256 under `key` of the method, a space, the path, a newline and the body."""
    return hmac.new(key.encode(), f"{method} {path}\n".encode() + body, hashlib.sha256).hexdigest()
