"""How many experts stay, which ones, and what a plan refuses; numbers by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from tiny_moe import write_tiny

from sparkray.config.base import load_settings
from sparkray.config.pruning import PlanConfig, PruneConfig
from sparkray.errors import InputError, UsageError
from sparkray.pruning.checkpoint import Checkpoint
from sparkray.pruning.criteria import expert_scores
from sparkray.pruning.header_only import size_from_config
from sparkray.pruning.heatmap import relative_scores, write_heatmap
from sparkray.pruning.layout import read_layout
from sparkray.pruning.pipeline import routed_share_lost
from sparkray.pruning.plan import make_plan, read_plan
from sparkray.pruning.selection import (
    RouterLimits,
    choose_experts,
    experts_to_keep,
    protected_experts,
    zero_count_experts,
)
from sparkray.pruning.sizes import CheckpointSize, checkpoint_size
from sparkray.pruning.statistics import FIELDS, LayerStatistics, Statistics

SIZE = CheckpointSize(fixed_bytes=2_000_000_000, per_expert_bytes=500_000_000, num_experts=8)
ONE = RouterLimits(top_k=2)

GPT_OSS_20B = {
    "model_type": "gpt_oss",
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "head_dim": 64,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "max_position_embeddings": 131072,
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "quantization_config": {"quant_method": "mxfp4"},
    "sliding_window": 128,
    "tie_word_embeddings": False,
    "vocab_size": 201088,
}


def statistics(reap: dict[str, list[float]], count: list[float] | None = None, **fields: Any) -> Statistics:
    """Layers whose mean gated norm is as given, over `count` tokens an expert."""
    result = Statistics()
    for layer, scores in reap.items():
        sums = LayerStatistics.zeros(len(scores))
        sums.values["count"][:] = count or 10.0
        sums.values["gated_norm"][:] = np.array(scores) * sums.values["count"]
        for name, values in fields.items():
            sums.values[name][:] = values[layer]
        sums.num_tokens = 40
        result[layer] = sums
    return result


def test_scores_by_hand() -> None:
    sums = LayerStatistics.zeros(3)
    for name, values in {
        "count": [4, 1, 0],
        "norm": [8, 3, 0],
        "norm_squared": [20, 9, 0],
        "gated_norm": [2, 1.5, 0],
        "gated_norm_squared": [1, 2.25, 0],
        "gate": [1, 0.5, 0],
        "contribution": [4, 1, 0],
        "max_absolute": [7, 9, 0],
        "max_signed": [7, 0, 0],
    }.items():
        sums.values[name][:] = values
    expected = {
        "reap": [0.5, 1.5, 0],
        "reap_l2": [0.5, 1.5, 0],
        "contribution": [1, 1, 0],
        "frequency": [4, 1, 0],
        "ean_sum": [8, 3, 0],
        "ean_mean": [2, 3, 0],
        "man": [2, 3, 0],
        "msan": [5, 9, 0],
        "weighted_ean_sum": [2, 1.5, 0],
        "weighted_ean_sum_l2": [1, 1.5, 0],
        "weighted_frequency_sum": [1, 0.5, 0],
        "max_activations": [7, 9, 0],
    }
    for criterion, values in expected.items():
        assert expert_scores(sums, criterion).tolist() == values, criterion  # type: ignore[arg-type]
    drawn = expert_scores(sums, "random", layer="3", seed=1)
    assert drawn.tolist() == expert_scores(sums, "random", layer="3", seed=1).tolist()
    assert drawn.tolist() != expert_scores(sums, "random", layer="4", seed=1).tolist()
    with pytest.raises(UsageError, match="not known"):
        expert_scores(sums, "reaper")  # type: ignore[arg-type]


@given(parts=st.lists(st.lists(st.floats(0, 100), min_size=3, max_size=3), min_size=2, max_size=5))
def test_merging_is_adding_and_maxima_stay_maxima(parts: list[list[float]]) -> None:
    pieces = [statistics({"0": [1, 1, 1]}, max_absolute={"0": part}, norm={"0": part}) for part in parts]
    merged = Statistics.merged(pieces)
    np.testing.assert_allclose(merged["0"].values["norm"], np.sum(parts, axis=0), rtol=1e-12)
    np.testing.assert_array_equal(merged["0"].values["max_absolute"], np.max(parts, axis=0))
    assert merged["0"].num_tokens == 40 * len(parts)
    back = Statistics.from_arrays(merged.to_arrays())
    assert all(np.array_equal(back["0"].values[name], merged["0"].values[name]) for name in FIELDS)


def test_the_lowest_scores_are_cut() -> None:
    sums = statistics({"0": [5, 1, 7, 2, 9, 3, 8, 4], "1": [1, 2, 3, 4, 5, 6, 7, 8]})
    assert choose_experts(sums, 6, PlanConfig(ratio=0.25), ONE) == {"0": (0, 2, 4, 5, 6, 7), "1": (2, 3, 4, 5, 6, 7)}
    # In two groups of four, each loses its own lowest.
    grouped = choose_experts(sums, 4, PlanConfig(ratio=0.5), RouterLimits(2, num_groups=2))
    assert grouped == {"0": (0, 2, 4, 6), "1": (2, 3, 6, 7)}


@pytest.mark.parametrize(
    ("settings", "limits", "keep"),
    [
        ({"ratio": 0.25}, ONE, 6),
        ({"ratio": 0.3}, ONE, 6),  # int(8 * 0.3) = 2 are cut
        ({"ratio": 0.25}, RouterLimits(2, num_groups=4), 8 - 0),
        ({"ratio": 0.5}, RouterLimits(2, num_groups=4, open_groups=2), 4),
        ({"ratio": 0.4, "multiple_of": 2}, ONE, 6),  # 5 would stay: rounded up
        ({"num_experts": 3}, ONE, 3),
        ({"target_gb": 4.6}, ONE, 5),  # 2 + 5 * 0.5 = 4.5
        ({"target_gb": 4.6, "multiple_of": 4}, ONE, 4),
    ],
)
def test_number_of_experts(settings: dict[str, Any], limits: RouterLimits, keep: int) -> None:
    if keep == 8:
        with pytest.raises(UsageError, match="nothing is cut"):
            experts_to_keep(PlanConfig(**settings), SIZE, limits)
    else:
        assert experts_to_keep(PlanConfig(**settings), SIZE, limits)[0] == keep


@pytest.mark.parametrize(
    ("settings", "limits", "message"),
    [
        ({"ratio": 0.9}, ONE, "1 of 8 experts would stay, and the router picks 2"),
        ({"ratio": 0.1}, ONE, "nothing is cut"),
        ({"num_experts": 8}, ONE, "nothing is cut"),
        ({"num_experts": 5, "multiple_of": 4}, ONE, "a multiple of 4 is needed"),
        ({"target_gb": 2.4}, ONE, "3.00 GB with 2 experts"),
        ({"target_gb": 9}, ONE, "6.00 GB already"),
        ({"num_experts": 4}, RouterLimits(2, num_groups=4, group_score_experts=2), "scores a group by its best 2"),
        ({"num_experts": 4}, RouterLimits(4, num_groups=2, open_groups=1), "routed to 4 experts"),
    ],
)
def test_impossible_sizes_are_refused(settings: dict[str, Any], limits: RouterLimits, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        experts_to_keep(PlanConfig(**settings), SIZE, limits)


@pytest.mark.parametrize("settings", [{"ratio": 0}, {"ratio": 1}, {"ratio": 0.5, "target_gb": 3}, {"num_experts": 0}])
def test_ratios_out_of_range_and_two_sizes_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        PlanConfig(**settings)


def test_super_experts_by_absolute_maximum_and_layer_id() -> None:
    calm = [1.0] * 8
    loud = [1.0] * 7 + [900.0]
    maxima = {"3": calm, "4": loud, "5": calm, "6": [1.0, 950.0, *calm[2:]]}
    sums = statistics({layer: [1, 2, 3, 4, 5, 6, 7, 0.1] for layer in maxima}, max_absolute=maxima)
    # The 99.5 % quantile of 32 values lies between the two largest: only 950 is above it, in the last layer,
    # which `super` does not look at.
    assert protected_experts(sums, "outliers") == {"6": (1,)}
    assert protected_experts(sums, "super") == {}
    many = statistics(
        {str(layer): [1.0] * 64 for layer in range(8)}, max_absolute={str(layer): [1.0] * 64 for layer in range(8)}
    )
    many["2"].values["max_absolute"][5] = 800.0
    assert protected_experts(many, "super") == {"2": (5,)}
    many["2"].values["gated_norm"][5] = 0.0
    config = PlanConfig(ratio=0.25, protect="super")
    assert 5 in choose_experts(many, 48, config, ONE)["2"]
    assert 5 not in choose_experts(many, 48, PlanConfig(ratio=0.25), ONE)["2"]


def test_experts_without_tokens_are_reported_and_cut_first() -> None:
    sums = statistics({"0": [1, 2, 3, 4]}, count=[5, 0, 7, 0])
    assert zero_count_experts(sums) == {"0": (1, 3)}
    assert choose_experts(sums, 2, PlanConfig(ratio=0.5), RouterLimits(1)) == {"0": (0, 2)}


def test_size_of_gpt_oss_20b_with_24_experts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GPT_OSS_20B))
    size = size_from_config(tmp_path)
    assert round(size.bytes_with(32) / 1e9, 2) == 13.76
    assert round(size.bytes_with(24) / 1e9, 1) == 11.2
    # By hand: an expert has 3 * 2880 rows of 2880 values, 17 bytes for 32, with one bf16 bias a row, and one router
    # row of 2880 weights and a bias in bf16, in each of 24 layers.
    assert size.per_expert_bytes == 24 * (3 * 2880 * (2880 // 32 * 17 + 2) + 2 * 2881)
    assert size.experts_within(11.3e9) == 24


def test_size_from_headers_equals_the_file(tmp_path: Path) -> None:
    directory = write_tiny(tmp_path / "model", "ernie4_5_moe")
    checkpoint = Checkpoint(directory)
    size = checkpoint_size(checkpoint, read_layout(checkpoint))
    assert size == size_from_config(directory / "config.json")
    assert size.bytes_with(8) == sum(tensor.num_bytes for tensor in checkpoint.tensors.values())
    # Two layers; an expert has 3 matrices of 24 x 32, a router row of 32 and one bias, in float32.
    assert size.per_expert_bytes == 2 * 4 * (3 * 24 * 32 + 32 + 1)


def test_a_plan_names_its_directory_survives_its_file_and_measures_stability(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_tiny(tmp_path / "model", "qwen3_moe"))
    first = statistics({"0": [5, 1, 7, 2, 9, 3, 8, 4], "1": [1, 2, 3, 4, 5, 6, 7, 8]})
    plan = make_plan(checkpoint, [first, first], PlanConfig(ratio=0.25), data="d")
    assert plan.directory_name == "reap-seed_42-0.25"
    assert plan.stability == 1.0
    assert make_plan(checkpoint, [first], PlanConfig(ratio=0.25), data="d").stability is None
    plan.write(tmp_path / "reap_plan.json")
    assert read_plan(tmp_path) == plan
    other = statistics({"0": [1, 9, 1, 9, 1, 9, 1, 9], "1": [8, 7, 6, 5, 4, 3, 2, 1]})
    shaky = make_plan(checkpoint, [first, other], PlanConfig(num_experts=4, seed=7), data="d")
    assert shaky.directory_name == "reap-seed_7-0.50"
    assert shaky.stability is not None and 0.2 < shaky.stability < 1.0
    assert routed_share_lost(plan) == {"0": 0.25, "1": 0.25}
    protected = make_plan(
        checkpoint, [first], PlanConfig(ratio=0.5, protect="outliers", criterion="frequency"), data="d"
    )
    assert protected.directory_name == "frequency-perserve_outlier-seed_42-0.50"


def test_prediction_layers_keep_as_many(tmp_path: Path) -> None:
    directory = write_tiny(tmp_path / "model", "glm4_moe")
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    draft = {name.replace("layers.2.", "layers.3."): t.clone() for name, t in tensors.items() if "layers.2.mlp" in name}
    save_file(tensors | draft, directory / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint(directory)
    layout = read_layout(checkpoint)
    assert (layout.layers, layout.mtp_layers) == (("1", "2"), ("3",))
    sums = statistics({"1": [1, 2, 3, 4, 5, 6, 7, 8], "2": [8, 7, 6, 5, 4, 3, 2, 1]})
    plan = make_plan(checkpoint, [sums], PlanConfig(ratio=0.25), data="d")
    # Two groups of four lose one each.
    assert plan.kept == {"1": (1, 2, 3, 5, 6, 7), "2": (0, 1, 2, 4, 5, 6), "3": (0, 1, 2, 4, 5, 6)}
    from sparkray.pruning.rewrite import rewrite

    rewrite(checkpoint, plan, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.3.mlp.experts.{}.up_proj.weight"
    assert (found[name.format(3)] == draft[name.format(4)]).all()
    assert name.format(6) not in found
    assert (
        found["model.layers.3.mlp.gate.weight"] == draft["model.layers.3.mlp.gate.weight"][[0, 1, 2, 4, 5, 6]]
    ).all()


def test_a_plan_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "reap_plan.json").write_text('{"kept": {}}')
    with pytest.raises(InputError, match="not a plan of version 1"):
        read_plan(tmp_path)


def test_the_heat_map_is_a_picture_of_relative_scores(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    checkpoint = Checkpoint(write_tiny(tmp_path / "model", "qwen3_moe"))
    sums = statistics({"0": [5, 1, 7, 2, 10, 3, 8, 4], "1": [0] * 8})
    plan = make_plan(checkpoint, [sums], PlanConfig(ratio=0.25), data="d")
    assert relative_scores(plan).tolist() == [[0.5, 0.1, 0.7, 0.2, 1.0, 0.3, 0.8, 0.4], [0.0] * 8]
    write_heatmap(plan, tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_shipped_settings_are_valid() -> None:
    folder = Path(__file__).parents[2] / "configs" / "pruning"
    files = sorted(folder.glob("*.toml"))
    assert files
    for file in files:
        load_settings(PruneConfig, [file])
    replaced = load_settings(PruneConfig, [files[0]], values={"plan": {"ratio": None, "target_gb": 5.0}})
    assert (replaced.plan.ratio, replaced.plan.target_gb) == (None, 5.0)


def test_identity_changes_with_a_weight(tmp_path: Path) -> None:
    directory = write_tiny(tmp_path / "model", "qwen3_moe")
    copy = shutil.copytree(directory, tmp_path / "copy")
    assert Checkpoint(copy).identity == Checkpoint(directory).identity
    other = write_tiny(tmp_path / "other", "qwen3_moe", seed=3)
    assert Checkpoint(other).identity != Checkpoint(directory).identity
