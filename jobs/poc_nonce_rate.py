"""Nonces a minute of every worker and of all, and init time: `ray job submit ... -- python jobs/poc_nonce_rate.py`.

CUDA_VISIBLE_DEVICES bounds the GPUs that are used. Nothing else on them is touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparkray.cli.entry import run_job
from sparkray.config.poc_jobs import PocNonceRateConfig


def measure(config: PocNonceRateConfig, quiet: bool) -> Mapping[str, Any]:
    """Raw and valid nonces a minute, by worker and in all, start and model TFLOP/s."""
    from sparkray.cluster.connection import cluster_connection
    from sparkray.poc.live_table import LiveTable
    from sparkray.poc.ray_jobs import nonce_rate

    with cluster_connection(), LiveTable(quiet=quiet) as table:
        return nonce_rate(config, table.show)


if __name__ == "__main__":
    run_job(PocNonceRateConfig, measure)
