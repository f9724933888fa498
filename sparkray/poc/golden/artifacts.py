"""Section about the network's later proof: `poc_v2_vllm`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from sparkray.poc import artifacts
from sparkray.poc.golden.report import SectionReport, Tolerances
from sparkray.poc.golden.rules import PROBABILITY_TOLERANCE
from sparkray.poc.statistics import binomial_tail

BLOCK_HASH, PUBLIC_KEY, NONCES = "0xabc123", "pubkey1", (0, 7)
_DESCRIPTIVE = {"source", "pick_order_note", "block_hash", "public_key", "nonces"}
# Logarithms and sines differ in the last bit between libraries.
_FLOAT32_TOLERANCE = 2e-6


def check_artifacts(section: Mapping[str, Any], report: SectionReport, tolerances: Tolerances) -> None:
    """Sizes and seeds stand in the keys; block hash, key and nonces too where the file gives them."""
    block_hash, public_key = section.get("block_hash", BLOCK_HASH), section.get("public_key", PUBLIC_KEY)
    nonces = list(section.get("nonces", NONCES))
    if "block_hash" not in section:
        report.notes.append(f"block {block_hash!r}, key {public_key!r}, nonces {nonces} assumed")
    for key, expected in section.items():
        if key in _DESCRIPTIVE:
            continue
        if key == "seed_from_string":
            for text, seed in expected.items():
                report.equal(f"{key} {text}", artifacts.seed_of(text), seed)
        elif match := re.fullmatch(r"murmur3_seed_(\d+)_keys_0_(\d+)", key):
            report.equal(key, artifacts.murmur3(int(match[2]) + 1, int(match[1])).tolist(), expected)
        elif match := re.fullmatch(r"normal_seed(\d+)_first(\d+)_of_(\d+)", key):
            drawn = artifacts.normals(int(match[1]), int(match[3]))[: int(match[2])]
            report.close(key, drawn, expected, _FLOAT32_TOLERANCE)
        elif match := re.fullmatch(r"inputs_f32_\[([\d,]+)\]_dim(\d+)_seq(\d+)", key):
            listed = [int(part) for part in match[1].split(",")]
            _check_input(key, expected, report, (block_hash, public_key), listed, (int(match[2]), int(match[3])), False)
        elif match := re.fullmatch(r"inputs_concat_murmur_f32_nonce(\d+)(?:_dim(\d+)_seq(\d+))?", key):
            shape = (int(match[2] or 64), int(match[3] or 16))
            _check_input(key, expected, report, (block_hash, public_key), [int(match[1])], shape, True)
        elif match := re.fullmatch(r"pick_indices_dim(\d+)_k(\d+)_sorted", key):
            for nonce, picked in zip(nonces, expected, strict=True):
                ours = artifacts.pick_coordinates(block_hash, public_key, nonce, int(match[1]), int(match[2]))
                report.equal(f"{key} nonce {nonce}", sorted(ours.tolist()), picked)
        elif key == "pick_indices_as_returned_cpu":
            report.notes.append(f"{key}: its order is top-k's own; the sorted coordinates are compared instead")
        elif key == "haar_rotation_of_linspace":
            rows = torch.linspace(-1, 1, sum(len(row) for row in expected)).view(len(expected), -1)
            for nonce, row, rotated in zip(nonces, rows, expected, strict=True):
                ours = artifacts.haar_rotate(block_hash, public_key, nonce, row)
                report.close(f"{key} nonce {nonce}", ours, rotated, _FLOAT32_TOLERANCE)
        elif match := re.fullmatch(r"householder_layer(\d+)_dim(\d+)_first(\d+)", key):
            unit = artifacts.layer_reflection(block_hash, int(match[1]), int(match[2]))
            report.close(key, unit[: int(match[3])], expected, _FLOAT32_TOLERANCE)
        elif match := re.fullmatch(r"target_dim(\d+)_first(\d+)", key):
            target = artifacts.artifact_target(block_hash, public_key, int(match[1]))
            report.close(key, target[: int(match[2])], expected, _FLOAT32_TOLERANCE)
        elif key == "encode_[0.1..]":
            count = len(artifacts.decode_vector(expected))
            steps = np.arange(1, count + 1, dtype=np.float32) / np.float32(10)
            report.equal(key, artifacts.encode_vector(steps), expected)
        elif key == "fraud_test":
            _check_fraud(expected, report)
        else:
            report.notes.append(f"{key}: not compared")


def _check_input(
    key: str,
    expected: Mapping[str, Any],
    report: SectionReport,
    seeds: tuple[str, str],
    nonces: list[int],
    shape: tuple[int, int],
    stronger: bool,
) -> None:
    for name, values in expected.items():
        match = re.fullmatch(r"(?:nonce(\d+)_)?(first|last)(\d+)", name)
        if match is None:
            report.notes.append(f"{key} {name}: not compared")
            continue
        nonce = int(match[1]) if match[1] else nonces[0]
        drawn = artifacts.draw_hidden_input(*seeds, nonce, *shape, stronger=stronger).flatten()
        count = int(match[3])
        report.close(
            f"{key} {name}", drawn[:count] if match[2] == "first" else drawn[-count:], values, _FLOAT32_TOLERANCE
        )


def _check_fraud(expected: Mapping[str, Any], report: SectionReport) -> None:
    for label, (probability, fraud) in expected.items():
        match = re.fullmatch(r"(\d+)/(\d+) p=([\d.e-]+) thr=([\d.e-]+)", label)
        if match is None:
            report.differs(f"fraud_test {label}", "a label `MISMATCHES/TOTAL p=.. thr=..` is expected")
            continue
        ours = binomial_tail(int(match[1]), int(match[2]), float(match[3]))
        report.close(f"fraud_test {label}", ours / probability, 1.0, PROBABILITY_TOLERANCE)
        report.equal(f"fraud_test {label} fraud", ours < float(match[4]), fraud)
