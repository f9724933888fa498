"""Runs every known section of a file of recorded values."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sparkray.errors import InputError, NotFoundError
from sparkray.poc.golden import artifacts, generators, models, rules
from sparkray.poc.golden.report import SectionReport, Tolerances

Checker = Callable[[Any, SectionReport, Tolerances], None]

CHECKERS: dict[str, Checker] = {
    "rng": generators.check_rng,
    "target": generators.check_target,
    "inputs": generators.check_inputs,
    "permutations": generators.check_permutations,
    "configs": models.check_configs,
    "V1_full_on_chain_params": models.check_configs,
    "scaled_rope": models.check_scaled_rope,
    "nonce_iterator": rules.check_nonce_iterator,
    "batch_size_v1": rules.check_batch_size_v1,
    "batch_size_v2": rules.check_batch_size_v2,
    "groups": rules.check_groups,
    "min_group_vram": rules.check_min_group_vram,
    "fraud": rules.check_fraud,
    "poc_v2_vllm": artifacts.check_artifacts,
    "zero_layer_cheat_end_to_end": models.check_shortcut,
    "cpu_baseline_timing_contended_use_cpu_s": models.check_timing,
}


def check_file(path: Path) -> Iterator[SectionReport]:
    """Check the sections of a JSON file, one report as soon as each is done.

    Raises:
        NotFoundError: no such file.
        InputError: not JSON, or not an object of sections.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as failure:
        raise NotFoundError(f"{path} does not exist, and a file of recorded values is expected.") from failure
    except (OSError, ValueError) as failure:
        raise InputError(f"{path} cannot be read as JSON: {failure}.") from failure
    if not isinstance(data, dict):
        raise InputError(f"{path} holds a {type(data).__name__}, and an object of sections is expected.")
    return check_sections(data)


def check_sections(data: Mapping[str, Any]) -> Iterator[SectionReport]:
    """Check every section but `meta`; a section of unknown name is checked where it describes a model."""
    meta = data.get("meta", {})
    tolerances = Tolerances.from_meta(meta if isinstance(meta, Mapping) else {})
    for name, section in data.items():
        if name == "meta":
            continue
        report = SectionReport(name)
        checker = CHECKERS.get(name)
        if checker is None and models.looks_like_case(section):
            checker = models.check_configs
            report.notes.append("a section of unknown name that describes a model: checked as one")
        if checker is None:
            report.known = False
            report.notes.append(f"unknown section, NOT checked; known are {', '.join(CHECKERS)}")
        else:
            _run(checker, section, report, tolerances)
        yield report


def _run(checker: Checker, section: Any, report: SectionReport, tolerances: Tolerances) -> None:
    try:
        checker(section, report, tolerances)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, InputError) as failure:
        # A file from outside: what cannot be read as the schema says is a mismatch, not a crash.
        report.differs(report.name, f"not of the expected form ({type(failure).__name__}: {failure})")
