"""The folder of a run: where it may lie, and the copy of the data that the run keeps to."""

from __future__ import annotations

import shutil
from pathlib import Path

from sparkray.config.grpo import GrpoConfig
from sparkray.errors import NotFoundError, UsageError

# Where Ray unpacks a job's `--working-dir`; it is deleted after the job.
_RAY_WORKING_DIRS = "working_dir_files"
DATA = "data"


def lasting_folder(output_dir: str) -> Path:
    """The output folder as an absolute path.

    Raises:
        UsageError: it would go away with the job.
    """
    folder = Path(output_dir).expanduser()
    if not folder.is_absolute() and _RAY_WORKING_DIRS in Path.cwd().parts:
        raise UsageError(
            f"output_dir {output_dir!r} lies in the job's copy of the working directory, which Ray deletes after it.",
            hint="Give an absolute path that all nodes see.",
            param="output_dir",
        )
    return folder.absolute()


def with_own_data(config: GrpoConfig, run_dir: Path) -> GrpoConfig:
    """The settings with the run's own copies of its datasets, which all nodes see and nobody changes under the run.

    Raises:
        NotFoundError: a dataset that does not exist.
        UsageError: the run has begun with other rows.
    """
    changes = {}
    for name in ("dataset", "eval_dataset"):
        given = getattr(config, name)
        if given is None:
            continue
        source = Path(given).expanduser().absolute()
        if not source.is_file():
            raise NotFoundError(f"{name} {given!r} was given, and there is no such file.", param=name)
        own = run_dir / DATA / f"{name}{source.suffix}"
        if not own.exists():
            own.parent.mkdir(parents=True, exist_ok=True)
            draft = own.with_name(f"{own.name}.tmp")
            shutil.copyfile(source, draft)
            draft.replace(own)
        elif own.read_bytes() != source.read_bytes():
            raise UsageError(
                f"{run_dir} holds a run on other rows: {name} {given!r} has changed since it began.",
                hint="Give the same rows to go on with it, or another run_name to start anew.",
                param=name,
            )
        changes[name] = str(own)
    return config.model_copy(update=changes)
