"""What a step minimises: sums over rows, so that any split of a batch adds up to the same.

Shapes: B sequences, T tokens, L = T - 1 rows, C chunks, K tokens of a chunk, N rows or chunks that count, R of
them, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sparkray.config.distill import LatentConfig, LossConfig
from sparkray.distill.data.pack import Sequences
from sparkray.distill.losses import distillation_loss
from sparkray.distill.scores import TokenScores
from sparkray.distill.students.autoencoder import Posterior
from sparkray.distill.students.causal import CausalStudent
from sparkray.distill.students.energy import energy_loss
from sparkray.distill.students.latent import LatentStudent
from sparkray.distill.targets import target_rows
from sparkray.distill.training.batch import LossSums, loss_sums, micro_batch


class Objective(Protocol):
    """A loss of some training sequences."""

    def num_rows(self, data: Sequences, number: int) -> int:
        """Rows of a sequence that count."""

    def losses(
        self,
        student: nn.Module,
        data: Sequences,
        numbers: Sequence[int],
        scores: Sequence[TokenScores] | None,
        device: torch.device,
    ) -> LossSums:
        """Losses of some sequences, summed over their rows."""


@dataclass(frozen=True, slots=True)
class CausalObjective:
    """Cross entropy on the data and a divergence from the teacher, token by token."""

    config: LossConfig

    def num_rows(self, data: Sequences, number: int) -> int:
        return int(data.row_mask(number).sum())

    def losses(
        self,
        student: nn.Module,
        data: Sequences,
        numbers: Sequence[int],
        scores: Sequence[TokenScores] | None,
        device: torch.device,
    ) -> LossSums:
        assert isinstance(student, CausalStudent)
        return loss_sums(student, micro_batch(data, numbers, scores, device), self.config)


@dataclass(frozen=True, slots=True)
class LatentObjective:
    """The energy score of drawn vectors; with weights, what they decode to against the data and the teacher.

    The teacher's part needs rows of `loss.target`; it is the divergence of the first token of each chunk but the first,
    the student's side being the mean of its samples' decodings.
    """

    config: LatentConfig
    loss: LossConfig
    chunk_tokens: int

    def num_rows(self, data: Sequences, number: int) -> int:
        return int(self._whole_chunks(data, number).sum())

    def losses(
        self,
        student: nn.Module,
        data: Sequences,
        numbers: Sequence[int],
        scores: Sequence[TokenScores] | None,
        device: torch.device,
    ) -> LossSums:
        assert isinstance(student, LatentStudent)
        ids_BT = torch.from_numpy(data.ids_ST[list(numbers)].astype(np.int64)).to(device)
        ids_BCK = ids_BT.reshape(len(numbers), -1, self.chunk_tokens)
        whole_BC = torch.from_numpy(np.stack([self._whole_chunks(data, number) for number in numbers])).to(device)
        hidden_NH = student(ids_BCK)[:, :-1][whole_BC]
        chunks_NK = ids_BCK[whole_BC]
        with torch.no_grad():
            posterior = student.autoencoder.encode(chunks_NK)
            targets_MNZ = _samples(posterior, self.config.num_targets)
        samples_SNZ = student.sample(hidden_NH, self.config.num_samples)
        energy = energy_loss(samples_SNZ, targets_MNZ, self.config.exponent).sum()
        on_data, taught = torch.zeros_like(energy), torch.zeros_like(energy)
        if self.config.ce_weight:
            on_data = student.cross_entropy(samples_SNZ[0], chunks_NK).sum()
        if self.config.kd_weight and scores is not None:
            taught = self._taught(student, samples_SNZ, whole_BC, scores)
        total = self.config.latent_weight * energy + self.config.ce_weight * on_data + self.config.kd_weight * taught
        return LossSums(total, energy.detach(), taught.detach())

    def _taught(
        self, student: LatentStudent, samples_SNZ: Tensor, whole_BC: Tensor, scores: Sequence[TokenScores]
    ) -> Tensor:
        rows = target_rows(scores)
        offsets = np.cumsum([0, *(one.num_rows for one in scores)])
        places, kept = [], []
        chunk_rows = whole_BC.nonzero().tolist()
        for position, (sequence, chunk) in enumerate(chunk_rows):
            if chunk:
                kept.append(position)
                places.append(int(offsets[sequence]) + chunk * self.chunk_tokens - 1)
        first_SNV = student.logits(samples_SNZ[:, kept])[..., 0, :].log_softmax(-1)
        mean_NV = first_SNV.logsumexp(0) - np.log(samples_SNZ.shape[0])
        return distillation_loss(mean_NV, rows.select(torch.tensor(places)).to(mean_NV.device), self.loss).sum()

    def _whole_chunks(self, data: Sequences, number: int) -> NDArray[np.bool_]:
        whole: NDArray[np.bool_] = (data.documents_ST[number].reshape(-1, self.chunk_tokens) >= 0).all(-1)
        return whole


def _samples(posterior: Posterior, num_samples: int) -> Tensor:
    shape = (num_samples, *posterior.mean.shape)
    noise = torch.randn(shape).to(posterior.mean.device)
    return posterior.mean + noise * (posterior.log_variance / 2).exp()
