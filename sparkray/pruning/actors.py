"""Observation over a Ray cluster: one actor a node, whole models or runs of layers; and shards rewritten as tasks.

The driver alone writes partial sums, one file a shard, when a shard is whole. An actor that dies is made anew on its
node, or given up with it, and its shard is run again: what it had done is in no file, so nothing counts twice.
Nodes need no shared folder, but the same model directory at the same path; its identity is compared.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnschedulableError, GetTimeoutError, ObjectLostError, RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sparkray.config.pruning import ActorConfig, ObserveConfig
from sparkray.errors import InputError, SparkrayError, UnavailableError, WaitTimeoutError
from sparkray.pruning.calibration import CalibrationSet, CalibrationShard
from sparkray.pruning.checkpoint import Checkpoint
from sparkray.pruning.layer_range import Hidden, LayerRangeObserver
from sparkray.pruning.layered_model import resolve_dtype
from sparkray.pruning.observation import Progress, ShardObserver, available_bytes, check_data, shard_groups
from sparkray.pruning.partials import PartialStore
from sparkray.pruning.placement import choose_placement, layer_parts
from sparkray.pruning.statistics import Array, Statistics
from sparkray.pruning.surgery import ShardCut, ShardRecord

Arrays = Mapping[str, Array]
_TASKS_A_CPU = 2
_SHARD_SECONDS = 3600.0


class ObserverActor:
    """A model, or a run of its layers, on one node. What it holds is read on first use, so a new one is as good.

    Args:
        directory: the model, on this node.
        identity: the identity that the driver's copy has.
        device: torch device of the forwards.
    """

    def __init__(self, directory: str, identity: str, device: str) -> None:
        self._directory = Path(directory)
        self._identity = identity
        self._device = device
        self._config: ObserveConfig | None = None
        self._layers: tuple[int, int] | None = None

    def available_bytes(self) -> int:
        """Memory that a model may take here; the model's copy on this node is checked on the way."""
        checkpoint = Checkpoint(self._directory)
        if checkpoint.identity != self._identity:
            raise InputError(
                f"{self._directory} on node {ray.util.get_node_ip_address()} is another model than the driver's.",
                hint="Copy the same directory to every node.",
            )
        return available_bytes(self._device)

    def prepare(self, config: ObserveConfig, layers: tuple[int, int] | None) -> None:
        """Say how the forwards run, and which layers (first, one past the last) are held here; None for all."""
        self._config = config
        self._layers = layers

    def observe_shards(self, shards: Sequence[CalibrationShard]) -> list[Arrays]:
        """Sums of every shard."""
        return [statistics.to_arrays() for statistics in self._whole.observe(shards)]

    def observe_layers(self, shard: CalibrationShard, hidden: Hidden | None) -> tuple[Hidden, Arrays]:
        """Hidden states after this node's layers, and the sums of those layers."""
        after, statistics = self._range.observe(shard, hidden)
        return after, statistics.to_arrays()

    @cached_property
    def _whole(self) -> ShardObserver:
        assert self._config is not None
        return ShardObserver(Checkpoint(self._directory), self._config)

    @cached_property
    def _range(self) -> LayerRangeObserver:
        assert self._config is not None and self._layers is not None
        return LayerRangeObserver(Checkpoint(self._directory), self._config, range(*self._layers))


def cluster_observe(
    actors: ActorConfig,
) -> Callable[[Checkpoint, CalibrationSet, ObserveConfig, PartialStore, Progress | None], Statistics]:
    """A function like `observation.observe` that runs on the Ray cluster this process is connected to.

    It raises UnavailableError where no node can run an actor, or a shard failed `max_attempts` times because actors
    died under it, and WaitTimeoutError where a shard took longer than `shard_timeout_seconds`.
    """

    def observe(
        checkpoint: Checkpoint,
        data: CalibrationSet,
        config: ObserveConfig,
        store: PartialStore,
        progress: Progress | None = None,
    ) -> Statistics:
        check_data(checkpoint, data)
        shards = data.shards(config.shard_sequences)
        missing = [shard for shard in shards if not store.has(shard.number)]
        if missing:
            run = _ClusterRun(checkpoint, config, actors)
            try:
                for number, statistics in run.observe(missing):
                    store.write(number, statistics)
                    if progress is not None:
                        progress(sum(store.has(shard.number) for shard in shards), len(shards))
            finally:
                run.close()
        return store.merged(len(shards))

    return observe


@dataclass(slots=True)
class _Seat:
    """A node's place for an actor; the actor in it may be replaced."""

    node_id: str
    actor: Any = None
    layers: tuple[int, int] | None = None


@dataclass
class _ClusterRun:
    checkpoint: Checkpoint
    config: ObserveConfig
    actors: ActorConfig
    _seats: list[_Seat] = field(default_factory=list)
    _attempts: Counter[int] = field(default_factory=Counter)

    def observe(self, shards: Sequence[CalibrationShard]) -> Iterator[tuple[int, Statistics]]:
        """(shard number, its sums) of every shard, in the order in which they are finished."""
        self._seats = [_Seat(node_id) for node_id in _node_ids()]
        placement = choose_placement(self.checkpoint, self.config, self._fill_seats())
        self.config = self.config.model_copy(update={"placement": placement})
        if placement == "layers":
            itemsize = resolve_dtype(self.config.dtype, self.checkpoint).itemsize
            parts = layer_parts(self.checkpoint, itemsize, len(self._seats))
            for seat in self._seats[len(parts) :]:
                self._give_up(seat)
            for seat, part in zip(self._seats, parts, strict=True):
                seat.layers = (part.start, part.stop)
        for seat in self._seats:
            seat.actor.prepare.remote(self.config, seat.layers)
        yield from self._through_layers(shards) if placement == "layers" else self._data_parallel(shards)

    def close(self) -> None:
        for seat in self._seats:
            self._empty(seat)

    def _data_parallel(self, shards: Sequence[CalibrationShard]) -> Iterator[tuple[int, Statistics]]:
        stripe = -(-len(shards) // len(self._seats))
        queue: deque[Sequence[CalibrationShard]] = deque()
        for start in range(0, len(shards), stripe):
            queue.extend(shard_groups(shards[start : start + stripe], self.checkpoint, self.config))
        running: dict[Any, tuple[_Seat, Sequence[CalibrationShard]]] = {}
        while queue or running:
            busy = {seat.node_id for seat, _ in running.values()}
            for seat in self._seats:
                if queue and seat.node_id not in busy:
                    together = queue.popleft()
                    running[seat.actor.observe_shards.remote(together)] = (seat, together)
            reference = self._next(list(running))
            seat, together = running.pop(reference)
            try:
                found = _take(reference)
            except RayActorError as died:
                self._replace(seat, [shard.number for shard in together], died)
                queue.appendleft(together)
                continue
            for shard, arrays in zip(together, found, strict=True):
                yield shard.number, Statistics.from_arrays(arrays)

    def _through_layers(self, shards: Sequence[CalibrationShard]) -> Iterator[tuple[int, Statistics]]:
        """Shards one behind the other through all nodes; hidden states go from node to node, not by the driver."""
        queue = deque(shards)
        running: dict[Any, tuple[CalibrationShard, list[Any]]] = {}
        while queue or running:
            while queue and len(running) < len(self._seats):
                shard = queue.popleft()
                references = self._send(shard)
                running[references[-1]] = (shard, references)
            reference = self._next(list(running))
            shard, references = running.pop(reference)
            try:
                parts = [_take(part) for part in references]
            except (RayActorError, ObjectLostError) as died:
                # A dead node breaks every shard on its way: all of them start again at the first layer.
                broken = [shard, *(other for other, _ in running.values())]
                running.clear()
                self._replace_dead([shard.number], died)
                queue.extendleft(reversed(broken))
                continue
            yield shard.number, Statistics.merged(Statistics.from_arrays(arrays) for arrays in parts)

    def _send(self, shard: CalibrationShard) -> list[Any]:
        hidden: Any = None
        sums = []
        for seat in self._seats:
            hidden, part = seat.actor.observe_layers.options(num_returns=2).remote(shard, hidden)
            sums.append(part)
        return sums

    def _next(self, references: list[Any]) -> Any:
        ready, _ = ray.wait(references, num_returns=1, timeout=self.actors.shard_timeout_seconds)
        if not ready:
            raise WaitTimeoutError(
                f"no shard was finished within {self.actors.shard_timeout_seconds:g} s.",
                hint="Take smaller shards (observe.shard_sequences), or raise actors.shard_timeout_seconds.",
            )
        return ready[0]

    def _fill_seats(self) -> list[int]:
        """Put an actor into every seat and ask it for its memory; seats of nodes that cannot have one are given up."""
        for seat in self._seats:
            seat.actor = self._new_actor(seat)
        asked = {seat.actor.available_bytes.remote(): seat for seat in self._seats}
        ready, late = ray.wait(list(asked), num_returns=len(asked), timeout=self.actors.start_timeout_seconds)
        for reference in late:
            self._give_up(asked[reference])
        memory = []
        for reference in ready:
            try:
                memory.append(_take(reference))
            except (RayActorError, ActorUnschedulableError):
                self._give_up(asked[reference])
        if not memory:
            raise UnavailableError(
                f"no node of the cluster could start an observer within {self.actors.start_timeout_seconds:g} s.",
                hint=f"Each needs {self.actors.num_cpus:g} free CPUs and {self._num_gpus:g} GPUs: see `ray status`.",
            )
        return memory

    def _replace(self, seat: _Seat, numbers: Sequence[int], died: Exception) -> None:
        """A new actor for the seat, or no seat where its node is gone."""
        for number in numbers:
            self._attempts[number] += 1
            if self._attempts[number] >= self.actors.max_attempts:
                raise UnavailableError(
                    f"shard {number} was tried {self.actors.max_attempts} times and its actor died each time: {died}",
                    hint="See `ray logs` for why; finished shards are kept, and a new run goes on from them.",
                ) from died
        self._empty(seat)
        if seat.node_id not in _node_ids():
            self._give_up(seat)
            if not self._seats or seat.layers is not None:
                raise UnavailableError(
                    f"node {seat.node_id[:12]} left the cluster.", hint="Run again: finished shards are kept."
                ) from died
            return
        seat.actor = self._new_actor(seat)
        seat.actor.prepare.remote(self.config, seat.layers)

    def _replace_dead(self, numbers: Sequence[int], died: Exception) -> None:
        asked = {seat.actor.available_bytes.remote(): seat for seat in self._seats}
        ray.wait(list(asked), num_returns=len(asked), timeout=self.actors.start_timeout_seconds)
        for reference, seat in asked.items():
            try:
                ray.get(reference, timeout=0)
            except (RayActorError, GetTimeoutError):
                self._replace(seat, numbers, died)
                numbers = ()  # one death is one attempt, however many actors it took along

    def _new_actor(self, seat: _Seat) -> Any:
        options: dict[str, Any] = {
            "num_cpus": self.actors.num_cpus,
            "num_gpus": self._num_gpus,
            "max_restarts": 0,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(seat.node_id, soft=False),
        }
        arguments = (str(self.checkpoint.directory.resolve()), self.checkpoint.identity, self.config.device)
        return ray.remote(ObserverActor).options(**options).remote(*arguments)

    @property
    def _num_gpus(self) -> float:
        if self.actors.num_gpus is not None:
            return self.actors.num_gpus
        return 1.0 if self.config.device.startswith("cuda") else 0.0

    def _give_up(self, seat: _Seat) -> None:
        self._empty(seat)
        self._seats = [other for other in self._seats if other is not seat]

    def _empty(self, seat: _Seat) -> None:
        if seat.actor is not None:
            ray.kill(seat.actor)
            seat.actor = None


def shard_writer_tasks(write: Callable[[ShardCut], ShardRecord], cuts: Iterable[ShardCut]) -> Iterator[ShardRecord]:
    """Like `map`, as Ray tasks on this node, where the checkpoint is; a bounded number of them at a time.

    A task that dies is run again by Ray: a shard appears under its name only when it is whole.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    task = ray.remote(write).options(num_cpus=1, max_retries=3, scheduling_strategy=here)
    limit = max(1, _TASKS_A_CPU * int(_cpus_here()))
    waiting = deque(cuts)
    running: list[Any] = []
    while waiting or running:
        while waiting and len(running) < limit:
            running.append(task.remote(waiting.popleft()))
        ready, running = ray.wait(running, num_returns=1, timeout=_SHARD_SECONDS)
        if not ready:
            raise WaitTimeoutError(f"no shard was written within {_SHARD_SECONDS:g} s.", hint="See `ray status`.")
        yield _take(ready[0])


def _take(reference: Any) -> Any:
    """The value behind a finished reference; an error of ours comes back as it was raised."""
    try:
        return ray.get(reference)
    except RayTaskError as failure:
        if isinstance(failure.cause, RayActorError | ObjectLostError | SparkrayError):
            raise failure.cause from None
        raise


def _node_ids() -> list[str]:
    return [str(node["NodeID"]) for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) > 0]


def _cpus_here() -> float:
    here = ray.get_runtime_context().get_node_id()
    return next(float(node["Resources"].get("CPU", 1)) for node in ray.nodes() if node["NodeID"] == here)
