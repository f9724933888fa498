"""Byte surgery against slicing in memory, in every precision; and what a rewrite refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_moe import FAMILIES, NUM_EXPERTS, read_inputs, write_inputs, write_tiny
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from sparkray.config.pruning import CalibrationConfig, ObserveConfig, PlanConfig
from sparkray.errors import InputError, NotFoundError, UnavailableError, UsageError
from sparkray.pruning.calibration import read_calibration
from sparkray.pruning.checkpoint import Checkpoint, read_header
from sparkray.pruning.layered_model import LayeredModel
from sparkray.pruning.layout import read_layout
from sparkray.pruning.mxfp4 import quantise_mxfp4
from sparkray.pruning.observation import ShardObserver
from sparkray.pruning.plan import PrunePlan, make_plan, read_plan
from sparkray.pruning.requantise import requantise
from sparkray.pruning.rewrite import rewrite, verify_checksums
from sparkray.pruning.surgery import ShardCut, ShardRecord, plan_shard, write_shard
from sparkray.pruning.tensors import dequantise_mxfp4
from sparkray.pruning.whole_files import write_atomically


def plan_of(directory: Path, inputs: Path, **settings: Any) -> PrunePlan:
    checkpoint = Checkpoint(directory)
    data = read_calibration(inputs, CalibrationConfig())
    observer = ShardObserver(checkpoint, ObserveConfig(placement="resident"))
    parts = observer.observe(data.shards(3))
    return make_plan(checkpoint, parts, PlanConfig(**settings or {"ratio": 0.25}), data=data.identity)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs") / "inputs.json")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A qwen3_moe checkpoint of several shards, with the files that come along."""
    directory = write_tiny(tmp_path_factory.mktemp("sharded") / "model", "qwen3_moe", max_shard_size="60KB")
    assert len(list(directory.glob("*.safetensors"))) > 2
    (directory / "tokenizer.json").write_text('{"a": 1}')
    (directory / "tokenizer_config.json").write_text("{}")
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    (directory / "pytorch_model.bin").write_bytes(b"old weights with all experts")
    return directory


@pytest.fixture(scope="module")
def sharded_plan(sharded: Path, inputs: Path) -> PrunePlan:
    return plan_of(sharded, inputs)


def sliced_in_memory(directory: Path, plan: PrunePlan) -> Any:
    """The model as transformers loads it, with experts and router rows taken out of its modules."""
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    for number, layer in enumerate(model.model.layers):
        block = layer.feed_forward if hasattr(layer, "feed_forward") else layer.mlp
        if not hasattr(block, "experts"):
            continue
        keep = torch.tensor(plan.kept[str(number)])
        router = block.gate if hasattr(block, "gate") else block.router
        for module in (block.experts, router):
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, torch.nn.Parameter(parameter.detach()[keep]))
        if hasattr(router, "e_score_correction_bias"):
            router.e_score_correction_bias = router.e_score_correction_bias[keep]
        if hasattr(router, "moe_statics"):
            statics = router.moe_statics
            statics.e_score_correction_bias = torch.nn.Parameter(statics.e_score_correction_bias.detach()[:, keep])
        for module in (block, block.experts, router):
            if hasattr(module, "num_experts"):
                module.num_experts = len(keep)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_byte_surgery_equals_slicing_in_memory(family: str, inputs: Path, tmp_path: Path) -> None:
    directory = write_tiny(tmp_path / "model", family, max_shard_size="100KB")
    plan = plan_of(directory, inputs)
    assert plan.num_experts_after == 6
    rewrite(Checkpoint(directory), plan, tmp_path / "pruned")
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()
    ids, mask = read_inputs(inputs)
    with torch.no_grad():
        expected = sliced_in_memory(directory, plan)(input_ids=ids, attention_mask=mask).logits
        found = pruned(input_ids=ids, attention_mask=mask).logits
        before = AutoModelForCausalLM.from_pretrained(directory)(input_ids=ids, attention_mask=mask).logits
    assert float((found - expected).abs().max()) == 0.0
    assert float((found - before).abs().max()) > 1e-3
    assert read_layout(Checkpoint(tmp_path / "pruned")).num_experts == 6


def test_everything_comes_along_and_the_source_is_untouched(
    sharded: Path, sharded_plan: PrunePlan, tmp_path: Path
) -> None:
    before = {path.name: path.read_bytes() for path in sharded.iterdir()}
    summary = rewrite(Checkpoint(sharded), sharded_plan, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in sharded.iterdir()} == before
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"} <= names
    assert "pytorch_model.bin" not in names
    assert not [name for name in names if name.startswith(".") or name.endswith((".tmp", ".partial"))]
    assert verify_checksums(tmp_path / "out") == summary.num_shards
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    for tensor, shard in index["weight_map"].items():
        with safe_open(tmp_path / "out" / shard, "pt") as file:
            assert tensor in file.keys()  # noqa: SIM118 - safetensors' handle is no mapping
    assert index["metadata"]["total_size"] == summary.num_bytes == sharded_plan.bytes_after
    assert read_plan(tmp_path / "out") == sharded_plan


def test_every_spelling_of_the_count_is_edited_and_none_added(inputs: Path, tmp_path: Path) -> None:
    directory = write_tiny(tmp_path / "model", "glm4_moe")
    config = json.loads((directory / "config.json").read_text())
    config["num_local_experts"] = NUM_EXPERTS
    config["quantization_config"] = {"ignore": ["lm_head", "model.layers.1.mlp.experts.7.up_proj"]}
    (directory / "config.json").write_text(json.dumps(config))
    checkpoint = Checkpoint(directory)
    layout = read_layout(checkpoint)
    plan = plan_of(directory, inputs)
    rewrite(checkpoint, plan, tmp_path / "out")
    edited = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (edited["num_local_experts"], edited["n_routed_experts"]) == (6, 6)
    assert set(edited) == set(config)
    kept = plan.kept["1"]
    moved = [f"model.layers.1.mlp.experts.{kept.index(7)}.up_proj"] if 7 in kept else []
    assert edited["quantization_config"]["ignore"] == ["lm_head", *moved]
    assert layout.num_experts == NUM_EXPERTS


def test_a_killed_rewrite_goes_on_with_what_is_missing(sharded: Path, sharded_plan: PrunePlan, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def two_then_killed(write: Any, cuts: Iterable[ShardCut]) -> Iterable[ShardRecord]:
        for number, cut in enumerate(cuts):
            if number == 2:
                # Half of a shard under its temporary name is what a kill leaves.
                cut.target.with_name(f".{cut.target.name}.tmp").write_bytes(b"half")
                raise Killed
            yield write(cut)

    checkpoint = Checkpoint(sharded)
    with pytest.raises(Killed):
        rewrite(checkpoint, sharded_plan, tmp_path / "out", run=two_then_killed)
    assert not (tmp_path / "out").exists()
    written: list[str] = []

    def noted(write: Any, cuts: Iterable[ShardCut]) -> Iterable[ShardRecord]:
        for cut in cuts:
            written.append(cut.target.name)
            yield write(cut)

    summary = rewrite(checkpoint, sharded_plan, tmp_path / "out", run=noted)
    assert summary.num_reused == 2
    assert len(written) == summary.num_shards - 2
    rewrite(checkpoint, sharded_plan, tmp_path / "whole")
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert rewrite(checkpoint, sharded_plan, tmp_path / "out").num_reused == summary.num_shards


def test_a_full_disk_says_so_and_leaves_nothing_half_written(
    sharded: Path, sharded_plan: PrunePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, written = os.write, 0

    def small_disk(handle: int, data: Any) -> int:
        nonlocal written
        written += len(data)
        if written > 100_000:
            raise OSError(28, "No space left on device")
        return real(handle, data)

    monkeypatch.setattr("sparkray.pruning.surgery.os.write", small_disk)
    with pytest.raises(UnavailableError, match="filled up while model-0000"):
        rewrite(Checkpoint(sharded), sharded_plan, tmp_path / "out")
    monkeypatch.undo()
    assert not list((tmp_path / "out.partial").glob("*.tmp"))
    for shard in (tmp_path / "out.partial").glob("*.safetensors"):
        read_header(shard)
    assert rewrite(Checkpoint(sharded), sharded_plan, tmp_path / "out").num_reused >= 1


def test_a_disk_that_fills_under_a_small_file_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plan.json").write_text("old")

    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sparkray.pruning.whole_files.os.fsync", full)
    with pytest.raises(UnavailableError, match=r"filled up while plan\.json"):
        write_atomically(tmp_path / "plan.json", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    assert (tmp_path / "plan.json").read_text() == "old"


def test_too_small_a_disk_is_refused_before_anything_is_written(
    sharded: Path, sharded_plan: PrunePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr("sparkray.pruning.rewrite.shutil.disk_usage", lambda _path: usage)
    with pytest.raises(UnavailableError, match="GB are free"):
        rewrite(Checkpoint(sharded), sharded_plan, tmp_path / "out")


def test_an_output_that_exists_or_lies_in_the_source_is_refused(
    sharded: Path, sharded_plan: PrunePlan, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    checkpoint = Checkpoint(sharded)
    with pytest.raises(UsageError, match="exists and does not hold"):
        rewrite(checkpoint, sharded_plan, tmp_path / "out")
    with pytest.raises(UsageError, match="lies in the source"):
        rewrite(checkpoint, sharded_plan, sharded / "pruned")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_a_plan_of_another_model_is_refused(sharded: Path, inputs: Path, tmp_path: Path) -> None:
    other = plan_of(write_tiny(tmp_path / "other", "qwen3_moe", seed=5), inputs)
    with pytest.raises(InputError, match="made for another model"):
        rewrite(Checkpoint(sharded), other, tmp_path / "out")


def test_a_dry_run_gives_the_sizes_and_writes_nothing(sharded: Path, sharded_plan: PrunePlan, tmp_path: Path) -> None:
    summary = rewrite(Checkpoint(sharded), sharded_plan, tmp_path / "out", dry_run=True)
    assert not list(tmp_path.iterdir())
    real = rewrite(Checkpoint(sharded), sharded_plan, tmp_path / "out")
    assert summary.num_bytes == real.num_bytes
    on_disk = sum(tensor.num_bytes for tensor in Checkpoint(tmp_path / "out").tensors.values())
    assert on_disk == summary.num_bytes


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("model.layers.0.mlp.experts.usage_table", [3, 8], "first dimension"),
        ("model.layers.0.mlp.gate.temperature", [8], "not known to have it"),
        ("model.layers.0.mlp.balance", [8, 4], "not known to have it"),
        ("model.layers.0.self_attn.expert_mix", [4], "outside of 'mlp'"),
        ("model.expert_counts", [2, 8], "outside of the sparse layers"),
    ],
)
def test_unknown_tensors_that_look_like_experts_are_refused_by_name(
    name: str, shape: list[int], reason: str, tmp_path: Path
) -> None:
    directory = write_tiny(tmp_path / "model", "qwen3_moe")
    tensors = load_file(directory / "model.safetensors") | {name: torch.zeros(shape)}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=reason) as raised:
        read_layout(Checkpoint(directory))
    assert repr(name) in str(raised.value)


def test_damaged_and_incomplete_checkpoints_are_named(sharded: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(sharded, tmp_path / "copy")
    victim = sorted(copy.glob("*.safetensors"))[1]
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-10])
    with pytest.raises(InputError, match=f"{victim.name} is truncated"):
        Checkpoint(copy)
    victim.unlink()
    with pytest.raises(NotFoundError, match=victim.name):
        Checkpoint(copy)
    victim.write_bytes(whole)
    (copy / "model.safetensors.index.json").unlink()
    with pytest.raises(InputError, match=r"no model\.safetensors\.index\.json"):
        Checkpoint(copy)


def test_dense_and_unknown_models_are_refused(tmp_path: Path, sharded: Path) -> None:
    copy = shutil.copytree(sharded, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    for changes, expected in (
        ({"model_type": "llama", "num_experts": None, "num_local_experts": None}, "it is a dense model"),
        ({"model_type": "starfish_moe"}, "not in the registry"),
        ({"num_experts": 6, "num_local_experts": 8}, "different numbers of experts"),
    ):
        (copy / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(InputError, match=expected):
            read_layout(Checkpoint(copy))


@given(
    kept=st.sets(st.integers(0, 7), min_size=1).map(sorted),
    dtype=st.sampled_from(["float32", "bfloat16", "uint8", "float8_e4m3fn"]),
    columns=st.integers(1, 5),
)
def test_a_cut_shard_holds_the_kept_rows_of_any_type(
    kept: list[int], dtype: str, columns: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("surgery")
    rows = torch.arange(8 * columns, dtype=torch.uint8).reshape(8, columns)
    item = getattr(torch, dtype)
    stacked = rows.repeat_interleave(item.itemsize, dim=1).view(item)
    tensors = {"model.layers.0.mlp.experts.gate_up_proj": stacked, "model.norm.weight": torch.ones(3)}
    tensors["model.layers.0.mlp.router.weight"] = torch.arange(16.0).reshape(8, 2)
    tensors["model.layers.0.mlp.router.bias"] = torch.arange(8.0)
    save_file(tensors, folder / "model.safetensors")
    config = {"model_type": "gpt_oss", "num_local_experts": 8, "num_hidden_layers": 1, "num_experts_per_tok": 1}
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint = Checkpoint(folder)
    header = checkpoint.headers["model.safetensors"]
    cut = plan_shard(
        header, read_layout(checkpoint), {"0": tuple(kept)}, folder / "model.safetensors", folder / "out.safetensors"
    )
    write_shard(cut)
    found = load_file(folder / "out.safetensors")
    for name, tensor in tensors.items():
        expected = tensor if name == "model.norm.weight" else tensor.view(8, -1).view(torch.uint8)[kept]
        assert torch.equal(found[name].view(torch.uint8).flatten(), expected.view(torch.uint8).flatten())


def test_mxfp4_codes_by_hand() -> None:
    weight = torch.zeros(1, 32)
    weight[0, :8] = torch.tensor([0.5, -1.5, 6.0, 5.0, 2.5, -0.25, 0.75, 3.9])
    blocks, scales = quantise_mxfp4(weight)
    assert scales.tolist() == [[127]]  # the largest is 6 = 1.5 * 2**2: scale 2**0
    # Codes: .5 -> 1; -1.5 -> 8 + 3; 6 -> 7; 5 is halfway 4 and 6 -> even code 6; 2.5 -> even 4; -.25 -> -0 = 8;
    # .75 -> even 2; 3.9 -> 6.
    assert blocks[0, 0, :4].tolist() == [0xB1, 0x67, 0x84, 0x62]
    weight[0, 0] = 48.0  # 1.5 * 2**5: scale 2**3
    blocks, scales = quantise_mxfp4(weight)
    assert scales.tolist() == [[130]]
    assert blocks[0, 0, 0].tolist() == 0x87  # 48 / 8 = 6 -> 7; -1.5 / 8 is below .25 -> -0
    assert quantise_mxfp4(torch.zeros(1, 32))[0].sum() == 0


@given(seed=st.integers(0, 2**31), low=st.integers(1, 120), span=st.integers(0, 100))
def test_mxfp4_values_survive_a_round_trip(seed: int, low: int, span: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (5, 3, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(low, low + span + 1, (5, 3), dtype=torch.uint8, generator=generator)
    values = dequantise_mxfp4(blocks, scales, torch.bfloat16)
    again = dequantise_mxfp4(*quantise_mxfp4(values), torch.bfloat16)
    assert torch.equal(values, again)


def test_gpt_oss_stays_mxfp4_and_dequantises_to_the_kept_experts(inputs: Path, tmp_path: Path) -> None:
    directory = write_tiny(tmp_path / "bf16", "gpt_oss")
    requantise(directory, tmp_path / "mxfp4")
    checkpoint = Checkpoint(tmp_path / "mxfp4")
    plan = plan_of(tmp_path / "mxfp4", inputs)
    rewrite(checkpoint, plan, tmp_path / "pruned")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("mxfp4", "pruned"))
    for layer, kept in plan.kept.items():
        for matrix in ("gate_up_proj", "down_proj"):
            name = f"model.layers.{layer}.mlp.experts.{matrix}"
            assert after[f"{name}_blocks"].dtype == torch.uint8
            old = dequantise_mxfp4(before[f"{name}_blocks"], before[f"{name}_scales"], torch.float32)
            new = dequantise_mxfp4(after[f"{name}_blocks"], after[f"{name}_scales"], torch.float32)
            assert torch.equal(new, old[list(kept)])
            theirs = convert_moe_packed_tensors(after[f"{name}_blocks"], after[f"{name}_scales"], dtype=torch.float32)
            assert torch.equal(new.transpose(1, 2), theirs)
            assert torch.equal(after[f"{name}_bias"], before[f"{name}_bias"][list(kept)])
    assert (
        json.loads((tmp_path / "pruned" / "config.json").read_text())["quantization_config"]["quant_method"] == "mxfp4"
    )


KILLED_WHILE_QUANTISING = """
import os, signal, sys
from pathlib import Path
from sparkray.pruning import requantise

quantise, calls = requantise.quantise_mxfp4, 0

def killing(weight):
    global calls
    calls += 1
    if calls == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return quantise(weight)

requantise.quantise_mxfp4 = killing
requantise.requantise(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def test_kill_nine_while_quantising_goes_on_with_the_missing_shards(tmp_path: Path) -> None:
    directory = write_tiny(tmp_path / "bf16", "gpt_oss", max_shard_size="60KB")
    requantise(directory, tmp_path / "whole")
    command = [sys.executable, "-c", KILLED_WHILE_QUANTISING, str(directory), str(tmp_path / "out")]
    assert subprocess.run(command, timeout=240, check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "out.partial").glob("*.safetensors")}
    assert 0 < len(finished) < len(list((tmp_path / "whole").glob("*.safetensors")))
    requantise(directory, tmp_path / "out")
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        path.name for path in (tmp_path / "whole").iterdir()
    }
    for path, written in finished.items():
        assert (tmp_path / "out" / path.name).stat().st_mtime_ns == written


def test_an_mxfp4_forward_equals_that_of_its_dense_values(inputs: Path, tmp_path: Path) -> None:
    directory = write_tiny(tmp_path / "bf16", "gpt_oss")
    requantise(directory, tmp_path / "mxfp4")
    stored = load_file(tmp_path / "mxfp4" / "model.safetensors")
    dense = {}
    for name, tensor in stored.items():
        if name.endswith("_blocks"):
            base = name.removesuffix("_blocks")
            values = dequantise_mxfp4(tensor, stored[f"{base}_scales"], torch.bfloat16)
            dense[base] = values.transpose(1, 2).contiguous()
        elif not name.endswith("_scales"):
            dense[name] = tensor
    shutil.copytree(directory, tmp_path / "dense")
    save_file(dense, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    ids, mask = read_inputs(inputs)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16).eval()
    model = LayeredModel(Checkpoint(tmp_path / "mxfp4"), torch.bfloat16)
    model.load_layers(range(model.num_layers))
    with torch.no_grad():
        np.testing.assert_array_equal(
            model.run(ids, mask).float().numpy(), expected(input_ids=ids, attention_mask=mask).logits.float().numpy()
        )
