"""The checker finds a changed value in every kind of section, and says what it does not know."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sparkray.cli.main import app
from sparkray.errors import InputError, NotFoundError
from sparkray.poc.golden import check_file, check_sections

SCALED = {
    "dim": 128, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4, "vocab_size": 128, "ffn_dim_multiplier": 1.3,
    "multiple_of": 256, "norm_eps": 1e-05, "rope_theta": 500000.0, "use_scaled_rope": True, "seq_len": 16,
}  # fmt: skip
RECORDED: dict[str, Any] = {
    "rng": {"0x00|1": {"n_words": 8, "permutation_8": [1, 7, 0, 5, 4, 6, 2, 3]}},
    "target": {"0x00|8196": {"sha256_f64le": "23e46e6dc7e58dadb39df6dd08798a8b307d6c2f5ccc373d05b38fc19e8f6133"}},
    "inputs": {"test|test|0|128x1024": {"n_diff_if_rounded_directly_f64_to_f16": 6}},
    "permutations": {"0x00|0x00|7|128": {"first12": [100, 6, 127, 45, 30, 109, 28, 71, 55, 44, 19, 8]}},
    "configs": {
        "tiny": {
            "params": {**SCALED, "n_layers": 4, "multiple_of": 1024, "use_scaled_rope": False},
            "block_hash": "0x00",
            "public_key": "0x00",
            "nonces": [0, 1, 2],
            "pool_fraction": 0.05,
            "pool_size": 93446,
            "param_layout": {
                "output.weight": {"numel": 16384, "name_hash": 4114739593, "branch": "slice", "start_or_shift": 37771}
            },
            "pool_all_weights_sha256": "73185d57deb68cfe269c7bef97bdd2eb0278d2cbb8850a905fea09ac1f822523",
            "dist_upstream_fp16_cpu": [1.3361173673860398, 1.336778678754751, 1.5162109103369317],
            "dist_fp32_model_fp16_weights_inputs_rope": [1.3361886737993247, 1.3367805205761811, 1.5161985196373327],
            "nonpool_dist_fp32": [1.3381179986346188, 1.3436536430650252, 1.3625228738340818],
            "zero_layer_shortcut_dist": [1.336236571461763, 1.3367924822379464, 1.5162941712729514],
        }
    },
    "scaled_rope": {"params": SCALED, "dist_fp32": [1.4674116867159843, 1.3916103357230598]},
    "nonce_iterator": {"node_id=1 n_nodes=2 group_id=0 n_groups=1": [1, 3, 5, 7]},
    "batch_size_v1": {"7000": "ValueError", "8192": 28},
    "batch_size_v2": {"[80000, 40000]": 121},
    "groups": [{"vram_gb": [24, 12, 12], "min": 23.0, "groups": [[0], [1, 2]]}],
    "min_group_vram": {"PARAMS_V1": 10.0, "PARAMS_V2": 38.0, "other": 38.0},
    "fraud": [
        {
            "n": 100, "n_invalid": 2, "p_mismatch": 0.0005, "fraud_threshold": 0.01,
            "probability_honest": 0.0011978009111312964, "fraud_detected": True,
        }
    ],
    "poc_v2_vllm": {
        "murmur3_seed_3735928559_keys_0_1": [110687111, 1285720013],
        "householder_layer3_dim64_first4": [
            0.006310681346803904, 0.08484436571598053, 0.3311316967010498, 0.04700791835784912,
        ],
    },
}  # fmt: skip


def changed(value: Any) -> Iterator[Any]:
    """Every copy of `value` with one leaf changed by more than any tolerance; names and seeds are left alone."""
    if isinstance(value, dict):
        for key, part in value.items():
            if key not in {
                "params",
                "block_hash",
                "public_key",
                "nonces",
                "pool_fraction",
                "vram_gb",
                "min",
                "fraud_threshold",
            }:
                yield from ({**value, key: new} for new in changed(part))
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from ([*value[:index], new, *value[index + 1 :]] for new in changed(part))
    elif isinstance(value, bool):
        yield not value
    elif isinstance(value, str):
        yield value[:-1] + ("0" if value[-1] != "0" else "1")
    else:
        yield value + 1 if isinstance(value, int) else value + 1e-3


def test_recorded_values_match() -> None:
    for report in check_sections(RECORDED):
        assert report.status == "matched", report.findings


@pytest.mark.parametrize("name", sorted(RECORDED))
def test_every_changed_value_is_found(name: str) -> None:
    variants = list(changed(RECORDED[name]))
    assert variants
    for section in variants:
        (report,) = check_sections({name: section})
        assert report.status == "mismatched", section


def test_tolerances_come_from_the_file() -> None:
    section = copy.deepcopy(RECORDED["scaled_rope"])
    section["dist_fp32"][0] += 5e-6
    wide = {"tolerances": {"dist fp32/fp64 implementation vs dist_fp32_model_*": 1e-5}}
    assert [report.status for report in check_sections({"scaled_rope": section})] == ["mismatched"]
    assert [report.status for report in check_sections({"meta": wide, "scaled_rope": section})] == ["matched"]


def test_nan_and_missing_numbers_are_mismatches() -> None:
    for distances in ([float("nan"), 1.3916103357230598], [], [[1.0]]):
        (report,) = check_sections({"scaled_rope": {"params": SCALED, "dist_fp32": distances}})
        assert report.status == "mismatched"
    (report,) = check_sections({"fraud": [{"n": 3}]})
    assert report.status == "mismatched" and "KeyError" in report.findings[0]


def test_a_section_of_unknown_name_is_named(tmp_path: Path) -> None:
    path = tmp_path / "values.json"
    path.write_text(json.dumps({"nonce_iterator": RECORDED["nonce_iterator"], "novel": {"a": 1}}))
    done = CliRunner().invoke(app, ["poc", "check", str(path), "--json"])
    answer = json.loads(done.stdout)
    assert done.exit_code == 0 and answer["unknown_sections"] == ["novel"]
    path.write_text(json.dumps({"novel": {"a": 1}}))
    assert CliRunner().invoke(app, ["poc", "check", str(path)]).exit_code == 1
    path.write_text(json.dumps({"some_model": RECORDED["configs"]["tiny"]}))
    assert CliRunner().invoke(app, ["poc", "check", str(path)]).exit_code == 0


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="does not exist"):
        list(check_file(tmp_path / "absent.json"))
    broken = tmp_path / "broken.json"
    broken.write_text("[1, 2")
    with pytest.raises(InputError, match="as JSON"):
        list(check_file(broken))
    broken.write_text("[1, 2]")
    with pytest.raises(InputError, match="holds a list"):
        list(check_file(broken))
