"""Filling a store: each missing shard is scored, written and noted, so a killed run goes on where it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from sparkray.config.distill import StoreConfig
from sparkray.distill.data.pack import Pack
from sparkray.distill.identity import TeacherIdentity
from sparkray.distill.scores import TokenScores
from sparkray.distill.store.manifest import Manifest, StoreHeader, begin_store, write_manifest
from sparkray.distill.store.shards import finished_shard, write_shard
from sparkray.distill.teachers.base import Teacher
from sparkray.distill.windows import score_in_windows

Scorer = Callable[[Sequence[Sequence[int]]], list[TokenScores]]


def store_header(pack: Pack, teacher: TeacherIdentity, config: StoreConfig) -> StoreHeader:
    """The header of a pack's store by a teacher."""
    return StoreHeader(
        teacher=teacher,
        data_sha256=pack.header.data_sha256,
        num_sequences=len(pack.train),
        vocab_size=pack.header.vocab_size,
        top_logprobs=config.top_logprobs,
        tail_draws=config.tail_draws,
        temperature=config.temperature,
        seed=config.seed,
        shard_sequences=config.shard_sequences,
    )


def capture_store(
    folder: Path,
    pack: Pack,
    header: StoreHeader,
    score: Scorer,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Manifest:
    """Score what is missing, in this process.

    Args:
        folder: of the store.
        pack: its training part is scored.
        header: of `store_header`.
        score: rows of several sequences.
        progress: called with shards done and all shards.

    Raises:
        UsageError: the folder belongs to another store.
    """
    begin_store(folder, header)
    for shard in range(header.num_shards):
        if finished_shard(folder, shard) is None:
            score_shard(folder, pack, header, shard, score)
        progress(shard + 1, header.num_shards)
    return finish_store(folder, header)


def score_shard(folder: Path, pack: Pack, header: StoreHeader, shard: int, score: Scorer) -> None:
    """Score and write one shard."""
    sequences = [pack.train.tokens(number) for number in header.shard_range(shard)]
    scores = score(sequences)
    checked = [one.checked(len(tokens) - 1) for one, tokens in zip(scores, sequences, strict=True)]
    write_shard(folder, header, shard, sequences, checked)


def sequence_scorer(teacher: Teacher, config: StoreConfig, overlap_tokens: int) -> Scorer:
    """The scorer of a store by a teacher: in batches where it has an engine, else one by one."""
    many = getattr(teacher, "score_many", None)

    def score(sequences: Sequence[Sequence[int]]) -> list[TokenScores]:
        if many is not None and all(len(tokens) <= teacher.max_model_tokens for tokens in sequences):
            scored: list[TokenScores] = many(sequences, config.top_logprobs)
            return scored
        return [
            score_in_windows(
                lambda ids: teacher.score(ids, config.top_logprobs), tokens, teacher.max_model_tokens, overlap_tokens
            )
            for tokens in sequences
        ]

    return score


def finish_store(folder: Path, header: StoreHeader) -> Manifest:
    """Write the manifest over shards that are all there."""
    entries = [finished_shard(folder, shard) for shard in range(header.num_shards)]
    manifest = Manifest(header, tuple(entry for entry in entries if entry is not None))
    write_manifest(folder, manifest)
    return manifest
