"""`ray job submit -- python jobs/train_grpo.py` as it is typed, and its checkpoint served by `sparkray serve up`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from sparkray.cluster.processes import free_port
from tests.ray.conftest import RayCluster

pytestmark = [pytest.mark.ray, pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(2400)]

REPOSITORY = Path(__file__).parents[2]
SPARKRAY = str(Path(sys.executable).with_name("sparkray"))
NUM_STEPS = 2
SMALL = ("max_model_len=128", "max_num_seqs=4", "kv_cache_gib=0.25", "dtype=float32", "enforce_eager=true")
WORDS = ("wolf", "hammer", "duck", "chair")


def _greedy(model: str, prompts: list[str]) -> list[str]:
    """The likeliest next token of each prompt, by transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        ids = [tokenizer(prompt, return_tensors="pt").input_ids for prompt in prompts]
        return [tokenizer.decode([int(policy(input_ids=one).logits[0, -1].argmax())]) for one in ids]


def _served(model: str, prompts: list[str], state: Path) -> list[str]:
    """What the served model answers."""
    environment = {**os.environ, "SPARKRAY_STATE": str(state)}
    url = f"http://127.0.0.1:{(port := free_port())}"
    settings = [word for setting in SMALL for word in ("--set", f"engine.{setting}")]
    up = [SPARKRAY, "serve", "up", "--model", model, "--port", str(port), "--name", "trained", *settings]
    down = [SPARKRAY, "serve", "down", "--name", "trained"]
    try:
        subprocess.run(up, env=environment, check=True, timeout=900)
        with httpx.Client(base_url=url, timeout=120) as client:
            name = client.get("/v1/models").json()["data"][0]["id"]
            asked: list[dict[str, Any]] = [
                {"model": name, "prompt": prompt, "max_tokens": 1, "temperature": 0} for prompt in prompts
            ]
            return [client.post("/v1/completions", json=body).json()["choices"][0]["text"] for body in asked]
    finally:
        subprocess.run(down, env=environment, check=True, timeout=240)


def test_a_job_ends_succeeded_and_its_checkpoint_is_served(cluster: RayCluster, tmp_path: Path) -> None:
    entry = ("python", "jobs/train_grpo.py", "--config", "configs/grpo/embedded.toml")
    changes = ("--max-steps", str(NUM_STEPS), "--eval-steps", "100", "--output-dir", str(tmp_path), "--json")
    told = cluster.ray(
        *("job", "submit", "--submission-id=grpo", "--working-dir", str(REPOSITORY), "--", *entry, *changes),
        timeout_seconds=1200,
    )
    assert told.returncode == 0, told.stdout + told.stderr
    assert cluster.job_status("grpo") == "SUCCEEDED"
    summary = json.loads((tmp_path / "animals" / "summary.json").read_text())
    assert summary["num_steps"] == NUM_STEPS
    assert {path.name for path in Path(summary["checkpoint"]).iterdir()} >= {"adapter", "trainer.pt", "run.json"}
    prompts = [f"animal or thing?\nlion: animal\nbrick: thing\n{word}:" for word in WORDS]
    assert _served(summary["model"], prompts, tmp_path / "state") == _greedy(summary["model"], prompts)
