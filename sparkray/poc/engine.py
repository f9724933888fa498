"""The engine: weights of one block on one device, and nonces through them as fast as the device goes."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt
import torch

from sparkray.config.poc import BatchSize, ModelParams, WeightsConfig
from sparkray.poc.batch_size import formula_batch_size
from sparkray.poc.device_weights import load_weights
from sparkray.poc.devices import prepare_dtype, resolve_device
from sparkray.poc.inputs import draw_target
from sparkray.poc.model import Forward, ReadWeight, Transformer
from sparkray.poc.pipeline import PipelinedTransformer
from sparkray.poc.prep import PrepRing, Slot
from sparkray.poc.steps import CpuStep, CudaStep, Pending, Step
from sparkray.poc.tuning import choose_batch_size, memory_bound

DEFAULT_PREP_THREADS = 2
DEFAULT_PREP_DEPTH = 3


@dataclass(frozen=True, slots=True)
class Computed:
    """Distances of one batch, pairwise with its nonces."""

    nonces: tuple[int, ...]
    dist: npt.NDArray[np.float64]


class Engine:
    """Computes distances for one block hash.

    float16 with float32 accumulation on CUDA, as the network computes; float32 on a CPU, where float16 is several
    times slower. Both read the same float16 weights and inputs.

    Args:
        batch_size: nonces in a batch; None measures which size is fastest within the memory that is free, and `v1`
            and `v2` are the network's formulas.
        prep_threads: threads that make inputs ahead.
        prep_depth: batches that are made ahead.
        graphs: CUDA graphs, on CUDA and one device.
        num_devices: neighbouring devices, from `device` on, that share the blocks; on a CPU they are logical.
        model: computes instead of one that is loaded here; its logits arrive on `device`.
    """

    def __init__(
        self,
        block_hash: str,
        params: ModelParams,
        weights: WeightsConfig,
        *,
        device: str = "auto",
        batch_size: BatchSize = None,
        prep_threads: int = DEFAULT_PREP_THREADS,
        prep_depth: int = DEFAULT_PREP_DEPTH,
        graphs: bool = True,
        num_devices: int = 1,
        model: Forward | None = None,
    ) -> None:
        self.block_hash = block_hash
        self.params = params
        self.weights = weights
        self.device = resolve_device(device)
        self._prep_threads = prep_threads
        self._prep_depth = prep_depth
        devices = self._devices(num_devices)
        # The formulas count the weights themselves, so they come first.
        size = formula_batch_size(batch_size, params, devices) if isinstance(batch_size, str) else batch_size
        self._model = model or self._load(devices, prepare_dtype(self.device))
        self._target_V = torch.from_numpy(draw_target(block_hash, params.vocab_size))
        self.batch_size = size or choose_batch_size(self._model, memory_bound(params, self.device))
        self._step: Step = (
            CudaStep(self._model, self._target_V, self.batch_size, graphs=graphs and num_devices == 1)
            if self.device.type == "cuda"
            else CpuStep(self._model, self._target_V)
        )

    def _devices(self, num_devices: int) -> list[torch.device]:
        if self.device.type != "cuda" or num_devices == 1:
            return [self.device] * num_devices
        first = self.device.index or 0
        return [resolve_device(f"cuda:{first + offset}") for offset in range(num_devices)]

    def _load(self, devices: Sequence[torch.device], dtype: torch.dtype) -> Forward:
        def load(names: frozenset[str] | None, device: torch.device) -> ReadWeight:
            return load_weights(self.block_hash, self.params, self.weights, device, dtype, names)

        if len(devices) == 1:
            return Transformer(self.params, load(None, self.device), self.device, dtype)
        return PipelinedTransformer(self.params, load, devices, dtype)

    def stream(self, public_key: str, nonces: Iterable[int]) -> Generator[Computed]:
        """Distances of `nonces` (endless ones too), batch by batch in their order.

        Closing the iterator stops the preparation; nonces that were drawn from `nonces` but not given back are
        lost to it, so keep a cursor of what came out.
        """
        ring = PrepRing(
            self.block_hash,
            public_key,
            self.params,
            batched(nonces, self.batch_size),
            batch_size=self.batch_size,
            depth=self._prep_depth,
            num_threads=self._prep_threads,
            pinned=self.device.type == "cuda",
        )
        with ring:
            earlier: tuple[tuple[int, ...], Pending] | None = None
            while (slot := ring.take()) is not None:
                current = self._submit(ring, slot)
                if earlier is not None:
                    yield Computed(earlier[0], earlier[1].result())
                earlier = current
            if earlier is not None:
                yield Computed(earlier[0], earlier[1].result())

    def distances(self, public_key: str, nonces: Sequence[int]) -> npt.NDArray[np.float64]:
        """Distances of these nonces, in their order."""
        parts = [computed.dist for computed in self.stream(public_key, nonces)]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.float64)

    def _submit(self, ring: PrepRing, slot: Slot) -> tuple[tuple[int, ...], Pending]:
        pending = self._step.submit(slot)
        nonces = slot.nonces
        pending.wait_copied()
        ring.release(slot)
        return nonces, pending


def batched(nonces: Iterable[int], size: int) -> Iterator[tuple[int, ...]]:
    """Neighbouring tuples of `size`, the last one shorter."""
    source = iter(nonces)
    while batch := tuple(islice(source, size)):
        yield batch
