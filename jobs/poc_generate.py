"""Compute nonces on all groups of the cluster, the valid ones into a file.

`ray job submit --working-dir . -- python jobs/poc_generate.py --output /data/proofs.jsonl
--config configs/poc/generate.toml`. Submitted again it goes on where it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparkray.cli.entry import run_job
from sparkray.config.poc_jobs import PocGenerateConfig


def generate(config: PocGenerateConfig, quiet: bool) -> Mapping[str, Any]:
    """Valid nonces into `output`, one ProofBatch a line, each once."""
    from sparkray.cluster.connection import cluster_connection
    from sparkray.poc.ray_jobs import generate_to_file
    from sparkray.telemetry.progress import RunProgress

    with cluster_connection(), RunProgress("nonces", quiet=quiet) as progress:
        return generate_to_file(
            config, lambda status: progress.update(min(status["num_recorded"], config.count), config.count)
        )


if __name__ == "__main__":
    run_job(PocGenerateConfig, generate)
