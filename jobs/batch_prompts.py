"""Answer a file of prompts by a running server: `ray job submit --working-dir . -- python jobs/batch_prompts.py ...`.

Submitted again with the same output it asks only what is missing. docs/pruning.md shows a whole run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparkray.cli.entry import run_job
from sparkray.config.batch_prompts import BatchPromptsConfig


def ask(config: BatchPromptsConfig, quiet: bool) -> Mapping[str, Any]:
    """Answer every prompt of the input that the output's journal does not hold."""
    from sparkray.cli.batch import answer_printer
    from sparkray.serving.batch.run import run_batch

    return run_batch(config, answer_printer(to_stderr=quiet))


if __name__ == "__main__":
    run_job(BatchPromptsConfig, ask)
