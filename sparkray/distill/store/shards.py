"""One file of a store: a row a sequence, each column a flat list.

Log-probabilities are float16, ids two bytes where the vocabulary allows; both lie in split byte streams, whose high
bytes compress well. A head falls and a position's draws ascend, so of both the steps are kept, all first ones, all
second ones and so on: a step of a float16 is the difference of its two bytes read as a number. Steps wrap around, so
what does not fall or ascend comes back whole too.

Shapes: L rows, K entries, M draws.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sparkray.distill.scores import TokenScores
from sparkray.distill.store.manifest import ShardEntry, StoreHeader, write_json
from sparkray.errors import InputError
from sparkray.models.cache import file_sha256

_LISTS = ("head_ids", "head_logprob_steps", "token_logprobs", "tail_id_steps", "entropy")
# Stands for "no entry" in unsigned ids; a vocabulary of 65,536 and more takes four bytes.
_NO_ID_16 = 65_535


def shard_name(shard: int) -> str:
    """File of a shard."""
    return f"part-{shard:05d}.parquet"


def tokens_sha256(token_ids: Sequence[int]) -> bytes:
    """16 bytes that tie a row to the tokens it was taken from."""
    return hashlib.sha256(np.asarray(token_ids, np.int32).tobytes()).digest()[:16]


def write_shard(
    folder: Path,
    header: StoreHeader,
    shard: int,
    sequences: Sequence[Sequence[int]],
    scores: Sequence[TokenScores],
) -> ShardEntry:
    """Write one file and, after it, the entry that says it is finished.

    Args:
        folder: of the store.
        header: of the store.
        shard: its number.
        sequences: the tokens of its sequences.
        scores: their rows.
    """
    two_bytes = header.vocab_size <= _NO_ID_16
    ids: pa.DataType = pa.uint16() if two_bytes else pa.int32()
    columns: list[tuple[str, pa.DataType]] = [
        ("sequence", pa.int32()),
        ("tokens_sha256", pa.binary(16)),
        ("head_ids", pa.list_(ids)),
        ("head_logprob_steps", pa.list_(pa.uint16())),
        ("token_logprobs", pa.list_(pa.float16())),
        ("tail_id_steps", pa.list_(ids)),
        ("entropy", pa.list_(pa.float16())),
    ]
    kind = np.uint16 if two_bytes else np.int32
    table = pa.table(
        {
            "sequence": list(header.shard_range(shard)),
            "tokens_sha256": [tokens_sha256(token_ids) for token_ids in sequences],
            # -1 wraps to 65,535 in two bytes, which no id of such a vocabulary is.
            "head_ids": [one.head_ids_LK.astype(kind).ravel() for one in scores],
            "head_logprob_steps": [_steps(one.head_logprobs_LK.astype(np.float16).view(np.uint16)) for one in scores],
            "token_logprobs": [one.token_logprobs_L.astype(np.float16) for one in scores],
            "tail_id_steps": [_steps(one.tail_ids_LM.astype(kind)) for one in scores],
            "entropy": [one.entropy_L.astype(np.float16) for one in scores],
        },
        schema=pa.schema(columns),
    )
    path = folder / shard_name(shard)
    building = path.with_name(f"{path.name}.building")
    split: Any = [f"{name}.list.element" for name in _LISTS]  # the stubs know a bool only
    pq.write_table(
        table,
        building,
        compression="zstd",
        compression_level=19,
        use_dictionary=False,
        write_statistics=False,
        use_byte_stream_split=split,
    )
    building.rename(path)
    entry = ShardEntry(
        path.name, file_sha256(path), path.stat().st_size, sum(len(token_ids) for token_ids in sequences)
    )
    write_json(path.with_suffix(".json"), asdict(entry))
    return entry


def finished_shard(folder: Path, shard: int) -> ShardEntry | None:
    """The entry of a file that is there and has the hash it was written with, or None."""
    path = folder / shard_name(shard)
    try:
        entry = ShardEntry(**json.loads(path.with_suffix(".json").read_text(encoding="utf-8")))
        return entry if file_sha256(path) == entry.sha256 else None
    except (FileNotFoundError, ValueError, TypeError):
        return None


def read_shard(folder: Path, header: StoreHeader, entry: ShardEntry) -> dict[int, tuple[bytes, TokenScores]]:
    """Tokens' hash and rows by the number of the sequence.

    Raises:
        InputError: the file is not the one that was written.
    """
    path = folder / entry.name
    if file_sha256(path) != entry.sha256:
        raise InputError(
            f"{path} is not the file that was written: its hash differs.",
            hint="Delete it and run `sparkray distill store` again; it is made again.",
        )
    table = pq.read_table(path)
    columns = {name: table[name] for name in table.column_names}
    rows = {}
    for row in range(table.num_rows):
        values = {name: columns[name][row].values.to_numpy(zero_copy_only=False) for name in _LISTS}
        num_rows = len(values["token_logprobs"])
        scores = TokenScores(
            _ids(values["head_ids"].reshape(num_rows, -1)),
            _summed(values["head_logprob_steps"], num_rows).view(np.float16).astype(np.float32),
            values["token_logprobs"].astype(np.float32),
            _ids(_summed(values["tail_id_steps"], num_rows)),
            values["entropy"].astype(np.float32),
            header.temperature,
        )
        rows[columns["sequence"][row].as_py()] = (columns["tokens_sha256"][row].as_py(), scores)
    return rows


def _steps(values_LK: NDArray[Any]) -> NDArray[Any]:
    before_LK = np.pad(values_LK[:, :-1], ((0, 0), (1, 0)))[:, : values_LK.shape[1]]
    steps: NDArray[Any] = (values_LK - before_LK).T.ravel()
    return steps


def _summed(steps: NDArray[Any], num_rows: int) -> NDArray[Any]:
    return np.ascontiguousarray(steps.reshape(-1, num_rows).cumsum(axis=0, dtype=steps.dtype).T)


def _ids(stored_LK: NDArray[np.uint16] | NDArray[np.int32]) -> NDArray[np.int32]:
    ids_LK = stored_LK.astype(np.int32)
    return np.where(ids_LK == _NO_ID_16, -1, ids_LK).astype(np.int32) if stored_LK.dtype == np.uint16 else ids_LK
