"""Train by GRPO: `ray job submit --working-dir . -- python jobs/train_grpo.py --config configs/grpo/embedded.toml`.

Submitted again with the same settings it goes on from the last checkpoint. docs/grpo.md says more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparkray.cli.entry import run_job
from sparkray.config.grpo import GrpoConfig


def train(config: GrpoConfig, quiet: bool) -> Mapping[str, Any]:
    """Draw, score, train and push until the dataset was passed over as often as asked."""
    from sparkray.cluster.connection import cluster_connection
    from sparkray.grpo.ray_run import train_run
    from sparkray.serving.app import engine_kwargs

    with cluster_connection():
        return train_run(config, engine_arguments=engine_kwargs)


if __name__ == "__main__":
    run_job(GrpoConfig, train)
