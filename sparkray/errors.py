"""The exception tree.

SparkrayError
├── UsageError              settings, flags or files that the user wrote        exit 2   HTTP 400
├── InputError              a request or a data row that cannot be accepted     exit 4   HTTP 400
│   └── TooLargeError       over a stated limit                                 exit 4   HTTP 413
├── NotFoundError           a model, a trace, a file that does not exist        exit 4   HTTP 404
├── UnavailableError        something needed is not there: a port, memory,      exit 3   HTTP 503
│   │                       an optional package, a cluster
│   ├── MissingExtraError   an extra of pyproject.toml that is not installed    exit 3   HTTP 501
│   └── BusyError           a bound was reached; trying again later may work    exit 3   HTTP 429
├── WaitTimeoutError        a wait reached its time limit                       exit 1   HTTP 504
└── InternalError           a promise of this code was broken                   exit 1   HTTP 500

Each package may derive its own family from these; the two tables below are the only place where an error
turns into an exit code or an HTTP status. A message finishes the sentence: what was given, what was expected,
what to do next (`hint`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_UNAVAILABLE = 3
EXIT_REJECTED = 4
EXIT_INTERRUPTED = 130


class SparkrayError(Exception):
    """Base of every error that sparkray raises on purpose.

    Args:
        message: what was given and what was expected, as a sentence.
        hint: what to do next, or None where the message says it already.
        param: the name of the field or flag at fault, or None.
    """

    code: ClassVar[str] = "failed"

    def __init__(self, message: str, *, hint: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.param = param

    def __str__(self) -> str:
        return f"{self.message} {self.hint}" if self.hint else self.message

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments need help to cross a process boundary.
        return (_rebuild, (type(self), self.message, self.hint, self.param))


def _rebuild(kind: type[SparkrayError], message: str, hint: str | None, param: str | None) -> SparkrayError:
    return kind(message, hint=hint, param=param)


class UsageError(SparkrayError):
    """Settings, flags or files that the user wrote are not usable."""

    code = "usage"


class InputError(SparkrayError):
    """A request or a data row cannot be accepted."""

    code = "invalid_input"


class TooLargeError(InputError):
    """Something is over a stated limit."""

    code = "too_large"


class NotFoundError(SparkrayError):
    """A named thing does not exist."""

    code = "not_found"


class UnavailableError(SparkrayError):
    """Something needed is not there: a port, memory, a package, a cluster."""

    code = "unavailable"


class MissingExtraError(UnavailableError):
    """An optional part is not installed."""

    code = "missing_extra"

    @classmethod
    def for_module(cls, module: str, extra: str) -> MissingExtraError:
        return cls(
            f"this needs the Python module {module!r}, which is not installed.",
            hint=f"Install the extra that brings it: uv pip install 'sparkray[{extra}]'.",
        )


class BusyError(UnavailableError):
    """A bound was reached; trying again later may work."""

    code = "busy"


class WaitTimeoutError(SparkrayError):
    """A wait reached its time limit."""

    code = "timeout"


class InternalError(SparkrayError):
    """A promise of this code was broken."""

    code = "internal"


_EXIT_CODE: dict[str, int] = {
    "usage": EXIT_USAGE,
    "invalid_input": EXIT_REJECTED,
    "too_large": EXIT_REJECTED,
    "not_found": EXIT_REJECTED,
    "unavailable": EXIT_UNAVAILABLE,
    "missing_extra": EXIT_UNAVAILABLE,
    "busy": EXIT_UNAVAILABLE,
    "timeout": EXIT_FAILED,
    "internal": EXIT_FAILED,
    "failed": EXIT_FAILED,
}

_HTTP_STATUS: dict[str, int] = {
    "usage": 400,
    "invalid_input": 400,
    "too_large": 413,
    "not_found": 404,
    "unavailable": 503,
    "missing_extra": 501,
    "busy": 429,
    "timeout": 504,
    "internal": 500,
    "failed": 500,
}


def exit_code(error: SparkrayError) -> int:
    """The process exit code for an error, by its code."""
    return _EXIT_CODE[error.code]


def http_status(error: SparkrayError) -> int:
    """The HTTP status for an error, by its code."""
    return _HTTP_STATUS[error.code]


def openai_body(error: SparkrayError) -> dict[str, dict[str, str | None]]:
    """The error as OpenAI's error body: `{"error": {"message", "type", "param", "code"}}`."""
    status = http_status(error)
    kind = "invalid_request_error" if 400 <= status < 500 else "server_error"
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}


def error_inside(failure: BaseException) -> SparkrayError | None:
    """The first error of this tree inside one that another library wrapped around it, or None.

    Looked into are `__cause__`, Ray's `cause` and Ray Train's `worker_failures` (an error a worker).
    """
    seen: list[BaseException] = [failure]
    for one in seen:
        if isinstance(one, SparkrayError):
            return one
        failures: Mapping[int, object] = getattr(one, "worker_failures", None) or {}
        inner = [getattr(one, "cause", None), one.__cause__, *failures.values()]
        seen += [item for item in inner if isinstance(item, BaseException) and item not in seen]
    return None


def last_line(failure: BaseException) -> str:
    """What an error ends with: of a wrapped traceback, the line that says what went wrong."""
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
    return lines[-1] if lines else type(failure).__name__
