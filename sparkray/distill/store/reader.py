"""Rows of a finished store by sequence, and the check that the teacher still says the same."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sparkray.distill.data.pack import Pack
from sparkray.distill.scores import TokenScores
from sparkray.distill.store.capture import Scorer
from sparkray.distill.store.manifest import read_manifest
from sparkray.distill.store.shards import read_shard, tokens_sha256
from sparkray.errors import InputError

_SHARDS_IN_MEMORY = 64


class LogitStore:
    """A store that is read by sequence; each file is checked against its hash when it is first read.

    Args:
        folder: of the store.
        pack: the corpus that it must belong to.

    Raises:
        NotFoundError: no store, or an unfinished one.
        InputError: a store of another corpus, or (on reading) a file that was changed.
    """

    def __init__(self, folder: Path, pack: Pack) -> None:
        self.manifest = read_manifest(folder)
        self._folder = folder
        self._pack = pack
        self._shards: OrderedDict[int, dict[int, tuple[bytes, TokenScores]]] = OrderedDict()
        if self.manifest.header.data_sha256 != pack.header.data_sha256:
            raise InputError(
                f"the store {folder} was made of another corpus ({self.manifest.header.data_sha256[:12]}) than the"
                f" pack ({pack.header.data_sha256[:12]}).",
                hint="Give the pack that it was made of, or make a store of this one.",
                param="store",
            )

    def __getitem__(self, sequence: int) -> TokenScores:
        shard = sequence // self.manifest.header.shard_sequences
        if shard not in self._shards:
            if len(self._shards) >= _SHARDS_IN_MEMORY:
                self._shards.popitem(last=False)
            self._shards[shard] = read_shard(self._folder, self.manifest.header, self.manifest.shards[shard])
        self._shards.move_to_end(shard)
        sha256, scores = self._shards[shard][sequence]
        if sha256 != tokens_sha256(self._pack.train.tokens(sequence)):
            raise InputError(f"sequence {sequence} of the store {self._folder} was taken from other tokens.")
        return scores

    def max_difference(self, score: Scorer, sequences: Sequence[int]) -> float:
        """Largest difference of a log-probability, over the entries that both name, to scoring some sequences again."""
        again = score([self._pack.train.tokens(sequence) for sequence in sequences])
        largest = 0.0
        for sequence, fresh in zip(sequences, again, strict=True):
            kept = self[sequence]
            same_LK = (kept.head_ids_LK == fresh.head_ids_LK) & (kept.head_ids_LK >= 0)
            differences = np.abs(kept.head_logprobs_LK - fresh.head_logprobs_LK)[same_LK]
            largest = max(largest, float(differences.max(initial=0.0)))
        return largest
