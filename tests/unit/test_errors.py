"""Errors: every code has an exit code and a status, and an error survives a process boundary."""

from __future__ import annotations

import pickle

import pytest

from sparkray import errors
from sparkray.errors import (
    InputError,
    MissingExtraError,
    SparkrayError,
    error_inside,
    exit_code,
    http_status,
    last_line,
    openai_body,
)

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, SparkrayError)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_kind_has_an_exit_code_a_status_and_a_place_in_the_drawing(kind: type[SparkrayError]) -> None:
    error = kind("it broke.")
    assert exit_code(error) in {1, 2, 3, 4}
    assert 400 <= http_status(error) < 600
    assert kind.__name__ in (errors.__doc__ or "")


def test_openai_body_has_the_four_keys() -> None:
    body = openai_body(InputError("n is 4.", hint="Send n=1.", param="n"))
    assert body == {
        "error": {
            "message": "n is 4. Send n=1.",
            "type": "invalid_request_error",
            "param": "n",
            "code": "invalid_input",
        }
    }


def test_an_error_crosses_a_process_boundary_whole() -> None:
    error = pickle.loads(pickle.dumps(InputError("bad.", hint="Mend it.", param="x")))
    assert (type(error), str(error), error.param) == (InputError, "bad. Mend it.", "x")


def test_a_missing_extra_says_the_command() -> None:
    assert "sparkray[train]" in str(MissingExtraError.for_module("trl", "train"))


class _WorkersFailedError(Exception):
    """As Ray Train raises it."""

    def __init__(self, failures: dict[int, BaseException]) -> None:
        super().__init__("two workers failed")
        self.worker_failures = failures


def test_the_error_inside_a_wrapped_one_is_found() -> None:
    ours = InputError("bad row.")
    task = RuntimeError("task failed")
    task.__cause__ = ours
    assert error_inside(_WorkersFailedError({0: ValueError("other"), 1: task})) is ours
    assert error_inside(ours) is ours
    looped = RuntimeError("loop")
    looped.__cause__ = looped
    assert error_inside(looped) is None


def test_the_last_line_of_an_error() -> None:
    assert last_line(RuntimeError("Traceback\n  File x\nValueError: no such row\n")) == "ValueError: no such row"
    assert last_line(KeyError()) == "KeyError"
