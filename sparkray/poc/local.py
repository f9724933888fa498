"""Proof of compute on this machine alone: one engine, one process. The command line's verbs."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import dataclass
from itertools import islice

import numpy as np

from sparkray.config.poc import PocConfig
from sparkray.poc.engine import Engine, batched
from sparkray.poc.hardened.proof import HardenedProof, HardenedProver
from sparkray.poc.nonces import NonceIterator
from sparkray.poc.proofs import ProofBatch
from sparkray.poc.selftest import ShareMonitor

Progress = Callable[[int], None]
_HARDENED_BATCH = 16


@dataclass(slots=True)
class Generated:
    """What a run computed.

    Attributes:
        batch: the valid nonces.
        monitor: raw and valid counts, and the self-test.
        seconds: start included.
        digests: in the hardened mode the digest of each of them, else None.
    """

    batch: ProofBatch
    monitor: ShareMonitor
    seconds: float
    digests: tuple[str, ...] | None


def make_engine(config: PocConfig) -> Engine:
    """The engine that a configuration asks for, in the compatible mode."""
    return Engine(
        config.block_hash,
        config.params,
        config.weights,
        device=config.device,
        batch_size=config.batch_size,
        prep_threads=config.num_prep_threads,
        prep_depth=config.prep_depth,
    )


def generate(config: PocConfig, num_nonces: int, progress: Progress = lambda _: None) -> Generated:
    """Compute the first `num_nonces` of this node's class and keep the valid ones."""
    nonces = islice(NonceIterator(config.node_id, config.node_count), num_nonces)
    monitor = ShareMonitor(config.r_target, config.params.vocab_size)
    kept: list[int] = []
    dist: list[float] = []
    digests: list[str] = []
    started = time.perf_counter()
    with closing(_hardened(config, nonces) if config.mode == "hardened" else _compatible(config, nonces)) as parts:
        for part_nonces, part_dist, part_digests in parts:
            valid = [index for index, distance in enumerate(part_dist) if distance < config.r_target]
            monitor.add(len(valid), len(part_nonces))
            kept += [part_nonces[index] for index in valid]
            dist += [part_dist[index] for index in valid]
            digests += [part_digests[index] for index in valid if part_digests]
            progress(monitor.num_total)
    batch = ProofBatch(
        config.public_key, config.block_hash, config.block_height, tuple(kept), tuple(dist), config.node_id
    )
    seconds = time.perf_counter() - started
    return Generated(batch, monitor, seconds, tuple(digests) if config.mode == "hardened" else None)


def verify_hardened(config: PocConfig, batch: ProofBatch, digests: Iterable[str]) -> list[bool]:
    """Whether each hardened proof is the right one, to the bit."""
    proofs = [
        HardenedProof(nonce, digest, distance)
        for nonce, digest, distance in zip(batch.nonces, digests, batch.dist, strict=True)
    ]
    prover = HardenedProver(batch.block_hash, batch.public_key, config.params, config.device)
    size = _hardened_batch_size(config)
    return [ok for at in range(0, len(proofs), size) for ok in prover.verify(proofs[at : at + size])]


_Part = tuple[tuple[int, ...], list[float], list[str]]


def _compatible(config: PocConfig, nonces: Iterable[int]) -> Generator[_Part]:
    for computed in make_engine(config).stream(config.public_key, nonces):
        yield computed.nonces, computed.dist.tolist(), []


def _hardened(config: PocConfig, nonces: Iterable[int]) -> Generator[_Part]:
    prover = HardenedProver(config.block_hash, config.public_key, config.params, config.device)
    for batch in batched(nonces, _hardened_batch_size(config)):
        proofs = prover.prove(batch)
        yield batch, [proof.distance for proof in proofs], [proof.digest for proof in proofs]


def _hardened_batch_size(config: PocConfig) -> int:
    # The formulas are of another model.
    return config.batch_size if isinstance(config.batch_size, int) else _HARDENED_BATCH


@dataclass(frozen=True, slots=True)
class Rate:
    """How fast this machine is on a configuration.

    Attributes:
        init_seconds: weights drawn, batch size chosen, graphs captured.
        z_score: of the share of valid nonces against theory.
    """

    device: str
    batch_size: int
    init_seconds: float
    num_nonces: int
    raw_per_minute: float
    valid_per_minute: float
    model_tflops: float
    z_score: float
    alarm: bool


def measure_rate(config: PocConfig, seconds: float, progress: Progress = lambda _: None) -> Rate:
    """Compute nonces for about `seconds`; the first batch, which waits for its inputs, is not counted."""
    started = time.perf_counter()
    engine = make_engine(config)
    init_seconds = time.perf_counter() - started
    monitor = ShareMonitor(config.r_target, config.params.vocab_size)
    with closing(engine.stream(config.public_key, NonceIterator(config.node_id, config.node_count))) as stream:
        next(stream)
        started = time.perf_counter()
        for computed in stream:
            monitor.add(int(np.sum(computed.dist < config.r_target)), len(computed.nonces))
            elapsed = time.perf_counter() - started
            progress(monitor.num_total)
            if elapsed >= seconds:
                break
    rate = monitor.num_total / elapsed
    return Rate(
        device=str(engine.device),
        batch_size=engine.batch_size,
        init_seconds=init_seconds,
        num_nonces=monitor.num_total,
        raw_per_minute=60 * rate,
        valid_per_minute=60 * monitor.num_valid / elapsed,
        model_tflops=rate * config.params.flop_per_nonce / 1e12,
        z_score=monitor.z_score,
        alarm=monitor.alarm,
    )
