"""Shipped settings are read, what contradicts itself is refused, and the Spark scenarios fit their memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sparkray.config.base import load_settings, validate_settings
from sparkray.config.distill import (
    ClientConfig,
    DistillConfig,
    LatentConfig,
    PackConfig,
    StudentConfig,
    TeacherConfig,
    WorkersConfig,
)
from sparkray.errors import UsageError
from sparkray.hardware.fit import DGX_SPARK, FULL_TRAINING_BYTES_PER_PARAM, Demand, ModelShape, fit

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "distill").glob("*.yaml"))
# Qwen3-Next-80B-A3B: 12 of its 48 layers keep a KV cache of 2 heads of 256.
TEACHER = ModelShape("80B-A3B", 80e9, 12, 2, 256, bits=4)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_settings_are_read(path: Path) -> None:
    settings = load_settings(DistillConfig, [path])
    served = settings.teacher.kind in ("api", "vllm_remote")
    assert served == (settings.teacher.base_url is not None)
    # Only a teacher with the full vocabulary at hand can be drawn from.
    assert (settings.loss.target == "sampled_tail") == (settings.teacher.kind == "transformers")


def student_parameters(config: StudentConfig, vocab_size: int) -> float:
    width = config.hidden_size
    return vocab_size * width + config.num_layers * (4 * width**2 + 3 * width * config.intermediate_size)


def test_the_spark_scenarios_fit_their_memory() -> None:
    settings = {path.stem: load_settings(DistillConfig, [path]) for path in CONFIGS}
    one, two = settings["one_spark"], settings["two_sparks"]
    assert one.teacher.gpu_memory_utilization == DGX_SPARK.usable_share
    cache = Demand("KV cache", TEACHER.kv_bytes_per_token * one.teacher.max_model_tokens)
    teacher = [Demand("teacher", TEACHER.weight_bytes), cache]
    parameters = student_parameters(two.student, vocab_size=151_936)
    student = [Demand("student", parameters * FULL_TRAINING_BYTES_PER_PARAM)]
    assert fit(teacher, DGX_SPARK).fits
    assert fit(student, DGX_SPARK).fits
    # In 16 bits the teacher would not.
    wide = ModelShape("80B-A3B", 80e9, 12, 2, 256, bits=16)
    assert not fit([Demand("teacher", wide.weight_bytes), cache], DGX_SPARK).fits


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (PackConfig, {"sequence_tokens": 10, "chunk_tokens": 4}, "must divide"),
        (TeacherConfig, {"kind": "vllm_remote"}, "needs base_url"),
        (TeacherConfig, {"base_url": "http://a/v1"}, "takes no base_url"),
        (TeacherConfig, {"max_model_tokens": 100, "overlap_tokens": 100}, "must be below"),
        (ClientConfig, {"top_logprobs": 5}, "must not exceed"),
        (StudentConfig, {"hidden_size": 100, "num_heads": 3}, "must divide"),
        (LatentConfig, {"hidden_size": 100, "num_heads": 3}, "must divide"),
        (WorkersConfig, {"num_workers": 1, "min_workers": 2}, "must not exceed"),
        (DistillConfig, {"nothing": 1}, "DistillConfig has the keys"),
    ],
)
def test_what_contradicts_itself_is_refused(kind: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        validate_settings(kind, values)
