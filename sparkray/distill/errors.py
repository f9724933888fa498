"""What a teacher can do wrong.

UnavailableError
├── TeacherRefusedError   401, 403, 404 or 400: asking again does not help
├── TeacherReplyError     an answer that cannot be used: not JSON, too few positions, NaN
└── TeacherDownError      no connection, 5xx or a time limit, after all attempts
BusyError
└── RateLimitedError      429; raised to the caller once the deadline has passed
"""

from __future__ import annotations

from sparkray.errors import BusyError, UnavailableError


class TeacherRefusedError(UnavailableError):
    """The host refused the request; the same request will be refused again."""


class TeacherReplyError(UnavailableError):
    """The host answered something that is no score of the tokens that were sent."""


class TeacherDownError(UnavailableError):
    """The host could not be reached or kept failing until the deadline."""


class RateLimitedError(BusyError):
    """The host asked for patience.

    Attributes:
        retry_after_seconds: how much, if it said so.
    """

    retry_after_seconds: float | None = None
