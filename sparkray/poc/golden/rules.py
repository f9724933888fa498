"""Sections about the protocol's rules: nonce classes, batch sizes, groups, the fraud test."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from sparkray.config.poc import V1, V2, ModelParams
from sparkray.errors import UnavailableError
from sparkray.poc.batch_size import batch_size_v1, batch_size_v2
from sparkray.poc.golden.report import SectionReport, Tolerances
from sparkray.poc.groups import create_gpu_groups, network_min_group_vram
from sparkray.poc.nonces import NonceIterator
from sparkray.poc.statistics import P_MISMATCH, binomial_tail

PROBABILITY_TOLERANCE = 1e-9


def check_nonce_iterator(section: Mapping[str, Any], report: SectionReport, tolerances: Tolerances) -> None:
    """Keys are `node_id=.. n_nodes=.. group_id=.. n_groups=..`."""
    for label, expected in section.items():
        place = {key: int(value) for key, value in re.findall(r"(\w+)=(-?\d+)", label)}
        nonces = NonceIterator(
            node_id=place.get("node_id", 0),
            num_nodes=place.get("n_nodes", 1),
            group_id=place.get("group_id", 0),
            num_groups=place.get("n_groups", 1),
        )
        report.equal(label, list(nonces.take(len(expected))), expected)


def check_batch_size_v1(section: Mapping[str, Any], report: SectionReport, tolerances: Tolerances) -> None:
    """Keys are total MB; the original's ValueError is our UnavailableError."""
    for total_mb, expected in section.items():
        computed: int | str
        try:
            computed = batch_size_v1(float(total_mb))
        except UnavailableError:
            computed = "ValueError"
        report.equal(f"{total_mb} MB", computed, expected)


def check_batch_size_v2(section: Mapping[str, Any], report: SectionReport, tolerances: Tolerances) -> None:
    """Keys are lists of free MB."""
    for free_mb, expected in section.items():
        report.equal(f"{free_mb} MB", batch_size_v2(json.loads(free_mb), V2), expected)


def check_groups(section: Sequence[Mapping[str, Any]], report: SectionReport, tolerances: Tolerances) -> None:
    """Entries are `{vram_gb, min, groups}`."""
    for entry in section:
        groups = create_gpu_groups(entry["vram_gb"], entry["min"])
        where = f"{entry['vram_gb']} / {entry['min']} GB"
        report.equal(where, [list(group.device_ids) for group in groups], entry["groups"])


def check_min_group_vram(section: Mapping[str, Any], report: SectionReport, tolerances: Tolerances) -> None:
    """Keys are the names of presets."""
    presets = {"PARAMS_V1": V1, "PARAMS_V2": V2}
    for name, expected in section.items():
        report.equal(name, network_min_group_vram(presets.get(name, ModelParams())), expected)


def check_fraud(section: Sequence[Mapping[str, Any]], report: SectionReport, tolerances: Tolerances) -> None:
    """Entries are `{n, n_invalid, p_mismatch, fraud_threshold, probability_honest, fraud_detected}`."""
    for entry in section:
        where = f"{entry['n_invalid']} of {entry['n']}"
        probability = binomial_tail(entry["n_invalid"], entry["n"], entry.get("p_mismatch", P_MISMATCH))
        expected = entry["probability_honest"]
        # Tail probabilities span 80 orders of magnitude: compared relative to the expected one.
        report.close(f"{where} probability_honest", probability / expected, 1.0, PROBABILITY_TOLERANCE)
        if "fraud_threshold" in entry:
            report.equal(f"{where} fraud", probability < entry["fraud_threshold"], entry["fraud_detected"])
