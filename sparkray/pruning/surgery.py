"""Cutting experts out of the bytes of one safetensors shard: no tensor library, no dtype, one buffer of memory.

A kept expert's bytes are copied as they are, so BF16, FP8, MXFP4 and NVFP4 stay bit for bit what they were.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import xxhash

from sparkray.errors import UnavailableError
from sparkray.pruning.checkpoint import ShardHeader, TensorEntry
from sparkray.pruning.layout import Layout, TensorRole
from sparkray.pruning.whole_files import written_whole

# Small enough to stay in a core's cache between reading, hashing and writing: larger ones cost twice the CPU time.
_CHUNK_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class CutTensor:
    """One tensor of the new shard: `runs` are (offset in the old file, bytes), in the order of the new bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    runs: tuple[tuple[int, int], ...]

    @property
    def num_bytes(self) -> int:
        return sum(length for _, length in self.runs)


@dataclass(frozen=True, slots=True)
class ShardCut:
    """Everything that writing one shard needs; it may be sent to another process."""

    source: Path
    target: Path
    tensors: tuple[CutTensor, ...]
    metadata: Mapping[str, str]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors)


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """What was written: file bytes and their 128-bit XXH3 checksum."""

    name: str
    num_bytes: int
    xxh3_128: str


def plan_shard(
    header: ShardHeader, layout: Layout, kept: Mapping[str, tuple[int, ...]], source: Path, target: Path
) -> ShardCut:
    """The new shard's tensors, in the old order."""
    tensors = []
    for tensor in header.tensors:
        cut = _cut_tensor(tensor, layout.roles[tensor.name], kept)
        if cut is not None:
            tensors.append(cut)
    return ShardCut(source, target, tuple(tensors), header.metadata or {"format": "pt"})


def write_shard(cut: ShardCut) -> ShardRecord:
    """Write a shard under a temporary name, fsync it, and rename it to its own.

    Raises:
        UnavailableError: the disk filled up; the temporary file is gone and the shard can be written again.
    """
    # A guard against torn and rotten bytes, not against forgers: SHA-256 took more CPU time than all the copying.
    digest = xxhash.xxh3_128()
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    with (
        written_whole(cut.target) as temporary,
        cut.source.open("rb", buffering=0) as source,
        temporary.open("wb", buffering=0) as target,
    ):
        head = _header_bytes(cut)
        target.write(head)
        digest.update(head)
        written = len(head)
        for start, length in _merged_runs(cut.tensors):
            source.seek(start)
            written += length
            while length:
                part = buffer[: min(length, _CHUNK_BYTES)]
                count = source.readinto(part)
                if not count:
                    raise UnavailableError(f"{cut.source} ended while it was being read: it changed meanwhile.")
                _write_all(target.fileno(), part[:count])
                digest.update(part[:count])
                length -= count
        os.fsync(target.fileno())
    return ShardRecord(cut.target.name, written, digest.hexdigest())


def renumbered(name: str, role: TensorRole, kept: Mapping[str, tuple[int, ...]]) -> str | None:
    """The name of an expert's tensor (or module) after the cut, or None if the expert is cut."""
    experts = kept[role.layer]
    if role.expert not in experts:
        return None
    head, _, tail = name.rpartition(f".experts.{role.expert}")
    return f"{head}.experts.{experts.index(role.expert)}{tail}"


def _cut_tensor(tensor: TensorEntry, role: TensorRole, kept: Mapping[str, tuple[int, ...]]) -> CutTensor | None:
    whole = ((tensor.start, tensor.num_bytes),)
    if role.role == "other":
        return CutTensor(tensor.name, tensor.dtype, tensor.shape, whole)
    if role.role == "expert":
        name = renumbered(tensor.name, role, kept)
        return None if name is None else CutTensor(name, tensor.dtype, tensor.shape, whole)
    experts = kept[role.layer]
    row_bytes = tensor.num_bytes // tensor.shape[role.axis]
    runs = tuple((tensor.start + expert * row_bytes, row_bytes) for expert in experts)
    shape = (*tensor.shape[: role.axis], len(experts), *tensor.shape[role.axis + 1 :])
    return CutTensor(tensor.name, tensor.dtype, shape, runs)


def _header_bytes(cut: ShardCut) -> bytes:
    header: dict[str, object] = {"__metadata__": dict(cut.metadata)}
    offset = 0
    for tensor in cut.tensors:
        end = offset + tensor.num_bytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of eight
    return struct.pack("<Q", len(text)) + text


def _merged_runs(tensors: tuple[CutTensor, ...]) -> list[tuple[int, int]]:
    """Neighbouring runs become one: most of a shard is copied in long reads."""
    merged: list[tuple[int, int]] = []
    for tensor in tensors:
        for start, length in tensor.runs:
            if merged and merged[-1][0] + merged[-1][1] == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + length)
            elif length:
                merged.append((start, length))
    return merged


def _write_all(handle: int, data: memoryview) -> None:
    while data:
        data = data[os.write(handle, data) :]
