"""The Ray edge of a fleet: one actor a group, each on a placement group of its own.

A group's devices of one node are one bundle, and most groups have no other, so a lost node takes its own groups alone:
Ray places those bundles anew as soon as there is room, and the controller launches workers that go on from the record.
A group over several nodes has a bundle on each, and actors for its stages there (`ray_stages`).
"""

from __future__ import annotations

import socket
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from sparkray.config.poc import PocServiceConfig
from sparkray.errors import SparkrayError, UnavailableError
from sparkray.poc.fleet.controller import Controller, FleetLimits
from sparkray.poc.fleet.ledger import Ledger
from sparkray.poc.fleet.messages import Ack, CheckChunk, GroupPlace, Run, WorkerHandle, WorkerLostError, WorkerReport
from sparkray.poc.fleet.runner import STOP_TIMEOUT_SECONDS, FleetRunner
from sparkray.poc.fleet.worker import GroupWorker
from sparkray.poc.groups import GroupShape, device_vram, gpu_shapes
from sparkray.poc.phases import Phase
from sparkray.poc.planner import peak_tflops
from sparkray.poc.ray_metrics import FleetMetrics
from sparkray.poc.validation import NoiseBand

# A phase change waits in one call, questions come beside it, and one is in reserve.
_CALLS_AT_ONCE = 4
_PROBE_SECONDS = 60.0
_GIB = 1024**3

AnswerT = TypeVar("AnswerT")


class PocGroupActor:
    """A group's worker in a process of its own."""

    def __init__(
        self, run: Run, place: GroupPlace, phase: Phase, generation: int, config: PocServiceConfig, shape: GroupShape
    ) -> None:
        def make_engine() -> Any:
            from sparkray.poc.engine import Engine

            engine = partial(
                Engine,
                run.block_hash,
                run.params,
                run.weights,
                prep_threads=config.num_prep_threads,
                prep_depth=config.prep_depth,
            )
            if shape.num_nodes == 1:
                # Ray shows a process its own GPUs alone, so they are always the first ones.
                device = "cuda" if shape.num_gpus else "cpu"
                return engine(device=device, num_devices=max(1, shape.num_gpus), batch_size=config.batch_size)
            from sparkray.poc.ray_stages import RayStages

            stages = RayStages(run, shape)
            # The network's formulas know the devices of one node.
            size = config.batch_size if isinstance(config.batch_size, int) else stages.choose_batch_size()
            return engine(device="cpu", model=stages, batch_size=size)

        self._worker = GroupWorker(run, place, phase, generation, make_engine, config.max_buffered_batches)
        self._worker.start()

    def set_phase(self, phase: Phase, generation: int) -> Ack:
        """See GroupWorker."""
        return self._worker.set_phase(phase, generation)

    def collect(self, committed: int) -> WorkerReport:
        """See GroupWorker."""
        return self._worker.collect(committed)

    def check(self, chunks: tuple[CheckChunk, ...]) -> None:
        """See GroupWorker."""
        self._worker.check(chunks)


class RayHandle:
    """An actor as the controller sees it: futures of this process instead of references of Ray."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def set_phase(self, phase: Phase, generation: int) -> Future[Ack]:
        return _plain(self.actor.set_phase.remote(phase, generation))

    def collect(self, committed: int) -> Future[WorkerReport]:
        return _plain(self.actor.collect.remote(committed))

    def check(self, chunks: tuple[CheckChunk, ...]) -> Future[None]:
        return _plain(self.actor.check.remote(chunks))

    def end(self) -> None:
        ray.kill(self.actor, no_restart=True)


class RayLauncher:
    """Launches workers on placement groups that live as long as the launcher."""

    def __init__(self, shapes: list[GroupShape], config: PocServiceConfig) -> None:
        self._config = config
        self._shapes = shapes
        # Bundles of one group are there for different nodes; it has no say in a group of one.
        self._places: list[PlacementGroup] = [
            placement_group(shape.bundles, strategy="STRICT_SPREAD") for shape in shapes
        ]

    def __call__(self, run: Run, place: GroupPlace, phase: Phase, generation: int) -> WorkerHandle:
        shape = self._shapes[place.group_id]
        actor = (
            ray.remote(PocGroupActor)
            .options(
                num_cpus=shape.num_cpus,
                # The stages of several nodes have the GPUs; who leads them needs none.
                num_gpus=shape.num_gpus if shape.num_nodes == 1 else 0,
                max_concurrency=_CALLS_AT_ONCE,
                # The controller restarts it, since only the record knows where to go on.
                max_restarts=0,
                max_task_retries=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self._places[place.group_id], placement_group_bundle_index=0
                ),
            )
            .remote(run, place, phase, generation, self._config, shape)
        )
        return RayHandle(actor)

    def close(self) -> None:
        """Give the resources back."""
        for place in self._places:
            remove_placement_group(place)


class RayFleet(FleetRunner):
    """A fleet whose workers are actors; their places go with it.

    Attributes:
        peak_tflops: of all its GPUs together; None where it is not known.
    """

    def __init__(self, controller: Controller, launcher: RayLauncher, peak_tflops: float | None) -> None:
        self.peak_tflops = peak_tflops
        metrics = FleetMetrics(controller.run.params, peak_tflops)
        super().__init__(controller, lambda summary: metrics.publish(summary, controller.ledger.num_unsent()))
        self._launcher = launcher

    def stop(self, timeout_seconds: float = STOP_TIMEOUT_SECONDS) -> bool:
        """See FleetRunner."""
        drained = super().stop(timeout_seconds)
        self._launcher.close()
        return drained


def start_fleet(run: Run, ledger: Ledger, config: PocServiceConfig) -> RayFleet:
    """Launch the groups of a run on the connected cluster; returns before they are loaded.

    Raises:
        UnavailableError: no device of the cluster can hold the model.
    """
    shapes = group_shapes(run, config)
    launcher = RayLauncher(shapes, config)
    limits = FleetLimits(
        poll_seconds=config.poll_seconds,
        max_unsent=config.max_unsent,
        max_batches=config.max_batches,
        deadline_seconds=config.deadline_seconds,
        band=NoiseBand(config.noise_sd),
    )
    fleet = RayFleet(Controller(run, len(shapes), ledger, launcher, limits), launcher, _peak_tflops(shapes))
    fleet.start()
    return fleet


def group_shapes(run: Run, config: PocServiceConfig) -> list[GroupShape]:
    """The groups that the cluster's devices make, or as many as the settings ask for.

    Raises:
        UnavailableError: CUDA was asked for and there is none, no group of devices can hold the model, or a group
            shall have more nodes than there are.
    """
    on_cuda = config.device == "cuda" or (config.device == "auto" and ray.cluster_resources().get("GPU", 0) >= 1)
    num_nodes, num_cpus = config.num_nodes_per_group, config.num_cpus_per_group
    if on_cuda:
        needed = partial(device_vram, run.params, run.weights)
        shapes = gpu_shapes(_read_gpu_memory(), needed, num_cpus, num_nodes)
        return shapes[: config.num_groups] if config.num_groups else shapes
    num_alive = sum(1 for node in ray.nodes() if node["Alive"])
    if num_alive < num_nodes:
        raise UnavailableError(
            f"num_nodes_per_group={num_nodes} was given, and the cluster has {num_alive} nodes.",
            param="num_nodes_per_group",
        )
    return [GroupShape(0, num_cpus, num_nodes)] * (config.num_groups or num_alive // num_nodes)


def _peak_tflops(shapes: list[GroupShape]) -> float | None:
    """Of the groups' GPUs, by the name that Ray gives to those of each node; not known where names are mixed."""
    prefix = "accelerator_type:"
    kinds = {
        resource.removeprefix(prefix)
        for node in ray.nodes()
        if node["Alive"]
        for resource in node["Resources"]
        if resource.startswith(prefix)
    }
    num_gpus = sum(shape.num_gpus * shape.num_nodes for shape in shapes)
    return peak_tflops([*kinds] * num_gpus) if len(kinds) == 1 else None


def _read_gpu_memory() -> list[list[float]]:
    """Memory of every GPU in GiB, node by node; of a unified one, the machine's."""

    def probe() -> list[float]:
        from sparkray.hardware.probes import read_gpus, read_memory

        total = read_memory().total_bytes
        return [(gpu.memory_total_bytes or total) / _GIB for gpu in read_gpus()]

    remote = ray.remote(num_cpus=0)(probe)
    refs = [
        remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote()
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("GPU", 0) >= 1
    ]
    try:
        found: list[list[float]] = ray.get(refs, timeout=_PROBE_SECONDS)
    except (GetTimeoutError, RayError) as failure:
        raise UnavailableError(f"the GPUs of the cluster cannot be read: {failure}.") from failure
    return found


def _plain(ref: ray.ObjectRef) -> Future[AnswerT]:
    """A future that fails with an error of ours: the worker's own, or that it is lost."""
    answer: Future[AnswerT] = Future()

    def copy(source: Future[AnswerT]) -> None:
        failure = source.exception()
        if failure is None:
            answer.set_result(source.result())
        else:
            answer.set_exception(_ours(failure))

    ref.future().add_done_callback(copy)
    return answer


def _ours(failure: BaseException) -> SparkrayError:
    cause = failure.cause if isinstance(failure, RayTaskError) else failure
    if isinstance(cause, SparkrayError):
        return cause
    return WorkerLostError(f"{type(failure).__name__} on {socket.gethostname()}: {failure}"[:500])
