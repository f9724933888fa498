"""The two jobs of pruning as a user submits them: both end SUCCEEDED, with what the command line gives."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from sparkray.config.pruning import CalibrationConfig, PruneConfig
from sparkray.pruning.calibration import read_calibration
from sparkray.pruning.checkpoint import Checkpoint
from sparkray.pruning.observation import ShardObserver
from sparkray.pruning.pipeline import plan_stage
from sparkray.pruning.plan import read_plan
from tests.ray.conftest import RayCluster

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from prompt_server import Server
from tiny_moe import write_inputs, write_tiny

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

REPOSITORY = Path(__file__).parents[2]
NUM_PROMPTS = 5


def submit(cluster: RayCluster, name: str, *arguments: object) -> dict[str, Any]:
    """Run a job to its end; the last JSON object that it printed."""
    words = ("--working-dir", str(REPOSITORY), "--", "python", *map(str, arguments), "--json")
    done = cluster.ray("job", "submit", f"--submission-id={name}", *words, timeout_seconds=800)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert cluster.job_status(name) == "SUCCEEDED"
    summary: dict[str, Any] = json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])
    return summary


def test_a_pruning_job_on_two_nodes_plans_as_one_process_does(cluster: RayCluster, tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "model", "ernie4_5_moe", max_shard_size="100KB")
    inputs = write_inputs(tmp_path / "inputs.json", num_batches=4)
    flags = ("--model", model, "--data", inputs, "--ratio", "0.5", "--work", tmp_path / "work")
    split = ("--set", "observe.shard_sequences=2", "--set", "observe.placement=resident")
    report = submit(cluster, "prune", "jobs/prune_experts.py", *flags, *split)

    pruned = Checkpoint(Path(report["directory"]))
    assert pruned.directory == tmp_path / "work" / "pruned_models" / "reap-seed_42-0.50"
    assert report["check"]["num_tokens"] > 0
    settings = PruneConfig.model_validate(
        {"observe": {"placement": "resident", "shard_sequences": 2}, "plan": {"ratio": 0.5}}
    )
    checkpoint, data = Checkpoint(model), read_calibration(inputs, CalibrationConfig())
    parts = ShardObserver(checkpoint, settings.observe).observe(data.shards(2))
    assert len(list((tmp_path / "work" / "observations").rglob("shard-*.npz"))) == len(parts)
    assert read_plan(pruned.directory).kept == plan_stage(checkpoint, parts, data, settings).kept


def test_a_batch_job_answers_every_prompt_once(cluster: RayCluster, tmp_path: Path) -> None:
    server = Server()
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps([f"prompt number {number}" for number in range(NUM_PROMPTS)]))
    flags = ("--input", prompts, "--out", tmp_path / "out.json", "--url", server.url)
    try:
        summary = submit(cluster, "batch", "jobs/batch_prompts.py", *flags)
    finally:
        server.http.shutdown()
        server.http.server_close()
    assert dict(server.asked) == {f"prompt number {number}": 1 for number in range(NUM_PROMPTS)}
    assert (summary["num_answered"], summary["num_failed"]) == (NUM_PROMPTS, 0)
    answers = json.loads((tmp_path / "out.json").read_text())
    assert [row["response"] for row in answers["results"]] == [
        f"prompt number {number}"[::-1] for number in range(NUM_PROMPTS)
    ]
