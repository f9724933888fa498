"""Who said it: everything that decides a teacher's numbers, and the key made of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class TeacherIdentity:
    """What a teacher's log-probabilities depend on, besides the tokens.

    Attributes:
        model: the model's id, or the hash of its folder's weights.
        revision, quantization: of the weights, or "".
        tokenizer_sha256: of `alignment.fingerprint`, or "" where the host keeps it to itself.
        engine: engine and version, as "vllm 0.32.0".
        dtype: of the forward.
        endpoint: address of the host, or "local".
        mode: how it is asked: `prompt_logprobs`, `echo`, `completion` or `forward`.
    """

    model: str
    revision: str
    quantization: str
    tokenizer_sha256: str
    engine: str
    dtype: str
    endpoint: str
    mode: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def score_key(identity: TeacherIdentity, token_ids: Sequence[int], parameters: str = "") -> bytes:
    """32 bytes that name the scores of these tokens by this teacher, whatever number of entries was asked for.

    Args:
        identity: the teacher.
        token_ids: what is scored.
        parameters: whatever else decides the numbers, such as the temperature and the seed of draws.
    """
    digest = hashlib.sha256(f"{identity.sha256}\n{parameters}\n".encode())
    digest.update(np.asarray(token_ids, np.int64).tobytes())
    return digest.digest()
