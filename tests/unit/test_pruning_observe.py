"""What the observer sums, against a float64 recomputation by hand, for seven families and two placements."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_moe import FAMILIES, read_inputs, reference_saliency, write_inputs, write_tiny
from transformers import AutoModelForCausalLM

from sparkray.config.pruning import CalibrationConfig, ObserveConfig
from sparkray.errors import InputError
from sparkray.pruning.calibration import read_calibration
from sparkray.pruning.checkpoint import Checkpoint
from sparkray.pruning.criteria import expert_scores
from sparkray.pruning.observation import ShardObserver, observation_key, observe
from sparkray.pruning.observe import ExpertObserver
from sparkray.pruning.partials import PartialStore
from sparkray.pruning.statistics import Statistics

EXACT = ("total_tokens", "expert_frequency")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs") / "inputs.json")


@pytest.fixture(scope="module", params=FAMILIES)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp(request.param), request.param)


def observed(directory: Path, inputs: Path, store: Path, **settings: Any) -> Statistics:
    checkpoint = Checkpoint(directory)
    data = read_calibration(inputs, CalibrationConfig())
    config = ObserveConfig(**{"shard_sequences": 2, "placement": "resident"} | settings)
    return observe(checkpoint, data, config, PartialStore(store, observation_key(checkpoint, data, config)))


def assert_same_fields(statistics: Statistics, expected: dict[str, Any], tolerance: float = 1e-5) -> None:
    assert list(statistics) == list(expected)
    for layer, fields in expected.items():
        found = statistics[layer].to_json()
        assert set(found) == set(fields)
        for name, value in fields.items():
            if name in EXACT:
                assert found[name] == value, (layer, name)
            else:
                np.testing.assert_allclose(found[name], value, rtol=tolerance, err_msg=f"layer {layer} {name}")


def test_every_field_equals_the_float64_reference(directory: Path, inputs: Path, tmp_path: Path) -> None:
    expected = reference_saliency(directory, inputs)
    assert len(expected) == 2
    assert_same_fields(observed(directory, inputs, tmp_path), expected)
    assert_same_fields(observed(directory, inputs, tmp_path / "s", placement="streaming"), expected)


@pytest.mark.parametrize(
    ("family", "changed", "layers"),
    [
        ("llama4_text", {"interleave_moe_layer_step": 2, "num_hidden_layers": 4}, ["1", "3"]),
        ("llama4_text", {"no_rope_layers": [1, 0], "use_qk_norm": True, "attention_chunk_size": 8}, ["0", "1"]),
        ("ernie4_5_moe", {"num_hidden_layers": 3, "moe_layer_start_index": 1, "moe_layer_end_index": -1}, ["1", "2"]),
        ("qwen3_moe", {"norm_topk_prob": False, "mlp_only_layers": [0]}, ["1"]),
        ("glm4_moe", {"norm_topk_prob": False, "topk_group": 1}, ["1", "2"]),
        ("deepseek_v2", {"topk_method": "greedy", "q_lora_rank": 12, "n_group": 1}, ["1", "2"]),
    ],
)
def test_shapes_that_a_family_may_take(
    family: str, changed: dict[str, Any], layers: list[str], inputs: Path, tmp_path: Path
) -> None:
    directory = write_tiny(tmp_path / "model", family, **changed)
    found = observed(directory, inputs, tmp_path, placement="streaming")
    assert list(found) == layers
    assert_same_fields(found, reference_saliency(directory, inputs))


def test_watching_does_not_change_the_logits(directory: Path, inputs: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ids, mask = read_inputs(inputs)
    with torch.no_grad():
        plain = model(input_ids=ids, attention_mask=mask).logits
        interface = Checkpoint(directory).family.interface
        with ExpertObserver(model, interface) as observer, observer.watching(mask):
            watched = model(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(plain, watched)


@pytest.mark.parametrize("family", ["glm4_moe", "ernie4_5_moe", "mixtral"])
@pytest.mark.parametrize("renormalize", [True, False])
def test_upstream_gates_are_softmax_of_raw_logits(family: str, renormalize: bool, inputs: Path, tmp_path: Path) -> None:
    directory = write_tiny(tmp_path / "model", family)
    found = observed(directory, inputs, tmp_path, gate_source="upstream", renormalize_upstream=renormalize)
    assert_same_fields(found, reference_saliency(directory, inputs, "upstream", renormalize))


def test_a_retried_shard_is_counted_once_and_order_does_not_matter(inputs: Path, tmp_path: Path) -> None:
    directory = write_tiny(tmp_path / "model", "qwen3_moe")
    whole = observed(directory, inputs, tmp_path / "a")
    checkpoint, data = Checkpoint(directory), read_calibration(inputs, CalibrationConfig())
    config = ObserveConfig(shard_sequences=2, placement="resident")
    store = PartialStore(tmp_path / "b", observation_key(checkpoint, data, config))
    observer = ShardObserver(checkpoint, config)
    shards = data.shards(2)
    for number in (2, 0, 2):
        store.write(number, observer.observe([shards[number]])[0])
    with pytest.raises(InputError, match="not been observed"):
        store.merged(len(shards))
    again = observe(checkpoint, data, config, store)
    assert {k: v.tobytes() for k, v in again.to_arrays().items()} == {
        k: v.tobytes() for k, v in whole.to_arrays().items()
    }


def test_a_damaged_partial_is_named(inputs: Path, tmp_path: Path) -> None:
    directory = write_tiny(tmp_path / "model", "qwen3_moe")
    observed(directory, inputs, tmp_path / "a")
    victim = sorted((tmp_path / "a").rglob("shard-*.npz"))[1]
    victim.write_bytes(victim.read_bytes()[:100])
    with pytest.raises(InputError, match=r"shard-00001\.npz are damaged"):
        observed(directory, inputs, tmp_path / "a")


GOLDENS = os.environ.get("SPARKRAY_REAP_GOLDENS")


@pytest.mark.skipif(GOLDENS is None, reason="SPARKRAY_REAP_GOLDENS names no folder of golden saliencies")
@pytest.mark.parametrize("placement", ["resident", "streaming"])
def test_golden_files_where_they_are_given(placement: str, tmp_path: Path) -> None:
    root = Path(str(GOLDENS))
    references = sorted(root.glob("*/saliency_float64.json"))
    assert references
    for reference in references:
        expected = json.loads(reference.read_text())["layers"]
        found = observed(reference.parent, root / "inputs.json", tmp_path, placement=placement, shard_sequences=64)
        assert_same_fields(found, expected)
        for layer, fields in expected.items():
            scores = expert_scores(found[layer], "reap")
            for share in (4, 2):
                num_cut = len(scores) // share
                cut = set(np.argsort(scores)[:num_cut].tolist())
                assert cut == set(np.argsort(fields["reap"])[:num_cut].tolist()), (reference, layer)


@pytest.mark.skipif(GOLDENS is None, reason="SPARKRAY_REAP_GOLDENS names no folder of golden saliencies")
@pytest.mark.parametrize("renormalize", [True, False])
def test_upstream_goldens_where_they_are_given(renormalize: bool, tmp_path: Path) -> None:
    root = Path(str(GOLDENS))
    references = sorted(root.glob("*/saliency_upstream.json"))
    assert references
    for reference in references:
        modes = json.loads(reference.read_text())["modes"]
        settings = {"gate_source": "upstream", "renormalize_upstream": renormalize, "shard_sequences": 64}
        found = observed(reference.parent, root / "inputs.json", tmp_path, **settings)
        for layer, fields in modes[f"renorm_{str(renormalize).lower()}"].items():
            ours = found[layer].to_json()
            for name, expected in fields.items():
                value = ours["max_activations_signed" if name == "max_activations" else name]
                np.testing.assert_allclose(value, expected, rtol=1e-5, err_msg=f"{reference} {layer} {name}")
