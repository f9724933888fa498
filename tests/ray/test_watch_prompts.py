"""`jobs/watch_prompts.py` as a real job: stopped half-way, submitted again, and every prompt is there once."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import torch

from sparkray.cluster.processes import marked
from tests.ray.conftest import RayCluster

REPOSITORY = Path(__file__).parents[2]
NUM_PROMPTS = 16
MAX_TOKENS = 20
START_SECONDS = 600.0
COMMAND_SECONDS = 240.0

pytestmark = [pytest.mark.ray, pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(1800)]


def _write_prompts(path: Path) -> list[str]:
    lines = [{"id": f"q{n}", "prompt": f"The number {n} is special, because"} for n in range(NUM_PROMPTS - 2)]
    # Answered first, so that both are there when the job is stopped.
    lines[0] = {"id": "long", "prompt": "word " * 2000}
    lines[1] = {"id": "chat", "messages": [{"role": "user", "content": "Name a colour."}]}  # type: ignore[dict-item]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [line["id"] for line in lines]


def _arguments(tmp_path: Path) -> list[str]:
    settings = ["dtype=float32", "max_num_seqs=1", "max_model_len=256", "kv_cache_gib=0.25"]
    return [
        *("--working-dir", str(REPOSITORY), "--", "python", "jobs/watch_prompts.py"),
        *("--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out")),
        *("--max-tokens", str(MAX_TOKENS), "--temperature", "0", "--batch-size", "1", "--rows-per-part", "1"),
        *(word for setting in settings for word in ("--set", f"engine.{setting}")),
    ]


def _wait_for_part(cluster: RayCluster, job: str, folder: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while len(list(folder.glob("part-*"))) < 3:
        status = cluster.job_status(job)
        if status in ("FAILED", "SUCCEEDED") or time.monotonic() > deadline:
            pytest.fail(f"{status}\n{cluster.ray('job', 'logs', job, timeout_seconds=COMMAND_SECONDS).stdout}")
        time.sleep(0.05)


def _engines(cluster: RayCluster) -> list[psutil.Process]:
    return [process for process in marked(cluster.session.mark) if _is_engine(process)]


def _is_engine(process: psutil.Process) -> bool:
    try:
        return "EngineCore" in " ".join([process.name(), *process.cmdline()])
    except psutil.NoSuchProcess:
        return False


def _wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + COMMAND_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited {COMMAND_SECONDS:.0f} s in vain: {what}"
        time.sleep(0.5)


def _entropies_bits(token_ids: list[int], num_prompt_tokens: int) -> list[float]:
    """Entropy before each answered token, by a plain float64 forward over the whole text."""
    from transformers import AutoModelForCausalLM

    from sparkray.models import prepare_model

    model = AutoModelForCausalLM.from_pretrained(prepare_model("embedded"), dtype=torch.float64)
    with torch.inference_mode():
        logits_TV = model(torch.tensor([token_ids])).logits[0, num_prompt_tokens - 1 : -1]
    log_probs_TV = logits_TV.log_softmax(-1)
    found: list[float] = (-(log_probs_TV.exp() * log_probs_TV).sum(-1) / math.log(2)).tolist()
    return found


def test_a_job_that_is_stopped_and_submitted_again_does_each_prompt_once(cluster: RayCluster, tmp_path: Path) -> None:
    ids = _write_prompts(tmp_path / "in.jsonl")
    folder = tmp_path / "out"

    first = cluster.ray(
        "job", "submit", "--no-wait", "--submission-id=cut", *_arguments(tmp_path), timeout_seconds=COMMAND_SECONDS
    )
    assert first.returncode == 0, first.stdout + first.stderr
    _wait_for_part(cluster, "cut", folder)
    cluster.stop_job("cut")
    _wait_until(lambda: cluster.job_status("cut") == "STOPPED", "the job is stopped")
    _wait_until(lambda: not _engines(cluster), "its engine is gone")
    before = {path: path.read_bytes() for path in folder.glob("part-*")}
    num_before = pq.read_table(folder).num_rows
    assert 3 <= num_before < len(ids)

    second = cluster.ray("job", "submit", "--submission-id=rest", *_arguments(tmp_path), timeout_seconds=900)
    assert second.returncode == 0, second.stdout[-4000:] + second.stderr[-2000:]
    assert cluster.job_status("rest") == "SUCCEEDED"
    logs = cluster.ray("job", "logs", "rest", timeout_seconds=COMMAND_SECONDS).stdout.strip().splitlines()
    summary = json.loads([line for line in logs if line.startswith("{")][-1])
    assert (summary["num_prompts"], summary["num_skipped"]) == (len(ids), num_before)
    assert summary["num_written"] == len(ids) - num_before
    assert {path: path.read_bytes() for path in before} == before, "what was done is left as it is"
    _wait_until(lambda: not _engines(cluster), "its engine is gone")

    rows = {row["id"]: row for row in pq.read_table(folder).to_pylist()}
    assert pq.read_table(folder).num_rows == len(ids)
    assert sorted(rows) == sorted(ids)
    assert rows["long"]["error"]
    assert rows["long"]["text"] is None
    answered = [row for row in rows.values() if row["id"] != "long"]
    for row in answered:
        assert row["error"] is None
        assert 1 <= row["num_tokens"] == len(row["token_ids"]) == len(row["entropies"]) == len(row["actions"])
        assert row["finish_reason"] == ("length" if row["num_tokens"] == MAX_TOKENS else "stop")
        assert row["mean_entropy"] == pytest.approx(sum(row["entropies"]) / row["num_tokens"], abs=1e-6)
    _check_traces_are_of_their_own_rows(rows)


def _check_traces_are_of_their_own_rows(rows: dict[str, dict[str, object]]) -> None:
    from transformers import AutoTokenizer

    from sparkray.models import prepare_model

    tokenizer = AutoTokenizer.from_pretrained(prepare_model("embedded"))
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Name a colour."}], add_generation_prompt=True, return_dict=False
    )
    for name, prompt_ids in (("chat", chat), ("q5", tokenizer(rows["q5"]["prompt"])["input_ids"])):
        row = rows[name]
        token_ids, entropies = row["token_ids"], row["entropies"]
        assert isinstance(token_ids, list)
        assert row["num_prompt_tokens"] == len(prompt_ids)
        expected = _entropies_bits([*prompt_ids, *token_ids], len(prompt_ids))
        assert entropies == pytest.approx(expected, abs=1e-3)
