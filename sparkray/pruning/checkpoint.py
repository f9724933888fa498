"""A safetensors checkpoint on disk: its headers, its index, and single tensors as bytes.

Nothing is mapped into memory: tensors are read with `pread`, so a 65 GB model costs what is being read.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sparkray.errors import InputError, NotFoundError
from sparkray.pruning.families import Family, family_of

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

# Bits of one element, by safetensors' names.
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F4": 4,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64,
}  # fmt: skip

_MAX_HEADER_BYTES = 512 * 1024 * 1024
_SAMPLES = 16
_SAMPLE_BYTES = 4096
_SHARD_NAME = re.compile(r"^(.+)-(\d{5})-of-(\d{5})\.safetensors$")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a shard: `start` is its offset in the file, after the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    start: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class ShardHeader:
    """A shard's tensors in the order of their bytes, and its free-form metadata."""

    tensors: tuple[TensorEntry, ...]
    metadata: Mapping[str, str]
    num_bytes: int


def read_header(path: Path) -> ShardHeader:
    """Header of one safetensors file.

    Raises:
        InputError: a file that is not safetensors, or is shorter than its header says.
    """
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _MAX_HEADER_BYTES
        if length >= min(_MAX_HEADER_BYTES, file_bytes):
            raise InputError(f"{path} has {file_bytes} bytes and is cut off inside its header, or is not safetensors.")
        try:
            raw = json.loads(file.read(length))
        except ValueError as failure:
            raise InputError(f"{path} is not safetensors: its header is not JSON ({failure}).") from failure
    metadata = raw.pop("__metadata__", {})
    base = 8 + length
    tensors = []
    for name, entry in raw.items():
        begin, end = entry["data_offsets"]
        bits = DTYPE_BITS.get(entry["dtype"])
        if bits is None:
            raise InputError(f"{path} holds {name!r} of the unknown type {entry['dtype']!r}.")
        if (end - begin) * 8 != math.prod(entry["shape"]) * bits:
            raise InputError(f"{path}: the header gives {name!r} {end - begin} bytes for shape {entry['shape']}.")
        tensors.append(TensorEntry(name, entry["dtype"], tuple(entry["shape"]), path.name, base + begin, end - begin))
    needed = max((tensor.start + tensor.num_bytes for tensor in tensors), default=base)
    if needed > file_bytes:
        raise InputError(
            f"{path} is truncated: it has {file_bytes} bytes and its header describes {needed}.",
            hint="Fetch the shard again.",
        )
    tensors.sort(key=lambda tensor: tensor.start)
    return ShardHeader(tuple(tensors), metadata, file_bytes)


class Checkpoint:
    """The shards and config.json of one model directory, opened for reading only.

    Raises:
        NotFoundError: the directory, config.json, or the shards do not exist.
        InputError: a shard is truncated, the index is missing or names shards that are not there.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config: dict[str, Any] = _read_config(directory)
        self.headers: dict[str, ShardHeader] = {name: read_header(directory / name) for name in _shard_names(directory)}
        self.tensors: dict[str, TensorEntry] = {
            tensor.name: tensor for header in self.headers.values() for tensor in header.tensors
        }

    @cached_property
    def family(self) -> Family:
        """Layout of this model type."""
        return family_of(self.config)

    @property
    def num_bytes(self) -> int:
        """Bytes of all shards, headers included."""
        return sum(header.num_bytes for header in self.headers.values())

    def read(self, name: str) -> bytearray:
        """The raw bytes of one tensor."""
        entry = self.tensors[name]
        buffer = bytearray(entry.num_bytes)
        view = memoryview(buffer)
        with (self.directory / entry.shard).open("rb", buffering=0) as file:
            file.seek(entry.start)
            done = 0
            while done < entry.num_bytes:
                count = file.readinto(view[done:])
                if not count:
                    raise InputError(f"{entry.shard} ended while {name!r} was being read: it is truncated.")
                done += count
        return buffer

    @cached_property
    def identity(self) -> str:
        """Hex digest that names this model: config, headers and samples of every shard's bytes."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for name, header in sorted(self.headers.items()):
            digest.update(f"{name}:{header.num_bytes}:".encode())
            for tensor in header.tensors:
                digest.update(f"{tensor.name}{tensor.dtype}{tensor.shape}".encode())
            with (self.directory / name).open("rb") as file:
                for sample in range(_SAMPLES):
                    file.seek(header.num_bytes * sample // _SAMPLES)
                    digest.update(file.read(_SAMPLE_BYTES))
                file.seek(max(0, header.num_bytes - _SAMPLE_BYTES))
                digest.update(file.read(_SAMPLE_BYTES))
        return digest.hexdigest()


def _read_config(directory: Path) -> dict[str, Any]:
    if not directory.is_dir():
        raise NotFoundError(f"the model directory {directory} does not exist.")
    path = directory / "config.json"
    if not path.is_file():
        raise NotFoundError(
            f"{directory} has no config.json: a model directory in the Hugging Face layout is expected."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as failure:
        raise InputError(f"{path} is not JSON: {failure}.") from failure
    if not isinstance(config, dict):
        raise InputError(f"{path} holds a {type(config).__name__}, and an object is expected.")
    return config


def _shard_names(directory: Path) -> list[str]:
    index = directory / INDEX_NAME
    present = sorted(path.name for path in directory.glob("*.safetensors"))
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as failure:
            raise InputError(f"{index} is not a safetensors index with a weight_map.") from failure
        missing = [name for name in names if name not in present]
        if missing:
            raise NotFoundError(f"{directory} lacks {len(missing)} shards that its index names: {', '.join(missing)}.")
        return names
    if SINGLE_NAME in present:
        return [SINGLE_NAME]
    if not present:
        raise NotFoundError(f"{directory} holds no .safetensors file.", hint="Other formats are not read.")
    if len(present) > 1 or _SHARD_NAME.match(present[0]):
        raise InputError(
            f"{directory} holds {', '.join(present[:3])}{' and more' if len(present) > 3 else ''} but no {INDEX_NAME}.",
            hint="Fetch the index: without it a missing shard would go unnoticed.",
        )
    return present
