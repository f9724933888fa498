"""Distil on a cluster: `ray job submit --working-dir . -- python jobs/distill.py --pack P --out O --store S`.

Submitted again with the same settings it goes on from the last checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparkray.cli.entry import run_job
from sparkray.config.distill import TrainJobConfig


def distil(config: TrainJobConfig, quiet: bool) -> Mapping[str, Any]:
    """Train a student from a pack and a teacher's rows, on as many workers as the settings say."""
    from sparkray.cluster.connection import cluster_connection
    from sparkray.distill.training.ray_run import train_on_cluster

    with cluster_connection():
        return train_on_cluster(config)


if __name__ == "__main__":
    run_job(TrainJobConfig, distil)
