"""One run over a file of prompts: what may start, what is missing, what is done, and the sums of it.

Everything that can be refused is refused when a run is opened, before Ray is reached or an engine is started.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sparkray.config.batch import WatchPromptsConfig
from sparkray.errors import UsageError
from sparkray.metis.batch_input import read_prompts
from sparkray.metis.batch_output import PartWriter
from sparkray.metis.options import parse_xargs
from sparkray.metis.profile import ProfileStore
from sparkray.models import resolve_model

# Where Ray unpacks a job's `--working-dir`; it is deleted after the job.
_RAY_WORKING_DIRS = "working_dir_files"


class BatchRun:
    """An open run. Rows that were added are kept, whatever ends it.

    Attributes:
        missing: prompts that the output does not hold yet.
        num_prompts: prompts of the input.
        num_done: of those, how many the output holds or will hold when this run is closed.
        xargs: the switches of METIS for every prompt.

    Raises:
        InputError, NotFoundError, UsageError: the input, the output folder, the model or a switch is not accepted.
        UnavailableError: the output cannot be written to.
        BusyError: another run writes to it.
    """

    def __init__(self, config: WatchPromptsConfig) -> None:
        self._config = config
        self._started = time.monotonic()
        prompts = read_prompts(Path(config.input))
        self.xargs = _checked_xargs(config)
        self._folder = _lasting_folder(config.output)
        self._writer = PartWriter(
            self._folder,
            config.fixed_by_output(),
            rows_per_part=config.rows_per_part,
            part_seconds=config.part_seconds,
        )
        try:
            self.missing = self._writer.missing(prompts)
        except BaseException:
            self._writer.close()
            raise
        self.num_prompts = len(prompts)
        self._num_skipped = self.num_done = len(prompts) - len(self.missing)
        self._sums = dict.fromkeys(("num_errors", "num_tokens", "num_hedge", "num_refuse"), 0)
        self._entropy_sum_bits, self._num_entropies = 0.0, 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()

    def add(self, row: Mapping[str, Any]) -> None:
        """Take the row of one missing prompt."""
        self._writer.add(row)
        self.num_done += 1
        if row["error"] is not None:
            self._sums["num_errors"] += 1
            return
        for key in ("num_tokens", "num_hedge", "num_refuse"):
            self._sums[key] += row[key]
        known = [entropy for entropy in row["entropies"] if not math.isnan(entropy)]
        self._entropy_sum_bits += math.fsum(known)
        self._num_entropies += len(known)

    def summary(self) -> dict[str, Any]:
        """What this run did, JSON-safe; the mean entropy is over all tokens of this run, None without one."""
        seconds = time.monotonic() - self._started
        return {
            "num_prompts": self.num_prompts,
            "num_skipped": self._num_skipped,
            "num_written": self.num_done - self._num_skipped,
            **self._sums,
            "mean_entropy_bits": self._entropy_sum_bits / self._num_entropies if self._num_entropies else None,
            "seconds": seconds,
            "tokens_per_second": self._sums["num_tokens"] / seconds,
            "model": self._config.model,
            "detector": self._config.detector,
            "output": str(self._folder),
        }


def _checked_xargs(config: WatchPromptsConfig) -> dict[str, Any]:
    """The switches, with the fitting profile where the detector needs one and none is named."""
    source = resolve_model(config.model)
    profiles = ProfileStore([config.profile_dir] if config.profile_dir else [])
    xargs = config.xargs()
    if config.detector == "calibrated" and config.profile is None:
        xargs["metis_profile"] = profiles.find(source.path_or_id, config.temperature).name
    parse_xargs(xargs, profiles=profiles, from_client=True)
    return xargs


def _lasting_folder(output: str) -> Path:
    """The output folder, refused where it would go away with the job."""
    folder = Path(output).expanduser()
    if not folder.is_absolute() and _RAY_WORKING_DIRS in Path.cwd().parts:
        raise UsageError(
            f"output {output!r} lies in the job's copy of the working directory, which Ray deletes after the job.",
            hint="Give an absolute path of the head node.",
            param="output",
        )
    return folder.absolute()
