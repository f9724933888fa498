"""Every failure of a route as OpenAI's error body, whoever raised it."""

from __future__ import annotations

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
    finding = error.errors()[0]
    # The location starts with `body`, which a client does not write.
    param = ".".join(str(part) for part in finding["loc"][1:]) or "body"
    return error_response(400, f"{param}: {finding['msg']}.", param=param, code="invalid_input")
