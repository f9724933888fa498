"""What a store holds, and who said it: `header.json` when it is begun, `manifest.json` when it is whole."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparkray.distill.identity import TeacherIdentity
from sparkray.errors import InputError, NotFoundError, UsageError

HEADER, MANIFEST = "header.json", "manifest.json"
FORMAT = 2


@dataclass(frozen=True, slots=True)
class StoreHeader:
    """What decides every number of a store.

    Attributes:
        teacher: who said it.
        data_sha256: of the packed corpus.
        num_sequences: of its training part.
        vocab_size: ids below 65,536 take two bytes each.
        top_logprobs, tail_draws, temperature, seed: of the settings.
        shard_sequences: sequences in one file.
        format: version of the files.
    """

    teacher: TeacherIdentity
    data_sha256: str
    num_sequences: int
    vocab_size: int
    top_logprobs: int
    tail_draws: int
    temperature: float
    seed: int
    shard_sequences: int
    format: int = FORMAT

    @property
    def store_id(self) -> str:
        """Hex SHA-256 of all of it: two stores of one id hold the same numbers."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @property
    def num_shards(self) -> int:
        return -(-self.num_sequences // self.shard_sequences)

    def shard_range(self, shard: int) -> range:
        """Numbers of the sequences in a shard."""
        start = shard * self.shard_sequences
        return range(start, min(start + self.shard_sequences, self.num_sequences))


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """A finished file: its name, hash, size, and the tokens it answers for."""

    name: str
    sha256: str
    num_bytes: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """A whole store."""

    header: StoreHeader
    shards: tuple[ShardEntry, ...]

    @property
    def bytes_per_token(self) -> float:
        """Size of the files over the tokens scored."""
        return sum(shard.num_bytes for shard in self.shards) / max(1, sum(shard.num_tokens for shard in self.shards))


def begin_store(folder: Path, header: StoreHeader) -> None:
    """Claim a folder for a store, new or begun before.

    Raises:
        UsageError: the folder belongs to another store; the message names what differs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / HEADER
    if path.is_file():
        found = read_header(folder)
        if found != header:
            ours, theirs = asdict(header), asdict(found)
            differing = ", ".join(f"{key} ({theirs[key]!r:.60} there)" for key in ours if ours[key] != theirs[key])
            raise UsageError(
                f"the store {folder} was begun with other settings: {differing}.",
                hint="Give another folder, or delete this one.",
                param="store",
            )
        return
    write_json(path, asdict(header))


def read_header(folder: Path) -> StoreHeader:
    """The header of a store that was begun."""
    return _header(json.loads((folder / HEADER).read_text(encoding="utf-8")))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a whole store.

    Raises:
        NotFoundError: no store, or one that is not finished.
        InputError: a store of another format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        state = "is not finished" if (folder / HEADER).is_file() else "holds no logit store"
        raise NotFoundError(
            f"{folder} {state}.", hint="Run `sparkray distill store` on it; finished shards are kept.", param="store"
        )
    described = json.loads(path.read_text(encoding="utf-8"))
    if described["header"]["format"] != FORMAT:
        raise InputError(f"the store {folder} has format {described['header']['format']}, and {FORMAT} is read here.")
    return Manifest(_header(described["header"]), tuple(ShardEntry(**shard) for shard in described["shards"]))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Say that a store is whole."""
    described = {"header": asdict(manifest.header), "shards": [asdict(shard) for shard in manifest.shards]}
    write_json(
        folder / MANIFEST,
        described | {"store_id": manifest.header.store_id, "bytes_per_token": manifest.bytes_per_token},
    )


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file whole or not at all."""
    building = path.with_name(f"{path.name}.building")
    building.write_text(json.dumps(content, indent=1, sort_keys=True), encoding="utf-8")
    building.rename(path)


def _header(described: dict[str, Any]) -> StoreHeader:
    return StoreHeader(**{**described, "teacher": TeacherIdentity(**described["teacher"])})
