"""Sections about random numbers: `rng`, `target`, `inputs`, `permutations`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from sparkray.config.poc import ModelParams
from sparkray.poc.golden.report import SectionReport, Tolerances
from sparkray.poc.inputs import draw_input, draw_permutation, draw_target
from sparkray.poc.seeds import generator, to_float16, words

Section = Mapping[str, Mapping[str, Any]]


def check_rng(section: Section, report: SectionReport, tolerances: Tolerances) -> None:
    """Keys are `TEXT|ROUNDS`."""
    for label, entry in section.items():
        text, rounds = label.rsplit("|", 1)
        chain = words(text, int(rounds))
        for key, expected in entry.items():
            where, rng = f"{label} {key}", generator(text, int(rounds))
            state: Any = rng.bit_generator.state
            if match := re.fullmatch(r"entropy_u32_first(\d+)", key):
                report.equal(where, chain[: int(match[1])].tolist(), expected)
            elif key == "n_words":
                report.equal(where, len(chain), expected)
            elif key == "entropy_sha256":
                report.digest(where, chain.astype("<u4"), expected)
            elif key == "pcg64_state_hex":
                report.equal(where, hex(state["state"]["state"]), expected)
            elif key == "pcg64_inc_hex":
                report.equal(where, hex(state["state"]["inc"]), expected)
            elif match := re.fullmatch(r"standard_normal_first(\d+)", key):
                report.equal(where, rng.standard_normal(int(match[1])).tolist(), expected)
            elif match := re.fullmatch(r"normal_([\d.]+)_([\d.]+)_first(\d+)", key):
                report.equal(where, rng.normal(float(match[1]), float(match[2]), int(match[3])).tolist(), expected)
            elif match := re.fullmatch(r"permutation_(\d+)", key):
                report.equal(where, rng.permutation(int(match[1])).tolist(), expected)
            else:
                report.notes.append(f"{where}: not a value that is known here")


def check_target(section: Section, report: SectionReport, tolerances: Tolerances) -> None:
    """Keys are `BLOCK_HASH|VOCAB_SIZE`."""
    for label, entry in section.items():
        block_hash, vocab_size = label.rsplit("|", 1)
        target = draw_target(block_hash, int(vocab_size))
        for key, expected in entry.items():
            where = f"{label} {key}"
            if match := re.fullmatch(r"first(\d+)", key):
                report.equal(where, target[: int(match[1])].tolist(), expected)
            elif key == "norm":
                report.close(where, np.linalg.norm(target), expected, 1e-12)
            elif key == "sha256_f64le":
                report.digest(where, target.astype("<f8"), expected)
            elif key == "dtype":
                report.equal(where, str(target.dtype), expected)
            else:
                report.notes.append(f"{where}: not a value that is known here")


def check_inputs(section: Section, report: SectionReport, tolerances: Tolerances) -> None:
    """Keys are `BLOCK_HASH|PUBLIC_KEY|NONCE|SEQxDIM`."""
    for label, entry in section.items():
        block_hash, public_key, nonce, shape = label.split("|")
        seq_len, dim = (int(part) for part in shape.split("x"))
        params = ModelParams(dim=dim, seq_len=seq_len, n_heads=1, n_kv_heads=1)
        values = draw_input(block_hash, public_key, int(nonce), params)
        rounded = to_float16(values)
        for key, expected in entry.items():
            where = f"{label} {key}"
            if match := re.fullmatch(r"f64_(first|last)(\d+)", key):
                count = int(match[2])
                flat = values.ravel()
                report.equal(where, (flat[:count] if match[1] == "first" else flat[-count:]).tolist(), expected)
            elif key == "sha256_f64le":
                report.digest(where, values.astype("<f8"), expected)
            elif key == "sha256_f16le":
                report.digest(where, rounded.astype("<f2"), expected)
            elif key == "n_diff_if_rounded_directly_f64_to_f16":
                report.equal(where, int((rounded != values.astype(np.float16)).sum()), expected)
            elif key == "numel":
                report.equal(where, values.size, expected)
            else:
                report.notes.append(f"{where}: not a value that is known here")


def check_permutations(section: Section, report: SectionReport, tolerances: Tolerances) -> None:
    """Keys are `BLOCK_HASH|PUBLIC_KEY|NONCE|VOCAB_SIZE`."""
    for label, entry in section.items():
        block_hash, public_key, nonce, vocab_size = label.split("|")
        order = draw_permutation(block_hash, public_key, int(nonce), int(vocab_size))
        for key, expected in entry.items():
            where = f"{label} {key}"
            if match := re.fullmatch(r"first(\d+)", key):
                report.equal(where, order[: int(match[1])].tolist(), expected)
            elif key == "sha256_i64le":
                report.digest(where, order.astype("<i8"), expected)
            else:
                report.notes.append(f"{where}: not a value that is known here")
