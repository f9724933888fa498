"""Every failure of a route as OpenAI's error body, whoever raised it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from ray.llm._internal.serve.core.configs.openai_api_models import OpenAIHTTPException
from starlette.exceptions import HTTPException

from sparkray.errors import SparkrayError, http_status, openai_body


def install_error_bodies(app: FastAPI) -> None:
    """Replace the handlers of `app`: Ray's own put internals of the exception into the message."""
    app.add_exception_handler(SparkrayError, _of_ours)
    app.add_exception_handler(OpenAIHTTPException, _of_ray)
    app.add_exception_handler(HTTPException, _of_http)
    app.add_exception_handler(RequestValidationError, _of_validation)


def error_response(status: int, message: str, *, param: str | None = None, code: str | None = None) -> Response:
    """OpenAI's error body with its status."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    error: dict[str, Any] = {"message": message, "type": kind, "param": param, "code": code}
    return JSONResponse({"error": error}, status_code=status)


async def _of_ours(_: Request, error: Exception) -> Response:
    assert isinstance(error, SparkrayError)
    return JSONResponse(openai_body(error), status_code=http_status(error))


async def _of_ray(_: Request, error: Exception) -> Response:
    assert isinstance(error, OpenAIHTTPException)
    # vLLM reports an engine that has just died as 500; what a client can do about either is the same.
    return error_response(
        error.status_code, error.message, code="invalid_input" if error.status_code < 500 else "failed"
    )


async def _of_http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed", 408: "timeout", 429: "busy"}.get(error.status_code)
    return error_response(error.status_code, str(error.detail), code=code)


async def _of_validation(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    param, message = explain(error.errors())
    return error_response(400, message, param=param, code="invalid_input")


def explain(findings: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """The field at fault and one sentence about it, of pydantic's findings.

    A field that may have several types gives a finding for each, told apart by the last part of its location;
    together they say what is accepted.
    """
    first = findings[0]
    same = [finding for finding in findings if finding["loc"][:-1] == first["loc"][:-1]]
    location = first["loc"][:-1] if len(same) > 1 else first["loc"]
    # The location starts with `body`, which a client does not write.
    param = ".".join(str(part) for part in location[1:]) or "body"
    reasons = dict.fromkeys(str(finding["msg"]).removeprefix("Input should be ") for finding in same)
    expected = " or ".join(reasons)
    given = str(first.get("input"))[:200]
    if first["type"] == "missing":
        return param, f"{param} is missing, and it is required."
    return param, f"{param}: {given!r} was given, and it should be {expected}."
