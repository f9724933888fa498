"""What the batch job asks of Ray for its engines; built on the tests' cluster, not run."""

from __future__ import annotations

from typing import Any

import pytest

from sparkray.config.batch import WatchPromptsConfig
from sparkray.metis.ray_batch import watched_processor
from sparkray.metis.vllm_batch import WatchedStageUDF
from sparkray.serving.app import engine_kwargs

# Building a stage makes Ray connect by itself; it must find the cluster of these tests.
pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_connection")]


def stage_of(on_cpu: bool, **engine: Any) -> Any:
    config = WatchPromptsConfig.model_validate({"input": "in", "output": "out", "engine": engine})
    processor = watched_processor(config, config.xargs(), engine_kwargs, None, on_cpu=on_cpu)
    (stage,) = processor.stages.values()
    return stage


def test_an_engine_on_a_cpu_asks_for_no_gpu() -> None:
    stage = stage_of(on_cpu=True)
    assert stage.fn is WatchedStageUDF
    assert stage.map_batches_kwargs["num_cpus"] == 1
    assert stage.map_batches_kwargs.get("num_gpus", 0) == 0
    assert stage.map_batches_kwargs["max_restarts"] == 2
    assert stage.fn_constructor_kwargs["sampling"]["extra_args"]["metis_detector"] == "metis"


def test_an_engine_on_one_gpu_asks_for_it() -> None:
    assert stage_of(on_cpu=False).map_batches_kwargs["num_gpus"] == 1


def test_an_engine_over_two_gpus_leaves_them_to_its_own_workers() -> None:
    stage = stage_of(on_cpu=False, tensor_parallel_size=2)
    assert stage.map_batches_kwargs["num_gpus"] == 0
    _, _, placement = stage.map_batches_kwargs["ray_remote_args_fn"].args
    assert placement == {"bundles": [{"GPU": 1, "CPU": 1}] * 2, "strategy": "PACK"}
