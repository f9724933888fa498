"""Documents as sequences of equal length.

Each document ends with the end-of-text token, and no prediction is asked for across that border. A teacher sees the
same packed sequence as the student, so both have the same context, earlier documents included.

Shapes: S sequences, T tokens of each.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sparkray.config.distill import PackConfig
from sparkray.distill.data.sources import Document
from sparkray.errors import InputError, NotFoundError

_HEADER = "pack.json"
_PARTS = ("train", "validation")
_ADDED_COUNT = 0.05


@dataclass(frozen=True, slots=True)
class Sequences:
    """Packed tokens.

    Attributes:
        ids_ST: token ids.
        documents_ST: number of the document that each token belongs to; -1 where the last sequence is filled up.
    """

    ids_ST: NDArray[np.int32]
    documents_ST: NDArray[np.int32]

    def __len__(self) -> int:
        return int(self.ids_ST.shape[0])

    @property
    def num_tokens(self) -> int:
        return int((self.documents_ST >= 0).sum())

    def tokens(self, sequence: int) -> list[int]:
        """The tokens of a sequence, without filling."""
        return [int(token) for token in self.ids_ST[sequence, : (self.documents_ST[sequence] >= 0).sum()]]

    def log_shares(self, vocab_size: int) -> NDArray[np.float32]:
        """Logarithm of each token's share of the text, (V,); a twentieth of a time is added to each count."""
        counts_V = np.bincount(self.ids_ST[self.documents_ST >= 0], minlength=vocab_size) + _ADDED_COUNT
        shares: NDArray[np.float32] = np.log(counts_V / counts_V.sum()).astype(np.float32)
        return shares

    def row_mask(self, sequence: int) -> NDArray[np.bool_]:
        """True where a row predicts a token of its own document, (T - 1,)."""
        documents_T = self.documents_ST[sequence]
        same: NDArray[np.bool_] = (documents_T[1:] == documents_T[:-1]) & (documents_T[1:] >= 0)
        return same


@dataclass(frozen=True, slots=True)
class PackHeader:
    """What a pack was made of.

    Attributes:
        sequence_tokens, chunk_tokens: of the settings.
        vocab_size: one more than the largest id of the tokenizer.
        end_id: the token that ends a document.
        tokenizer_sha256: of `alignment.fingerprint`.
        data_sha256: of the tokens and borders of both parts.
    """

    sequence_tokens: int
    chunk_tokens: int
    vocab_size: int
    end_id: int
    tokenizer_sha256: str
    data_sha256: str


@dataclass(frozen=True, slots=True)
class Pack:
    """Training and held-out sequences."""

    header: PackHeader
    train: Sequences
    validation: Sequences


def pack_documents(
    documents: Sequence[Document],
    encode: Callable[[str], Sequence[int]],
    config: PackConfig,
    *,
    end_id: int,
    vocab_size: int,
    tokenizer_sha256: str,
) -> Pack:
    """Split the documents, encode them, and cut each part into sequences.

    The last sequence of a part is filled up and masked, unless it is shorter than one chunk and not the only one.

    Raises:
        InputError: fewer tokens than one chunk.
    """
    order = list(range(len(documents)))
    random.Random(config.seed).shuffle(order)
    num_held_out = round(config.validation_share * len(documents))
    if config.validation_share and len(documents) > 1:
        num_held_out = min(max(num_held_out, 1), len(documents) - 1)
    held_out = set(order[:num_held_out])
    parts: dict[bool, list[tuple[int, int]]] = {False: [], True: []}
    for number, document in enumerate(documents):
        part = parts[number in held_out]
        part.extend((token, number) for token in encode(document.text))
        part.append((end_id, number))
    if len(parts[False]) <= config.chunk_tokens:
        raise InputError(
            f"the documents make {len(parts[False])} tokens, and more than one chunk of {config.chunk_tokens} is"
            " needed.",
            hint="Give more text, or shorter chunks (chunk_tokens).",
            param="data",
        )
    train = _cut(parts[False], config, end_id)
    if config.max_sequences is not None:
        train = Sequences(train.ids_ST[: config.max_sequences], train.documents_ST[: config.max_sequences])
    validation = _cut(parts[True], config, end_id)
    digest = hashlib.sha256()
    for sequences in (train, validation):
        digest.update(sequences.ids_ST.tobytes() + sequences.documents_ST.tobytes())
    header = PackHeader(
        config.sequence_tokens, config.chunk_tokens, vocab_size, end_id, tokenizer_sha256, digest.hexdigest()
    )
    return Pack(header, train, validation)


def write_pack(pack: Pack, folder: Path) -> None:
    """`train.parquet`, `validation.parquet` and, last, `pack.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, sequences in zip(_PARTS, (pack.train, pack.validation), strict=True):
        table = pa.table(
            {
                "sequence": np.arange(len(sequences), dtype=np.int32),
                "input_ids": list(sequences.ids_ST),
                "documents": list(sequences.documents_ST),
            },
            schema=pa.schema(
                {"sequence": pa.int32(), "input_ids": pa.list_(pa.int32()), "documents": pa.list_(pa.int32())}
            ),
        )
        building = folder / f"{name}.parquet.building"
        pq.write_table(table, building, compression="zstd")
        building.rename(folder / f"{name}.parquet")
    building = folder / f"{_HEADER}.building"
    building.write_text(json.dumps(asdict(pack.header), indent=1), encoding="utf-8")
    building.rename(folder / _HEADER)


def read_pack(folder: Path) -> Pack:
    """A pack from its folder.

    Raises:
        NotFoundError: the folder holds none, or an unfinished one.
    """
    try:
        header = PackHeader(**json.loads((folder / _HEADER).read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise NotFoundError(
            f"{folder} holds no {_HEADER}.", hint="Make a pack: sparkray distill pack DATA OUT.", param="pack"
        ) from None
    train, validation = (_read_part(folder / f"{name}.parquet", header.sequence_tokens) for name in _PARTS)
    return Pack(header, train, validation)


def _read_part(path: Path, num_tokens: int) -> Sequences:
    table = pq.read_table(path)
    ids_ST, documents_ST = (
        np.array(table[name].to_pylist(), np.int32).reshape(-1, num_tokens) for name in ("input_ids", "documents")
    )
    return Sequences(ids_ST, documents_ST)


def _cut(tokens: list[tuple[int, int]], config: PackConfig, end_id: int) -> Sequences:
    size = config.sequence_tokens
    rest = len(tokens) % size
    if len(tokens) > size and rest <= config.chunk_tokens:
        tokens = tokens[: len(tokens) - rest]
    elif rest:
        tokens = tokens + [(end_id, -1)] * (size - rest)
    pairs = np.array(tokens, np.int32).reshape(-1, size, 2)
    return Sequences(np.ascontiguousarray(pairs[:, :, 0]), np.ascontiguousarray(pairs[:, :, 1]))
