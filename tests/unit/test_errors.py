"""Errors: every code has an exit code and a status, and an error survives a process boundary."""

from __future__ import annotations

import pickle

import pytest

from sparkray import errors
from sparkray.errors import InputError, MissingExtraError, SparkrayError, exit_code, http_status, openai_body

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
