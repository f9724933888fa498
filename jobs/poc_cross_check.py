"""The same nonces on every node of the cluster: `ray job submit ... -- python jobs/poc_cross_check.py`.

Compares rates, memory, grouping, and whether two servers come to the same verdicts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparkray.cli.entry import run_job
from sparkray.config.poc_jobs import PocCrossCheckConfig


def check(config: PocCrossCheckConfig, _: bool) -> Mapping[str, Any]:
    """Every pair of servers: noise, changed verdicts, and the share of honest nonces that noise turns invalid."""
    from sparkray.cluster.connection import cluster_connection
    from sparkray.poc.ray_jobs import check_servers

    with cluster_connection():
        return check_servers(config)


if __name__ == "__main__":
    run_job(PocCrossCheckConfig, check)
