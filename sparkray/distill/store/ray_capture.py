"""Filling a store with Ray Data: each actor holds a teacher and takes shards; what is finished is not done again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparkray.config.distill import ClientConfig, StoreConfig, TeacherConfig
from sparkray.distill.data.pack import read_pack
from sparkray.distill.store.capture import finish_store, score_shard, sequence_scorer, store_header
from sparkray.distill.store.manifest import Manifest, begin_store, read_header
from sparkray.distill.store.shards import finished_shard
from sparkray.distill.teachers.create import create_teacher


class ShardScorer:
    """One worker of the capture: loads the teacher once, then scores shards by number."""

    def __init__(
        self, folder: str, pack: str, teacher: TeacherConfig, store: StoreConfig, client: ClientConfig
    ) -> None:
        self._folder = Path(folder)
        self._pack = read_pack(Path(pack))
        self._teacher = create_teacher(teacher, store, client)
        self._score = sequence_scorer(self._teacher, store, teacher.overlap_tokens)
        self._header = store_header(self._pack, self._teacher.identity, store)
        begin_store(self._folder, self._header)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        for shard in batch["shard"]:
            score_shard(self._folder, self._pack, self._header, int(shard), self._score)
        return batch


def capture_with_ray(
    folder: Path,
    pack_folder: Path,
    teacher: TeacherConfig,
    store: StoreConfig,
    client: ClientConfig,
    *,
    num_workers: int,
    num_gpus_per_worker: float = 0.0,
) -> Manifest:
    """Score what is missing on `num_workers` actors of the connected cluster; the folder must be one that all see.

    Raises:
        UsageError: the folder belongs to another store.
    """
    import ray

    num_shards = -(-len(read_pack(pack_folder).train) // store.shard_sequences)
    missing = [shard for shard in range(num_shards) if finished_shard(folder, shard) is None]
    if missing:
        # The workers know the teacher, so they claim the folder, and refuse one that is another store's.
        ray.data.from_items([{"shard": shard} for shard in missing]).map_batches(
            ShardScorer,
            batch_size=1,
            concurrency=min(num_workers, len(missing)),
            num_gpus=num_gpus_per_worker,
            fn_constructor_kwargs={
                "folder": str(folder),
                "pack": str(pack_folder),
                "teacher": teacher,
                "store": store,
                "client": client,
            },
        ).materialize()
    return finish_store(folder, read_header(folder))
