"""Partial sums on disk: one file a shard, named by (model, data, settings, shard), written once and read once.

A file appears under its name only when it is whole, so a killed observer leaves nothing half-done, and a shard that
is observed twice is still counted once.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sparkray.config.pruning import ObserveConfig
from sparkray.errors import InputError
from sparkray.pruning.statistics import Statistics
from sparkray.pruning.whole_files import write_atomically

_KEY_CHARACTERS = 16


@dataclass(frozen=True, slots=True)
class ObservationKey:
    """What a partial sum belongs to; two of them are never added unless their keys are equal."""

    model: str
    data: str
    settings: str

    @classmethod
    def of(cls, model_identity: str, data_identity: str, config: ObserveConfig, dtype: str) -> ObservationKey:
        """The key of an observation. Placement and device are left out: they do not change what is summed."""
        relevant = [config.gate_source, config.renormalize_upstream, dtype, config.shard_sequences]
        settings = hashlib.sha256(json.dumps(relevant).encode()).hexdigest()
        return cls(model_identity, data_identity, settings)

    @property
    def folder(self) -> str:
        return "-".join(part[:_KEY_CHARACTERS] for part in (self.model, self.data, self.settings))


class PartialStore:
    """The partial sums of one observation, inside `root`."""

    def __init__(self, root: Path, key: ObservationKey) -> None:
        self.key = key
        self.directory = root / key.folder
        self.directory.mkdir(parents=True, exist_ok=True)

    def has(self, shard: int) -> bool:
        return self._path(shard).is_file()

    def write(self, shard: int, statistics: Statistics) -> None:
        """Store a shard's sums; a second write of the same shard replaces the first with the same numbers."""
        buffer = io.BytesIO()
        np.savez(buffer, **statistics.to_arrays())  # type: ignore[arg-type]
        write_atomically(self._path(shard), buffer.getvalue())

    def read(self, shard: int) -> Statistics:
        """A shard's sums.

        Raises:
            InputError: the file is damaged, by its name.
        """
        path = self._path(shard)
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return Statistics.from_arrays({name: arrays[name] for name in arrays.files})
        except (zipfile.BadZipFile, ValueError, KeyError) as failure:
            raise InputError(
                f"the partial sums {path} are damaged.", hint="Delete the file; its shard is observed again."
            ) from failure

    def merged(self, num_shards: int) -> Statistics:
        """The sum over all shards, in their order.

        Raises:
            InputError: a shard has not been observed yet.
        """
        missing = [shard for shard in range(num_shards) if not self.has(shard)]
        if missing:
            raise InputError(f"shards {missing[:8]} of {num_shards} have not been observed yet.", hint="Observe again.")
        return Statistics.merged(self.read(shard) for shard in range(num_shards))

    def _path(self, shard: int) -> Path:
        return self.directory / f"shard-{shard:05d}.npz"
