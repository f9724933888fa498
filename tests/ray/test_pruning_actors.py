"""Observation over two nodes: an actor that is killed half-way changes no bit, wherever the layers are."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparkray.cluster.processes import marked
from sparkray.config.pruning import ActorConfig, CalibrationConfig, ObserveConfig, PlanConfig, PruneConfig
from sparkray.errors import InputError, UnavailableError
from sparkray.pruning.calibration import CalibrationSet, read_calibration
from sparkray.pruning.checkpoint import Checkpoint
from sparkray.pruning.observation import observation_key, observe
from sparkray.pruning.partials import PartialStore
from sparkray.pruning.pipeline import plan_stage
from sparkray.pruning.rewrite import rewrite
from tests.ray.conftest import RayCluster

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from tiny_moe import write_inputs, write_tiny

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

NUM_SHARDS = 8
# Observing a tiny model takes milliseconds; starting a process that can, half a minute on a busy machine.
ACTORS = ActorConfig(num_cpus=1, start_timeout_seconds=240)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("moe") / "model"
    return Checkpoint(write_tiny(folder, "glm4_moe", num_hidden_layers=4, max_shard_size="100KB"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> CalibrationSet:
    inputs = write_inputs(tmp_path_factory.mktemp("data") / "inputs.json", num_batches=NUM_SHARDS, batch=2)
    return read_calibration(inputs, CalibrationConfig())


def store_of(folder: Path, checkpoint: Checkpoint, data: CalibrationSet, config: ObserveConfig) -> PartialStore:
    return PartialStore(folder, observation_key(checkpoint, data, config))


@pytest.mark.parametrize(
    "placement",
    ["resident", pytest.param("layers", marks=pytest.mark.slow), pytest.param("streaming", marks=pytest.mark.slow)],
)
def test_an_actor_that_is_killed_half_way_changes_no_bit(
    placement: str,
    checkpoint: Checkpoint,
    data: CalibrationSet,
    cluster: RayCluster,
    ray_connection: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sparkray.pruning import actors

    config = ObserveConfig.model_validate(
        {"placement": placement, "shard_sequences": 2, "micro_batch_sequences": 2, "streamed_hidden_gb": 1e-5}
    )
    made: list[int] = []
    new_actor = actors._ClusterRun._new_actor
    monkeypatch.setattr(actors._ClusterRun, "_new_actor", lambda run, seat: (made.append(1), new_actor(run, seat))[1])
    victims: list[int] = []

    def kill_one(done: int, total: int) -> None:
        assert total == NUM_SHARDS
        if done >= 3 and not victims:
            observers = [process for process in marked(cluster.session.mark) if _is_observer(process)]
            victims.append(observers[0].pid)
            observers[0].kill()

    store = store_of(tmp_path / "killed", checkpoint, data, config)
    writes: list[int] = []
    write = store.write
    monkeypatch.setattr(store, "write", lambda shard, sums: (writes.append(shard), write(shard, sums))[1])
    killed = actors.cluster_observe(ACTORS)(checkpoint, data, config, store, kill_one)
    assert victims and len(made) == 3  # one on each node, and one for the one that was killed
    assert sorted(writes) == list(range(NUM_SHARDS))
    # An actor has as many threads as it reserves CPUs, and the order of a sum may depend on it.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    here = config.model_copy(update={"placement": "resident" if placement == "resident" else "streaming"})
    alone = observe(checkpoint, data, here, store_of(tmp_path / "alone", checkpoint, data, here))
    torch.set_num_threads(threads)
    for name, array in alone.to_arrays().items():
        np.testing.assert_array_equal(killed.to_arrays()[name], array, err_msg=name)


def _is_observer(process: Any) -> bool:
    return any("ObserverActor" in word for word in process.cmdline())


def test_errors_of_a_node_come_back_as_they_were_raised(
    checkpoint: Checkpoint, data: CalibrationSet, ray_connection: None, tmp_path: Path
) -> None:
    from sparkray.pruning.actors import cluster_observe

    config = ObserveConfig(placement="resident", shard_sequences=2)
    greedy = ActorConfig(num_cpus=10_000, start_timeout_seconds=3)
    with pytest.raises(UnavailableError, match="no node of the cluster could start an observer"):
        cluster_observe(greedy)(checkpoint, data, config, store_of(tmp_path, checkpoint, data, config), None)
    moved = Checkpoint(checkpoint.directory)
    moved.__dict__["identity"] = "0" * 64
    with pytest.raises(InputError, match="is another model than the driver's"):
        cluster_observe(ACTORS)(moved, data, config, store_of(tmp_path, checkpoint, data, config), None)


def test_shards_written_by_tasks_are_the_same_bytes(
    checkpoint: Checkpoint, data: CalibrationSet, ray_connection: None, tmp_path: Path
) -> None:
    from sparkray.pruning.actors import shard_writer_tasks

    config = ObserveConfig(placement="resident", shard_sequences=2)
    sums = observe(checkpoint, data, config, store_of(tmp_path / "sums", checkpoint, data, config))
    plan = plan_stage(checkpoint, [sums], data, PruneConfig(plan=PlanConfig(ratio=0.25)))
    rewrite(checkpoint, plan, tmp_path / "here")
    summary = rewrite(checkpoint, plan, tmp_path / "tasks", run=shard_writer_tasks)
    assert summary.num_shards > 2
    for path in (tmp_path / "here").iterdir():
        assert (tmp_path / "tasks" / path.name).read_bytes() == path.read_bytes(), path.name
