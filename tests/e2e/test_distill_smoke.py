"""The three Spark scenarios with real engines, as the command that a user types runs and shows them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(1500)]

SCENARIOS = ("hosted_api", "one_spark", "two_sparks")


def losses(out: Path) -> list[float]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_all_three_ways_of_being_taught_work(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    command = [str(Path(sys.executable).with_name("sparkray")), "distill", "smoke", str(tmp_path)]
    environment = {**os.environ, "COLUMNS": "80", "NO_COLOR": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1400, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    # Nothing but the table: engines log to stderr.
    cells = [line.replace("│", "|").split("|")[1:3] for line in done.stdout.splitlines() if "│" in line]
    assert [[cell.strip() for cell in row] for row in cells] == [[name, "ok"] for name in SCENARIOS]
    for name in SCENARIOS:
        first = losses(tmp_path / name / "first")
        assert first[-1] < first[0]
        assert (tmp_path / name / "first" / "model" / "model.safetensors").is_file()
    for name in ("hosted_api", "two_sparks"):
        # The second run was the cache's, so it is the same.
        assert losses(tmp_path / name / "second") == pytest.approx(losses(tmp_path / name / "first"), abs=1e-6)
    # Two ways of asking one server for the same text.
    assert losses(tmp_path / "hosted_api" / "first") == pytest.approx(
        losses(tmp_path / "two_sparks" / "first"), abs=1e-3
    )
    manifest = json.loads((tmp_path / "one_spark" / "store" / "manifest.json").read_text())
    assert manifest["bytes_per_token"] < 75
