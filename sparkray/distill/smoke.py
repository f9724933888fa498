"""The three Spark scenarios on one machine, in small: does every way of being taught work from end to end.

- `hosted_api`: a host asked over HTTP that scores by `echo`, as OpenAI's older completions do;
- `one_spark`: an engine in this process writes a store, the student learns from it;
- `two_sparks`: a vLLM server is asked while the student trains, after a handshake on its tokenizer.

The host of the first and third is vLLM's own server with the same model, started here. Served scenarios are run twice:
the second run must be the cache's, and give the same losses.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from sparkray.config.base import validate_settings
from sparkray.config.distill import DistillConfig
from sparkray.distill.gates import Gate, check_gates
from sparkray.distill.run import make_pack, make_store, train_causal
from sparkray.distill.teachers.vllm_server import vllm_server
from sparkray.errors import SparkrayError, UsageError
from sparkray.models import prepare_model

SCENARIOS = ("hosted_api", "one_spark", "two_sparks")
_NAME, _CONTEXT = "teacher", 512
_MIN_HIT_RATE = 0.99
_MAX_DIFFERENCE = 1e-6


def run_smoke(
    out: Path,
    *,
    model: str = "embedded",
    scenarios: Sequence[str] = SCENARIOS,
    num_steps: int = 8,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Run the scenarios; one row each with what was measured and what is broken.

    Args:
        out: folder of packs, stores and students.
        model: the teacher.
        scenarios: which of `SCENARIOS`.
        num_steps: optimizer steps of each student.
        say: told of each stage.

    Raises:
        UsageError: a scenario that does not exist.
        UnavailableError, WaitTimeoutError: the server did not start.
    """
    unknown = sorted(set(scenarios) - set(SCENARIOS))
    if unknown:
        raise UsageError(f"scenario {unknown[0]!r} was asked for, and {', '.join(SCENARIOS)} exist.", param="scenarios")
    rows = []
    with ExitStack() as stack:
        url = None
        for name in [name for name in scenarios if name != "one_spark"]:
            if url is None:
                say("starting the teacher's server")
                url = stack.enter_context(
                    vllm_server(prepare_model(model), name=_NAME, max_model_tokens=_CONTEXT, max_logprobs=20)
                )
            say(name)
            rows.append(_guarded(name, partial(_served, out / name, name, url, model, num_steps)))
    # The server's memory is free again before an engine of this process takes its own.
    if "one_spark" in scenarios:
        say("one_spark")
        rows.append(_guarded("one_spark", partial(_stored, out / "one_spark", model, num_steps)))
    return sorted(rows, key=lambda row: SCENARIOS.index(row["scenario"]))


def _guarded(name: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    begun = time.monotonic()
    try:
        row = run()
    except SparkrayError as failure:
        row = {"broken": [str(failure)]}
    return {"scenario": name, "ok": not row["broken"], "seconds": time.monotonic() - begun} | row


def _served(out: Path, name: str, url: str, model: str, num_steps: int) -> dict[str, Any]:
    teacher = {"kind": "api", "mode": "echo"} if name == "hosted_api" else {"kind": "vllm_remote"}
    config = _settings(
        out, num_steps, teacher | {"model": _NAME, "base_url": url, "tokenizer": model, "dtype": "bfloat16"}
    )
    make_pack("toy", out / "pack", config)
    first = train_causal(out / "pack", out / "first", config, store_folder=None, live=True)
    second = train_causal(out / "pack", out / "second", config, store_folder=None, live=True)
    losses = [_losses(out / run) for run in ("first", "second")]
    row = {
        "loss_first": losses[0][0],
        "loss_last": losses[0][-1],
        "second_hit_rate": second["client"]["hit_rate"],
        "second_loss_difference": max(abs(a - b) for a, b in zip(*losses, strict=True)),
        "latency_p95_seconds": first["client"]["latency_p95_seconds"],
    }
    gates = [
        Gate("loss_last", losses[0][0], "at_most"),
        Gate("second_hit_rate", _MIN_HIT_RATE, "at_least"),
        Gate("second_loss_difference", _MAX_DIFFERENCE, "at_most"),
    ]
    return row | {"broken": check_gates(row, gates)}


def _stored(out: Path, model: str, num_steps: int) -> dict[str, Any]:
    config = _settings(out, num_steps, {"kind": "vllm_local", "model": model, "dtype": "bfloat16"})
    make_pack("toy", out / "pack", config)
    manifest = make_store(out / "pack", out / "store", config, lambda done, total: None)
    train_causal(out / "pack", out / "first", config, store_folder=out / "store")
    losses = _losses(out / "first")
    row = {"loss_first": losses[0], "loss_last": losses[-1], "bytes_per_token": manifest.bytes_per_token}
    return row | {"broken": check_gates(row, [Gate("loss_last", losses[0], "at_most")])}


def _settings(out: Path, num_steps: int, teacher: dict[str, Any]) -> DistillConfig:
    return validate_settings(
        DistillConfig,
        {
            "pack": {"sequence_tokens": 64, "max_sequences": 16},
            "teacher": {"max_model_tokens": _CONTEXT, "overlap_tokens": 32, **teacher},
            "cache": {"path": str(out / "cache.sqlite")},
            "store": {"tail_draws": 0, "shard_sequences": 8},
            "loss": {"target": "tail_bucket", "ce_weight": 0.5, "kd_weight": 0.5},
            "student": {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "intermediate_size": 128},
            "train": {
                "num_steps": num_steps,
                "batch_sequences": 4,
                "micro_batch_sequences": 4,
                "warmup_steps": 2,
                "learning_rate": 0.003,
                "validate_steps": num_steps,
                "validation_sequences": 1,
            },
        },
    )


def _losses(out: Path) -> list[float]:
    rows = map(json.loads, (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [row["loss"] for row in rows if "loss" in row]
