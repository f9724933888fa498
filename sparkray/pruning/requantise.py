"""A gpt-oss checkpoint in BF16, pruned elsewhere, becomes MXFP4 again: the experts alone, as the original has them."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from sparkray.errors import InputError, UsageError
from sparkray.pruning.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint, TensorEntry
from sparkray.pruning.mxfp4 import quantise_mxfp4
from sparkray.pruning.tensors import read_tensor
from sparkray.pruning.whole_files import fsync_directory, write_atomically, written_whole

_EXPERT_WEIGHT = re.compile(r"\.mlp\.experts\.(gate_up_proj|down_proj)$")
_MARK_NAME = ".requantize"
_FLOATING = ("F32", "F16", "BF16")
QUANTIZATION_CONFIG = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class _NewTensor:
    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


def requantise(source: Path, target: Path, progress: Progress | None = None) -> int:
    """Write `source` to `target` with its experts in MXFP4 and everything else in bfloat16.

    One tensor is held in memory. Values that came from MXFP4 come back as the same values. A killed run goes on with
    the shards that are missing: a shard has its name only when it is whole.

    Returns:
        Bytes of the new shards.

    Raises:
        InputError: another family, or experts that are not floating point.
        UsageError: the target exists.
    """
    checkpoint = Checkpoint(source)
    if checkpoint.family.model_type != "gpt_oss":
        raise InputError(
            f"{source} is a {checkpoint.family.model_type} model; MXFP4 is written for gpt_oss alone.",
            hint="A prune by `sparkray prune rewrite` keeps the precision of its source and needs no quantiser.",
        )
    experts = [entry for name, entry in checkpoint.tensors.items() if _EXPERT_WEIGHT.search(name)]
    if not experts or any(entry.dtype not in _FLOATING for entry in experts):
        raise InputError(f"{source} has no experts in floating point: there is nothing to quantise.")
    if target.exists():
        raise UsageError(f"the output directory {target} exists.", hint="Name another one with --out, or remove it.")
    building = target.with_name(f"{target.name}.partial")
    _open_building(building, checkpoint)
    weight_map: dict[str, str] = {}
    total = 0
    for number, (shard, header) in enumerate(checkpoint.headers.items(), 1):
        new = [tensor for entry in header.tensors for tensor in _new_tensors(entry)]
        weight_map |= {tensor.name: shard for tensor in new}
        total += sum(tensor.num_bytes for tensor in new)
        if not (building / shard).is_file():
            _write(checkpoint, building / shard, header.tensors, new)
        if progress is not None:
            progress(number, len(checkpoint.headers))
    _write_rest(checkpoint, building, weight_map, total)
    (building / _MARK_NAME).unlink()
    building.replace(target)
    fsync_directory(target.parent)
    return total


def _open_building(building: Path, checkpoint: Checkpoint) -> None:
    """Keep what an interrupted run over the same model has finished, and nothing else."""
    mark = building / _MARK_NAME
    if not mark.is_file() or mark.read_text(encoding="utf-8") != checkpoint.identity:
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        write_atomically(mark, checkpoint.identity.encode())
    for torn in building.glob(".*.tmp"):
        torn.unlink()


def _new_tensors(entry: TensorEntry) -> list[_NewTensor]:
    if not _EXPERT_WEIGHT.search(entry.name):
        if entry.dtype not in _FLOATING:
            return [_NewTensor(entry.name, entry.dtype, entry.shape, entry.num_bytes)]
        return [_NewTensor(entry.name, "BF16", entry.shape, 2 * math.prod(entry.shape))]
    num_experts, num_in, num_out = entry.shape
    blocks, scales = (num_experts, num_out, num_in // 32, 16), (num_experts, num_out, num_in // 32)
    num_scales = num_experts * num_out * (num_in // 32)
    return [
        _NewTensor(f"{entry.name}_blocks", "U8", blocks, 16 * num_scales),
        _NewTensor(f"{entry.name}_scales", "U8", scales, num_scales),
    ]


def _write(checkpoint: Checkpoint, path: Path, entries: tuple[TensorEntry, ...], new: list[_NewTensor]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in new:
        end = offset + tensor.num_bytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with written_whole(path) as temporary, temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for entry in entries:
            if _EXPERT_WEIGHT.search(entry.name):
                # The checkpoint holds [experts, in, out]; MXFP4 blocks run along the input.
                codes, scales = quantise_mxfp4(read_tensor(checkpoint, entry.name).transpose(1, 2).contiguous())
                file.write(codes.numpy().data)
                file.write(scales.numpy().data)
            elif entry.dtype in _FLOATING:
                values = read_tensor(checkpoint, entry.name).to(torch.bfloat16).reshape(-1)
                file.write(values.view(torch.uint8).numpy().data)
            else:
                file.write(checkpoint.read(entry.name))
        file.flush()
        os.fsync(file.fileno())


def _write_rest(checkpoint: Checkpoint, building: Path, weight_map: dict[str, str], total: int) -> None:
    config = {**checkpoint.config, "quantization_config": QUANTIZATION_CONFIG, "dtype": "bfloat16"}
    config.pop("torch_dtype", None)
    write_atomically(building / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    if list(checkpoint.headers) != [SINGLE_NAME]:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_atomically(building / INDEX_NAME, (json.dumps(index, indent=2) + "\n").encode())
    for path in checkpoint.directory.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name not in ("config.json", INDEX_NAME):
            write_atomically(building / path.name, path.read_bytes())
