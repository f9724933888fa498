"""The network's routes as a FastAPI application; plain functions, which FastAPI runs in threads of its own."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response

from sparkray.errors import SparkrayError, http_status
from sparkray.poc.phases import Phase
from sparkray.poc.service.bodies import InitRequest, ProofBody
from sparkray.poc.service.manager import PocManager
from sparkray.poc.service.names import PREFIX, SIGNING_KEY_VARIABLE, TOKEN_VARIABLE, sign


@dataclass(frozen=True, slots=True)
class Gate:
    """Who may call: `Authorization: Bearer TOKEN`, and a signed body; None asks for neither.

    Attributes:
        signing_key: of X-Signature, see `names.sign`.
    """

    token: str | None = None
    signing_key: str | None = None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Gate:
        """From SPARKRAY_POC_TOKEN and SPARKRAY_POC_SIGNING_KEY; empty is none."""
        return cls(environment.get(TOKEN_VARIABLE) or None, environment.get(SIGNING_KEY_VARIABLE) or None)

    async def admit(self, request: Request) -> None:
        """Refuse a request: 401 without the token, 403 without the signature."""
        if self.token is not None:
            given = request.headers.get("authorization", "")
            if not secrets.compare_digest(given.encode(), f"Bearer {self.token}".encode()):
                raise HTTPException(401, "the bearer token is missing or wrong")
        if self.signing_key is not None:
            expected = sign(self.signing_key, request.method, request.url.path, await request.body())
            given = request.headers.get("x-signature", "")
            if not secrets.compare_digest(given.encode(), expected.encode()):
                raise HTTPException(403, "X-Signature is missing or wrong")


def create_app(manager: PocManager, gate: Gate) -> FastAPI:
    """All routes below /api/v1, and /health."""
    app = FastAPI(title="sparkray proof of compute")
    app.include_router(_router(manager), prefix=PREFIX, dependencies=[Depends(gate.admit)])
    app.add_exception_handler(SparkrayError, _of_ours)
    app.add_exception_handler(RequestValidationError, _of_validation)

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    return app


def _router(manager: PocManager) -> APIRouter:
    router = APIRouter()

    def done(status: dict[str, Any]) -> dict[str, Any]:
        return {"status": "OK", "pow_status": status}

    @router.post("/pow/init")
    def init(request: InitRequest) -> dict[str, Any]:
        return done(manager.init(request, Phase.IDLE))

    @router.post("/pow/init/generate")
    def init_generate(request: InitRequest) -> dict[str, Any]:
        return done(manager.init(request, Phase.GENERATE))

    @router.post("/pow/init/validate")
    def init_validate(request: InitRequest) -> dict[str, Any]:
        return done(manager.init(request, Phase.VALIDATE))

    @router.post("/pow/phase/generate")
    def phase_generate() -> dict[str, Any]:
        return done(manager.change_phase(Phase.GENERATE))

    @router.post("/pow/phase/validate")
    def phase_validate() -> dict[str, Any]:
        return done(manager.change_phase(Phase.VALIDATE))

    @router.post("/pow/validate")
    def validate(body: ProofBody) -> None:
        manager.validate(secrets.token_hex(16), body.batch(), body.node_count)

    @router.get("/pow/status")
    def status() -> dict[str, Any]:
        return manager.status()

    @router.post("/pow/stop")
    @router.post("/stop")
    def stop() -> dict[str, Any]:
        return done(manager.stop())

    @router.get("/state")
    def state() -> dict[str, str]:
        return {"state": "STOPPED" if manager.status()["status"] == "NOT_LOADED" else "POW"}

    return router


def _of_ours(_: Request, error: Exception) -> Response:
    assert isinstance(error, SparkrayError)
    return JSONResponse({"detail": str(error)}, status_code=http_status(error))


def _of_validation(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    # What was given is left out: it may be NaN, which JSON has not, and it may be megabytes.
    findings = [{key: finding[key] for key in ("type", "loc", "msg")} for finding in error.errors()]
    return JSONResponse({"detail": findings}, status_code=422)
