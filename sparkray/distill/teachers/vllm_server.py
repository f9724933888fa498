"""vLLM's own OpenAI server as a process beside this one, for the smoke run and benchmarks."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from sparkray.errors import UnavailableError, WaitTimeoutError

_STOP_SECONDS = 30.0


@contextmanager
def vllm_server(
    model: Path, *, name: str, max_model_tokens: int, max_logprobs: int, start_timeout_seconds: float = 600.0
) -> Iterator[str]:
    """A server on 127.0.0.1 that is ready to score; `http://127.0.0.1:PORT/v1`. Ended with the block.

    Args:
        model: its folder.
        name: under which it is served.
        max_model_tokens: context.
        max_logprobs: most entries that it gives.
        start_timeout_seconds: how long it may load.

    Raises:
        UnavailableError: it ended while starting; the message has the end of its log.
        WaitTimeoutError: it was not ready in time.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", name,
        "--host", "127.0.0.1", "--port", str(port), "--max-model-len", str(max_model_tokens),
        "--max-logprobs", str(max_logprobs), "--no-enable-prefix-caching", "--enforce-eager", "--dtype", "bfloat16",
    ]  # fmt: skip
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            _await(f"http://127.0.0.1:{port}/health", server, log.fileno(), start_timeout_seconds)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            _end(server)


def _await(url: str, server: subprocess.Popen[bytes], log: int, timeout_seconds: float) -> None:
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        if server.poll() is not None:
            size = os.fstat(log).st_size
            tail = os.pread(log, 2000, max(0, size - 2000)).decode(errors="replace")
            raise UnavailableError(f"vLLM's server ended with {server.returncode} while starting: {tail.strip()}")
        try:
            if httpx.get(url, timeout=2).status_code == 200:
                return
        except httpx.HTTPError:
            pass  # not listening yet
        time.sleep(0.5)
    raise WaitTimeoutError(f"vLLM's server was not ready within {timeout_seconds:g} s.")


def _end(server: subprocess.Popen[bytes]) -> None:
    # Its engine is a process of its own in the same group.
    if server.poll() is None:
        os.killpg(server.pid, signal.SIGTERM)
    try:
        server.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait(_STOP_SECONDS)
