"""From logits to a distance.

The protocol reads the logits in the nonce's order, norms them and takes their L2 distance to the target. With unit
vectors that is sqrt(1 + |target|^2 - 2 cos), so one gathered dot product, summed in float64, is enough and no
normed copy is made.
"""

from __future__ import annotations

import torch


def distances(logits_BV: torch.Tensor, permutations_BV: torch.Tensor, target_V: torch.Tensor) -> torch.Tensor:
    """Distances, (B,) float64, on the logits' device.

    Args:
        logits_BV: float32 logits of the last position.
        permutations_BV: integer; entry j says which logit is read j-th.
        target_V: float64 unit vector.
    """
    ordered_BV = logits_BV.double().gather(1, permutations_BV.long())
    cosines_B = (ordered_BV @ target_V) / ordered_BV.norm(dim=1)
    squared_B: torch.Tensor = 1.0 + target_V.square().sum() - 2.0 * cosines_B
    return squared_B.clamp_min(0.0).sqrt()
