"""Decode peers as processes of this machine, for `verify`, `bench` and tests: started, awaited, and ended."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from sparkray.config.handoff import DecodeConfig
from sparkray.errors import UnavailableError, WaitTimeoutError

_START_SECONDS = 300.0


class LocalPeer:
    """One `sparkray handoff decode` process.

    Args:
        config: its settings.
        prefix: words before the command, as `ip netns exec NAME`.
        log_path: where its standard error goes.
    """

    def __init__(self, config: DecodeConfig, log_path: Path, prefix: Sequence[str] = ()) -> None:
        settings = log_path.with_suffix(".json")
        settings.write_text(json.dumps(config.model_dump(mode="json")), encoding="utf-8")
        command = [*prefix, sys.executable, "-m", "sparkray.cli.main", "handoff", "decode", "--json", "--config"]
        self._log_path = log_path
        with log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, str(settings)],
                stdout=subprocess.PIPE, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )  # fmt: skip

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_ready(self, timeout_seconds: float = _START_SECONDS) -> str:
        """Its address, once it listens.

        Raises:
            UnavailableError: it ended; the message has its last words.
            WaitTimeoutError: it did not come up in time.
        """
        assert self._process.stdout is not None
        deadline = time.monotonic() + timeout_seconds
        while (left := deadline - time.monotonic()) > 0:
            if select.select([self._process.stdout], [], [], min(left, 1.0))[0]:
                line = self._process.stdout.readline()
                if line.strip():
                    return str(json.loads(line)["address"])
            if self._process.poll() is not None:
                raise UnavailableError(f"a decode peer ended while starting: {self._last_words()}")
        raise WaitTimeoutError(f"a decode peer did not start within {timeout_seconds:.0f} s: {self._last_words()}")

    def kill(self) -> None:
        """End it at once, as a power cut does."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(30)

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _last_words(self) -> str:
        return self._log_path.read_text(errors="replace")[-600:].strip()
