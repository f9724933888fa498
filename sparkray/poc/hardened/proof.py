"""Hardened proofs: a digest that either is right or is not, and a distance that follows from integers."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sparkray.config.poc import ModelParams
from sparkray.poc.devices import resolve_device
from sparkray.poc.hardened.commitment import Commitment, leaf
from sparkray.poc.hardened.draws import draw_hardened_input, draw_hardened_target
from sparkray.poc.hardened.model import HardenedTransformer
from sparkray.poc.inputs import draw_permutation


@dataclass(frozen=True, slots=True)
class HardenedProof:
    """One nonce.

    Attributes:
        digest: hex SHA-256 over block, key, nonce and the int32 logits.
        distance: as in the compatible mode, from integer sums; the same float64 everywhere.
    """

    nonce: int
    digest: str
    distance: float


class HardenedProver:
    """Makes and checks hardened proofs of one block and key."""

    def __init__(self, block_hash: str, public_key: str, params: ModelParams, device: str = "cpu") -> None:
        self._seeds = (block_hash, public_key)
        self._params = params
        self._model = HardenedTransformer(block_hash, params, resolve_device(device))
        self._target_V = draw_hardened_target(block_hash, params.vocab_size).astype(np.int64)

    def prove(self, nonces: Sequence[int], layers: Sequence[int] | None = None) -> list[HardenedProof]:
        """Proofs of one batch; `layers` other than None is what a cheat would run."""
        logits_BV = self._model.last_logits(self.inputs(nonces), layers).cpu().numpy().astype("<i4")
        return [self._proof(nonce, logits_V) for nonce, logits_V in zip(nonces, logits_BV, strict=True)]

    def verify(self, proofs: Sequence[HardenedProof]) -> list[bool]:
        """Whether each proof is the one that its nonce has, to the bit."""
        expected = self.prove([proof.nonce for proof in proofs])
        return [proof == other for proof, other in zip(proofs, expected, strict=True)]

    def commit(self, nonce: int) -> tuple[Commitment, list[bytes]]:
        """The commitment to every state of one nonce, and the states themselves."""
        states: list[bytes] = []
        logits_BV = self._model.last_logits(
            self.inputs([nonce]), observe=lambda _, state: states.append(state.cpu().numpy().tobytes())
        )
        last = logits_BV.cpu().numpy().astype("<i4").tobytes()
        leaves = [leaf(index, state) for index, state in enumerate([*states, last])]
        return Commitment(tuple(leaves)), states

    def inputs(self, nonces: Sequence[int]) -> torch.Tensor:
        """Inputs of a batch, (B, seq_len, dim) int8."""
        return torch.from_numpy(np.stack([draw_hardened_input(*self._seeds, nonce, self._params) for nonce in nonces]))

    def _proof(self, nonce: int, logits_V: np.ndarray[tuple[int, ...], np.dtype[np.int32]]) -> HardenedProof:
        block_hash, public_key = self._seeds
        header = f"{len(block_hash)}:{block_hash}|{len(public_key)}:{public_key}|{nonce}|".encode()
        order = draw_permutation(block_hash, public_key, nonce, self._params.vocab_size)
        logits = logits_V.astype(np.int64)
        dot = int(logits[order] @ self._target_V)
        lengths = math.sqrt(int(logits @ logits)) * math.sqrt(int(self._target_V @ self._target_V))
        distance = math.sqrt(max(0.0, 2.0 - 2.0 * (dot / lengths)))
        return HardenedProof(nonce, hashlib.sha256(header + logits_V.tobytes()).hexdigest(), distance)
