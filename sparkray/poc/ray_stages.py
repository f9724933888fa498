"""A model whose blocks lie on several nodes: an actor a node, and between them the state travels as objects of Ray.

A micro-batch's state goes from one stage's node to the next one's without a stop at the group's own process, and an
actor works through its calls in their order, so while one micro-batch is in the second node the next is in the first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import torch
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from sparkray.poc.device_weights import load_weights
from sparkray.poc.devices import prepare_dtype, resolve_device
from sparkray.poc.fleet.messages import Run
from sparkray.poc.groups import GroupShape
from sparkray.poc.model import ReadWeight
from sparkray.poc.pipeline import Stage, micro_batches, split_layers
from sparkray.poc.tuning import choose_batch_size, memory_bound

_LOAD_SECONDS = 1800.0
_BATCH_SECONDS = 600.0


class PocStageActor:
    """Neighbouring blocks on the devices of one node, a run of them a device."""

    def __init__(self, run: Run, layers: list[range], device: str) -> None:
        devices = [resolve_device(f"{device}:{index}" if device == "cuda" else device) for index in range(len(layers))]
        dtype = prepare_dtype(devices[0])

        def load(names: frozenset[str] | None, on: torch.device) -> ReadWeight:
            return load_weights(run.block_hash, run.params, run.weights, on, dtype, names)

        self._stages = [Stage(run.params, part, load, on, dtype) for part, on in zip(layers, devices, strict=True)]
        self._bound = min(memory_bound(run.params, on) for on in devices)

    def memory_bound(self) -> int:
        """The largest batch that the memory left by the weights holds."""
        return self._bound

    def run(self, hidden_BSD: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The state after these blocks, or from the last of all logits (B, V)."""
        # A copy: what Ray hands over may not be written, and torch warns of that.
        state_BSD = torch.from_numpy(hidden_BSD.copy())
        for stage in self._stages:
            state_BSD = stage(state_BSD)
        after: npt.NDArray[Any] = state_BSD.cpu().numpy()
        return after


class RayStages:
    """The forward pass over the nodes of the placement group that this process belongs to; in and out are here.

    The stages end with this process, which owns them.

    Raises:
        ray.exceptions.RayError: a stage could not load, or is lost.
    """

    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, run: Run, shape: GroupShape) -> None:
        self.params = run.params
        a_node = max(1, shape.num_gpus)
        layers = split_layers(run.params.n_layers, a_node * shape.num_nodes)
        place = ray.util.get_current_placement_group()
        self._num_stages = len(layers)
        self._actors = [
            ray.remote(PocStageActor)
            .options(
                # The bundle has set the CPUs aside.
                num_cpus=0,
                num_gpus=shape.num_gpus,
                scheduling_strategy=PlacementGroupSchedulingStrategy(place, placement_group_bundle_index=node),
            )
            .remote(run, layers[node * a_node : (node + 1) * a_node], "cuda" if shape.num_gpus else "cpu")
            for node in range(shape.num_nodes)
        ]
        bounds: list[int] = ray.get([actor.memory_bound.remote() for actor in self._actors], timeout=_LOAD_SECONDS)
        self._bound = min(bounds)

    def choose_batch_size(self) -> int:
        """Measured, within what the fullest node holds."""
        return choose_batch_size(self, self._bound)

    def last_logits(self, inputs_BSD: torch.Tensor) -> torch.Tensor:
        """Logits of the last position, (B, V) float32."""
        refs = []
        for part_BSD in micro_batches(inputs_BSD, self._num_stages):
            state: Any = part_BSD.numpy()
            for actor in self._actors:
                state = actor.run.remote(state)
            refs.append(state)
        logits: list[npt.NDArray[np.float32]] = ray.get(refs, timeout=_BATCH_SECONDS)
        return torch.from_numpy(np.concatenate(logits))
