"""Answer a file of prompts with a watched model: `ray job submit --working-dir . -- python jobs/watch_prompts.py ...`.

Writes one Parquet row a prompt. Submitted again with the same output it does only what is missing.
docs/operations.md says how to submit it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from sparkray.cli.entry import run_job
from sparkray.config.batch import WatchPromptsConfig


def watch(config: WatchPromptsConfig, quiet: bool) -> Mapping[str, Any]:
    """Answer and watch every prompt of the input that the output does not hold."""
    from sparkray.metis.batch_run import BatchRun
    from sparkray.telemetry.progress import RunProgress

    with BatchRun(config) as run, RunProgress("prompts", quiet=quiet) as progress:
        progress.update(run.num_done, run.num_prompts)
        if run.missing:
            # Half a minute of imports: after all that can be refused has been.
            from sparkray.cluster.connection import cluster_connection
            from sparkray.cluster.metrics_bridge import observe_finish
            from sparkray.metis.ray_batch import answers
            from sparkray.serving.app import engine_kwargs

            hook = partial(observe_finish, model=config.model)
            with cluster_connection():
                for row in answers(config, run.missing, run.xargs, engine_arguments=engine_kwargs, on_finish=hook):
                    run.add(row)
                    progress.update(run.num_done, run.num_prompts)
    return run.summary()


if __name__ == "__main__":
    run_job(WatchPromptsConfig, watch)
