"""A training run on two nodes whose rank, engine and driver are killed one after the other: nothing is lost or doubled.

The command is the one that a user types; the engine is a real vLLM, and the two ranks are on a node each, the second
in a network of its own where that can be had.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from sparkray.cluster.processes import marked
from sparkray.grpo.checkpoint import newest_checkpoint
from sparkray.grpo.data import read_rows, rows_of_step
from sparkray.grpo.metrics_log import read_log
from tests.ray.conftest import RayCluster

pytestmark = [pytest.mark.ray, pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(3000)]

DATA = Path(__file__).parents[2] / "configs" / "grpo" / "data" / "animals_train.jsonl"
NUM_STEPS, PROMPTS_PER_STEP, SEED = 8, 4, 3
WAIT_SECONDS = 900.0


def settings(folder: Path) -> dict[str, Any]:
    return {
        "dataset": str(DATA),
        "output_dir": str(folder),
        "run_name": "killed",
        "accelerator": "cpu",
        "num_ranks": 2,
        "spread": True,
        "cpus_per_rank": 0.5,
        "cpus_per_engine": 0.5,
        "lora_layers": [27, 30],
        "num_generations": 4,
        "prompts_per_step": PROMPTS_PER_STEP,
        "max_steps": NUM_STEPS,
        "max_prompt_tokens": 64,
        "max_completion_tokens": 1,
        "learning_rate": 3e-4,
        "seed": SEED,
        "engine": {
            "dtype": "float32",
            "max_model_len": 128,
            "max_num_seqs": 16,
            "kv_cache_gib": 0.25,
            "enforce_eager": True,
            "extra": {"block_size": 32},
        },
    }


class Driver:
    """`sparkray train grpo` as a process of its own."""

    def __init__(self, cluster: RayCluster, config: Path, log: Path) -> None:
        self.log = log
        command = [str(Path(sys.executable).with_name("sparkray")), "train", "grpo", "--config", str(config), "--json"]
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(command, env=cluster.env, stdout=subprocess.PIPE, stderr=stderr)

    def wait(self) -> dict[str, Any]:
        told, _ = self.process.communicate(timeout=WAIT_SECONDS)
        assert self.process.returncode == 0, self.tail()
        summary: dict[str, Any] = json.loads(told)
        return summary

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-6000:]

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while not condition():
            assert self.process.poll() is None, f"the driver ended before {what}: {self.tail()}"
            assert time.monotonic() < deadline, f"waited in vain for {what}: {self.tail()}"
            time.sleep(0.5)


def processes(cluster: RayCluster, name: str) -> list[psutil.Process]:
    """Of the cluster, those whose title has `name` in it."""
    found = []
    for process in marked(cluster.session.mark):
        try:
            if name in " ".join([process.name(), *process.cmdline()]):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def elsewhere(process: psutil.Process) -> bool:
    """Whether a process is in another network than this one."""
    return Path(f"/proc/{process.pid}/ns/net").readlink() != Path("/proc/self/ns/net").readlink()


def test_a_rank_the_engine_and_the_driver_are_killed(cluster: RayCluster, tmp_path: Path) -> None:
    config = tmp_path / "run.json"
    config.write_text(json.dumps(settings(tmp_path)))
    run_dir = tmp_path / "killed"

    def done() -> int:
        return len(read_log(run_dir)) if (run_dir / "metrics.jsonl").is_file() else 0

    driver = Driver(cluster, config, tmp_path / "first.log")
    try:
        driver.wait_for(lambda: done() >= 2, "two steps")
        ranks = processes(cluster, "ray::RayTrainWorker")
        assert len(ranks) == 2
        rank = max(ranks, key=elsewhere)
        before_rank = done()
        rank.kill()

        driver.wait_for(lambda: done() > before_rank, "a step after the death of a rank")
        assert all(rank != one for one in processes(cluster, "ray::RayTrainWorker"))
        (engine,) = processes(cluster, "VLLM::EngineCore")
        before_engine = done()
        engine.kill()

        driver.wait_for(lambda: done() > before_engine + 1, "two steps after the death of the engine")
        (fresh_engine,) = processes(cluster, "VLLM::EngineCore")
        assert fresh_engine != engine
        before_driver = done()
        assert before_driver < NUM_STEPS
    finally:
        driver.process.send_signal(signal.SIGKILL)
        driver.process.wait(60)

    checkpoint = newest_checkpoint(run_dir)
    assert checkpoint is not None
    # At most the step in flight is lost.
    assert json.loads((checkpoint / "run.json").read_text())["step"] >= before_driver - 1
    second = Driver(cluster, config, tmp_path / "second.log")
    try:
        summary = second.wait()
    finally:
        second.process.kill()
    assert summary["num_steps"] == NUM_STEPS

    rows = read_log(run_dir)
    assert [row["step"] for row in rows] == list(range(NUM_STEPS))
    assert [row["weight_version"] for row in rows] == list(range(1, NUM_STEPS + 1))
    num_rows = len(read_rows(DATA))
    assert [row["rows"] for row in rows] == [
        rows_of_step(step, num_rows=num_rows, prompts_per_step=PROMPTS_PER_STEP, seed=SEED) for step in range(NUM_STEPS)
    ]
    # Neither side ever worked with other weights than the other.
    assert all(row["canary_gap_max"] < 1e-3 and row["gap_max"] < 1e-3 for row in rows)
    assert json.loads((Path(summary["checkpoint"]) / "run.json").read_text())["step"] == NUM_STEPS
