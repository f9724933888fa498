"""A latent student on held-out text: BrierLM from two draws a chunk, and the energy score.

Shapes: B sequences, C chunks, K tokens, N chunks that count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

from sparkray.distill.data.pack import Sequences
from sparkray.distill.students.brier import brier_lm, brier_scores
from sparkray.distill.students.latent import LatentStudent


@dataclass(frozen=True, slots=True)
class LatentEvaluation:
    """What draws are worth.

    Attributes:
        brier_lm: geometric mean of Brier-1..4 times 100; 0 where one of them is not above zero.
        brier: Brier-1, Brier-2, ...
        num_chunks: chunks drawn for.
    """

    brier_lm: float
    brier: tuple[float, ...]
    num_chunks: int

    def to_json(self) -> dict[str, object]:
        return asdict(self)


@torch.no_grad()
def evaluate_latent(
    student: LatentStudent, data: Sequences, numbers: Sequence[int], num_draws: int, seed: int
) -> LatentEvaluation:
    """Draw `num_draws` pairs of chunks at every place of some sequences and compare them with the text."""
    student.eval()
    generator = torch.Generator().manual_seed(seed)
    chunk = student.autoencoder.config.chunk_tokens
    device = student.start.device
    totals, num_chunks = None, 0
    for number in numbers:
        ids_1CK = torch.from_numpy(data.ids_ST[number].astype(np.int64)).reshape(1, -1, chunk).to(device)
        whole_C = torch.from_numpy((data.documents_ST[number].reshape(-1, chunk) >= 0).all(-1)).to(device)
        hidden_NH = student(ids_1CK)[0, :-1][whole_C]
        truth_NK = ids_1CK[0][whole_C]
        for _ in range(num_draws):
            first_NK, second_NK = student.sample_chunks(hidden_NH, 2, generator)
            scores = brier_scores(first_NK, second_NK, truth_NK) * len(truth_NK) / num_draws
            totals = scores if totals is None else totals + scores
        num_chunks += len(truth_NK)
    student.train()
    assert totals is not None
    brier = totals / num_chunks
    return LatentEvaluation(brier_lm(brier), tuple(brier.tolist()), num_chunks)
