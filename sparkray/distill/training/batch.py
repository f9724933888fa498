"""One micro-batch: packed tokens and a teacher's rows in, sums of losses out.

Sums and not means: a step's loss is the sum over all micro-batches of all workers, over the rows of all of them.

Shapes: B sequences, T tokens, L = T - 1 rows, N rows that count, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparkray.config.distill import LossConfig
from sparkray.distill.data.pack import Sequences
from sparkray.distill.losses import chunked_rows, data_loss, distillation_loss
from sparkray.distill.scores import TokenScores
from sparkray.distill.students.causal import CausalStudent
from sparkray.distill.targets import TargetRows, target_rows


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Tokens of some sequences, the rows that count, and what the teacher says there.

    Attributes:
        ids_BT: tokens.
        mask_BL: rows that predict a token of their own document.
        rows: the teacher's, in the order of the mask's True entries; None without a teacher.
    """

    ids_BT: Tensor
    mask_BL: Tensor
    rows: TargetRows | None

    @property
    def num_rows(self) -> int:
        return int(self.mask_BL.sum())


@dataclass(frozen=True, slots=True)
class LossSums:
    """Sums over rows: what is minimised, and its two parts."""

    total: Tensor
    cross_entropy: Tensor
    distillation: Tensor


def micro_batch(
    data: Sequences, numbers: Sequence[int], scores: Sequence[TokenScores] | None, device: torch.device
) -> MicroBatch:
    """Tokens and rows of some sequences, on a device."""
    ids_BT = torch.from_numpy(data.ids_ST[list(numbers)].astype(np.int64))
    masks = [data.row_mask(number) for number in numbers]
    rows = None
    if scores is not None:
        every = target_rows(scores)
        # A sequence that was filled up has rows for its own tokens only.
        kept = np.concatenate([mask[: one.num_rows] for mask, one in zip(masks, scores, strict=True)])
        rows = every.select(torch.from_numpy(np.flatnonzero(kept))).to(device)
    return MicroBatch(ids_BT.to(device), torch.from_numpy(np.stack(masks)).to(device), rows)


def loss_sums(student: CausalStudent, batch: MicroBatch, config: LossConfig) -> LossSums:
    """Losses of a micro-batch, summed over its rows."""
    hidden_NH = student(batch.ids_BT[:, :-1])[batch.mask_BL]
    following_N = batch.ids_BT[:, 1:][batch.mask_BL]
    rows = batch.rows if config.kd_weight else None

    def compute(logits_NV: Tensor, part: slice) -> Tensor:
        # A weight of zero reports the value and spends nothing on its gradient.
        on_data_N = data_loss(logits_NV if config.ce_weight else logits_NV.detach(), following_N[part])
        taught_N = (
            torch.zeros_like(on_data_N) if rows is None else distillation_loss(logits_NV, rows.select(part), config)
        )
        return torch.stack([on_data_N, taught_N], -1)

    losses_2 = chunked_rows(hidden_NH, student.head, compute, config.chunk_rows).sum(0)
    total = config.ce_weight * losses_2[0] + config.kd_weight * losses_2[1]
    return LossSums(total, losses_2[0].detach(), losses_2[1].detach())
