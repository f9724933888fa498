"""The energy score as a loss (Gneiting and Raftery 2007), as CALM trains with it.

For a distance d and an exponent below 2 the score 2 E d(x, y) - E d(x, x') is smallest, on average over y, only where
the samples x come from y's own distribution: no likelihood is needed, samples are enough.

Shapes: N positions, S samples of the model, M samples of the target, Z latent numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Below this distance the slope of a power below 1 is cut off.
_NEAR = 1e-6


def energy_loss(samples_SNZ: Tensor, targets_MNZ: Tensor, exponent: float = 1.0) -> Tensor:
    """Energy score of each position, (N,); unbiased in both kinds of samples.

    Args:
        samples_SNZ: at least two independent samples of the model.
        targets_MNZ: samples of the target.
        exponent: of the Euclidean distance, in (0, 2).
    """
    num_samples = samples_SNZ.shape[0]
    # By products of matrices: S x M differences of Z numbers each would be most of a step's memory and time.
    to_target_NSM = torch.cdist(samples_SNZ.transpose(0, 1), targets_MNZ.transpose(0, 1)).clamp_min(_NEAR).pow(exponent)
    between_SSN = _distance(samples_SNZ[:, None], samples_SNZ[None], exponent)
    # The diagonal is zero, so the sum over all pairs is the sum over the pairs of different samples.
    spread_N = between_SSN.sum((0, 1)) / (num_samples * (num_samples - 1))
    return 2 * to_target_NSM.mean((1, 2)) - spread_N


def _distance(left: Tensor, right: Tensor, exponent: float) -> Tensor:
    squared = (left - right).square().sum(-1)
    # At zero the root has no gradient; a sample's distance to itself must not make one.
    return torch.where(squared > 0, squared.clamp_min(1e-12), 0.0).pow(exponent / 2)
