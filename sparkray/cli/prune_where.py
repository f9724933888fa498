"""Where a prune runs: in this process, or over the Ray cluster that runs here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparkray.config.pruning import ActorConfig
    from sparkray.pruning.pipeline import Observe
    from sparkray.pruning.rewrite import ShardRunner


@contextmanager
def run_place(actors: ActorConfig, *, on_ray: bool) -> Iterator[tuple[Observe, ShardRunner]]:
    """(how shards of data are observed, how shards of the checkpoint are written).

    Raises:
        UnavailableError: `on_ray`, and no cluster answers.
    """
    if not on_ray:
        from sparkray.pruning.observation import observe

        yield observe, map
        return
    from sparkray.cluster.connection import cluster_connection
    from sparkray.pruning.actors import cluster_observe, shard_writer_tasks

    with cluster_connection():
        yield cluster_observe(actors), shard_writer_tasks
