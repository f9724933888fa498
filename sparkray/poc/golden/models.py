"""Sections about the model: configurations, the scaled rotary table, the shortcut that skips every block."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sparkray.config.poc import V1, ModelParams, WeightsConfig
from sparkray.poc.golden.report import SectionReport, Tolerances, sha256
from sparkray.poc.replay import replay
from sparkray.poc.statistics import P_MISMATCH, binomial_tail
from sparkray.poc.weights import draw_pool, draw_sequential, pool_layout, pool_numel

SEQUENTIAL = WeightsConfig(name="sequential", pool_fraction=None)
DEFAULT_FRACTION = 0.05
# The original's float16 kernels are slow on a CPU; above this size ours answers in float32 alone.
_MAX_FP16_PARAMS = 50_000_000
_REPLAY_BATCH = 64
_DESCRIPTIVE = {"params", "block_hash", "public_key", "nonces", "pool_fraction", "dist_dtype", "batch"}
_INT_FACTS = {
    "n_params": lambda params, fraction: params.num_params,
    "num_params": lambda params, fraction: params.num_params,
    "ffn_hidden": lambda params, fraction: params.ffn_hidden,
    "pool_size": pool_numel,
}


@dataclass(slots=True)
class _Case:
    """One configuration and its distances, each computed once."""

    params: ModelParams
    block_hash: str
    public_key: str
    nonces: Sequence[int]
    fraction: float
    cache: dict[tuple[str, bool, torch.dtype], npt.NDArray[np.float64]]

    def distances(self, weights: WeightsConfig, *, shortcut: bool, dtype: torch.dtype) -> npt.NDArray[np.float64]:
        key = (weights.label, shortcut, dtype)
        if key not in self.cache:
            step = len(self.nonces) if weights.pool_fraction is None else _REPLAY_BATCH
            self.cache[key] = np.concatenate([
                replay(
                    self.block_hash, self.public_key, self.nonces[start : start + step], self.params, weights,
                    layers=() if shortcut else None, dtype=dtype,
                )
                for start in range(0, len(self.nonces), step)
            ])  # fmt: skip
        return self.cache[key]

    @property
    def pool(self) -> WeightsConfig:
        return WeightsConfig(pool_fraction=self.fraction)


def looks_like_case(section: object) -> bool:
    """Whether a section describes one model by itself."""
    return isinstance(section, Mapping) and isinstance(section.get("params"), Mapping)


def check_configs(section: Mapping[str, Any], report: SectionReport, tolerances: Tolerances) -> None:
    """One model, or models by name."""
    if looks_like_case(section) or any(key.startswith("dist") or "_dist" in key for key in section):
        check_case("", section, report, tolerances)
        return
    for name, entry in section.items():
        if isinstance(entry, Mapping):
            check_case(f"{name} ", entry, report, tolerances)
        else:
            report.notes.append(f"{name}: not a model, left out")


def check_case(prefix: str, entry: Mapping[str, Any], report: SectionReport, tolerances: Tolerances) -> None:
    """Every value of one model that is known here, by the pattern of its name."""
    case = _read_case(prefix, entry, report)
    for key, expected in entry.items():
        where = f"{prefix}{key}"
        if key in _DESCRIPTIVE:
            continue
        if key in _INT_FACTS:
            report.equal(where, _INT_FACTS[key](case.params, case.fraction), expected)
        elif key == "param_layout":
            _check_layout(where, case, expected, report)
        elif key == "pool_weight_sha256_f16le":
            _check_weight_digests(where, case, expected, report)
        elif key.endswith("all_weights_sha256"):
            report.equal(where, _all_weights_digest(case, _weights_of(key, case)), expected)
        elif key.endswith(("max_abs_err", "max_abs_fp16_vs_fp32", "corr")):
            _check_derived(where, key, case, entry, expected, report, tolerances)
        elif "dist" in key and isinstance(expected, list | Mapping):
            _check_distances(where, key, case, expected, report, tolerances)
        else:
            report.notes.append(f"{where}: not compared")


def check_scaled_rope(section: Mapping[str, Any], report: SectionReport, tolerances: Tolerances) -> None:
    """A model whose rotary frequencies are scaled."""
    check_case("", {"block_hash": "test", "public_key": "test", **section}, report, tolerances)


def check_shortcut(section: Mapping[str, Any], report: SectionReport, tolerances: Tolerances) -> None:
    """The zero-layer cheat end to end: the same nonces by the whole model and by its head alone."""
    count, r_target = int(section["n"]), float(section["r_target"])
    described = {"block_hash": "0xabc123", "public_key": "pubkey1", **section, "nonces": list(range(count))}
    case = _read_case("", described, report)
    full = case.distances(case.pool, shortcut=False, dtype=torch.float32)
    short = case.distances(case.pool, shortcut=True, dtype=torch.float32)
    error = short - full
    computed = {
        "frac_valid_true": (full < r_target).mean(),
        "frac_valid_shortcut": (short < r_target).mean(),
        "rms_err": np.sqrt(np.square(error).mean()),
        "max_err": np.abs(error).max(),
    }
    for key, value in computed.items():
        if key in section:
            report.close(key, value, section[key], tolerances.exact_model)
    for key, margin in section.items():
        if not key.startswith("margin_"):
            continue
        chosen = short < r_target - float(key.removeprefix("margin_"))
        n_invalid = int((full[chosen] > r_target).sum())
        probability = binomial_tail(n_invalid, int(chosen.sum()), P_MISMATCH)
        report.equal(f"{key} submitted", int(chosen.sum()), margin["submitted"])
        report.equal(f"{key} n_invalid", n_invalid, margin["n_invalid"])
        report.close(f"{key} p_honest", probability, margin["p_honest"], 1e-9)
        share = chosen.sum() / max(1, (full < r_target).sum())
        report.close(f"{key} yield_vs_honest", share, margin["yield_vs_honest"], 1e-9)
        for name, verdict in margin.items():
            if name.startswith("fraud@"):
                report.equal(f"{key} {name}", probability < float(name.removeprefix("fraud@")), verdict)
    report.notes.append("CPU seconds are measurements of another machine, not compared")


def check_timing(section: Mapping[str, Any], report: SectionReport, tolerances: Tolerances) -> None:
    """Timings of another machine: only the sizes they were taken at can be compared."""
    for name, entry in section.items():
        if looks_like_case(entry) and "n_params" in entry:
            report.equal(f"{name} n_params", ModelParams(**entry["params"]).num_params, entry["n_params"])
    report.notes.append("timings are measurements of another machine, not compared")


def _read_case(prefix: str, entry: Mapping[str, Any], report: SectionReport) -> _Case:
    params = ModelParams(**entry["params"]) if "params" in entry else V1
    block_hash, public_key = entry.get("block_hash", "0xabc123"), entry.get("public_key", "pubkey1")
    nonces = entry.get("nonces")
    if nonces is None:
        lengths = [len(value) for key, value in entry.items() if "dist" in key and isinstance(value, list | Mapping)]
        nonces = list(range(max(lengths, default=0)))
    missing = [key for key in ("params", "block_hash", "public_key", "nonces") if key not in entry]
    if missing:
        report.notes.append(
            f"{prefix}{', '.join(missing)} not given: {'V1, ' if 'params' in missing else ''}block {block_hash!r},"
            f" key {public_key!r}, nonces 0 to {len(nonces) - 1} assumed"
        )
    fraction = float(entry.get("pool_fraction", DEFAULT_FRACTION))
    return _Case(params, block_hash, public_key, nonces, fraction, {})


def _weights_of(key: str, case: _Case) -> WeightsConfig:
    """The way of drawing that a key's name tells: `nonpool...`, `pool1pct...`, or the section's own pool."""
    if key.startswith("nonpool"):
        return SEQUENTIAL
    if match := re.match(r"pool([\d.]+)pct", key):
        return WeightsConfig(pool_fraction=float(match[1]) / 100)
    return case.pool


def _check_distances(
    where: str, key: str, case: _Case, expected: Any, report: SectionReport, tolerances: Tolerances
) -> None:
    if isinstance(expected, Mapping):
        picked = [list(case.nonces).index(int(nonce)) for nonce in expected]
        values = list(expected.values())
    else:
        picked, values = list(range(len(expected))), expected
    weights = _weights_of(key, case)
    shortcut = "zero_layer" in key or "shortcut" in key
    exact = "fp32" in key or "fp64" in key or "fp16" not in key
    full = case.distances(weights, shortcut=shortcut, dtype=torch.float32)
    if len(picked) > len(full):
        report.differs(where, f"computed {len(full)} distances, expected {len(picked)}")
        return
    if exact:
        report.close(where, full[picked], values, tolerances.exact_model)
        return
    tolerance = fp16_tolerance(case.params, tolerances)
    report.close(f"{where} (ours in float32)", full[picked], values, tolerance)
    if case.params.num_params <= _MAX_FP16_PARAMS:
        half = case.distances(weights, shortcut=shortcut, dtype=torch.float16)
        report.close(f"{where} (ours in float16)", half[picked], values, tolerance)


def fp16_tolerance(params: ModelParams, tolerances: Tolerances) -> float:
    """Float16 noise falls with the vocabulary: the wide tolerance is for small models alone."""
    small = params.dim <= 128 and params.vocab_size <= 517
    return tolerances.fp16_small if small else tolerances.fp16_large


def _check_derived(
    where: str,
    key: str,
    case: _Case,
    entry: Mapping[str, Any],
    expected: Any,
    report: SectionReport,
    tolerances: Tolerances,
) -> None:
    full = case.distances(_weights_of(key, case), shortcut=False, dtype=torch.float32)
    if key.endswith("fp16_vs_fp32"):
        half = next((value for name, value in entry.items() if "fp16" in name and "fp32" not in name), None)
        if half is None:
            report.notes.append(f"{where}: not compared, the float16 distances are not in the file")
            return
        report.close(where, np.abs(full[: len(half)] - np.asarray(half)).max(), expected, 2 * tolerances.exact_model)
        return
    short = case.distances(_weights_of(key, case), shortcut=True, dtype=torch.float32)
    if key.endswith("corr"):
        report.close(where, np.corrcoef(full, short)[0, 1], expected, tolerances.exact_model)
    else:
        report.close(where, np.abs(full - short).max(), expected, 2 * tolerances.exact_model)


def _check_layout(where: str, case: _Case, expected: Mapping[str, Any], report: SectionReport) -> None:
    layout = pool_layout(case.block_hash, case.params, case.fraction)
    for name, fields in expected.items():
        if name not in layout:
            report.differs(f"{where} {name}", "the model has no such parameter")
            continue
        place = layout[name]
        computed = {
            "numel": place.numel, "name_hash": place.name_hash, "branch": place.branch, "start_or_shift": place.start,
        }  # fmt: skip
        report.equal(f"{where} {name}", {key: computed.get(key) for key in fields}, dict(fields))


def _check_weight_digests(where: str, case: _Case, expected: Mapping[str, str], report: SectionReport) -> None:
    pool = draw_pool(case.block_hash, case.params, case.fraction)
    layout = pool_layout(case.block_hash, case.params, case.fraction)
    for name, digest in expected.items():
        if name not in layout:
            report.differs(f"{where} {name}", "the model has no such parameter")
            continue
        report.equal(f"{where} {name}", sha256(layout[name].values(pool)), digest)


def _all_weights_digest(case: _Case, weights: WeightsConfig) -> str:
    digest = hashlib.sha256()
    values: Iterable[npt.NDArray[np.float16]]
    if weights.pool_fraction is None:
        values = (drawn for _, drawn in draw_sequential(case.block_hash, case.params))
    else:
        pool = draw_pool(case.block_hash, case.params, weights.pool_fraction)
        layout = pool_layout(case.block_hash, case.params, weights.pool_fraction)
        values = (place.values(pool) for place in layout.values())
    for part in values:
        digest.update(np.ascontiguousarray(part).data)
    return digest.hexdigest()
