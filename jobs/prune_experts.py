"""Prune the experts of a model on a cluster: `ray job submit --working-dir . -- python jobs/prune_experts.py ...`.

Submitted again with the same work folder it goes on where it was. docs/pruning.md says what each stage does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparkray.cli.entry import run_job
from sparkray.config.pruning import PruneJobConfig


def prune(config: PruneJobConfig, quiet: bool) -> Mapping[str, Any]:
    """Observe, plan, rewrite and check."""
    from sparkray.cli.prune_where import run_place
    from sparkray.pruning.pipeline import default_work, prune_experts
    from sparkray.telemetry.progress import RunProgress

    @contextmanager
    def bar(what: str) -> Iterator[Callable[[int, int], None]]:
        with RunProgress(what, quiet=quiet) as progress:
            yield progress.update

    model = Path(config.model)
    with run_place(config.actors, on_ray=config.on_ray) as (run_observe, run_shards):
        return prune_experts(
            model,
            config.data,
            config,
            work=Path(config.work) if config.work else default_work(model, config.data),
            out=Path(config.out) if config.out else None,
            bar=bar,
            check=config.compare,
            run_observe=run_observe,
            run_shards=run_shards,
        )


if __name__ == "__main__":
    run_job(PruneJobConfig, prune)
