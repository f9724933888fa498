"""Being a driver of a cluster that runs already."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.exceptions import AuthenticationError

from sparkray.errors import UnavailableError


@contextmanager
def cluster_connection() -> Iterator[None]:
    """Join the cluster that runs here, or that RAY_ADDRESS names, for a while; never starts one.

    Raises:
        UnavailableError: there is none, or it wants another token.
    """
    if ray.is_initialized():
        yield
        return
    try:
        ray.init(address="auto", logging_level="WARNING")
    except AuthenticationError as failure:
        raise UnavailableError(
            "the Ray cluster refused this token.",
            hint='Take the session\'s own: eval "$(sparkray cluster env)".',
        ) from failure
    except (ConnectionError, RuntimeError) as failure:
        raise UnavailableError(
            f"no Ray cluster answers: {failure}.",
            hint='Start one (`sparkray serve up`, `ray start --head`), then eval "$(sparkray cluster env)".',
        ) from failure
    try:
        yield
    finally:
        ray.shutdown()
