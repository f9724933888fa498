"""Weights on their way to the engines, and the canary that proves they arrived.

A version number says that a push was made, not what the engine computes with afterwards: a tied head that stays old,
an adapter kept under its old id, a layer left out, a delta rounded away all report the current version. So after
every push a fixed text is scored by the trainer and by the engine, and the two must agree.

Shapes: T tokens of the canary after its first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Protocol

import torch
from torch import Tensor

from sparkray.config.grpo import SyncConfig
from sparkray.grpo.errors import WeightSyncError

CHUNK_BYTES = 512 * 2**20
_LEAST_NOISE = 2e-5
_NOISE_MARGIN = 4.0
# Of 30 layers one that was left out made a gap of 0.025 to 0.13 of the movement of its step; honest pushes 0.002.
_FOLLOWED_SHARE = 0.005


class WeightReceiver(Protocol):
    """An engine as weights see it. A push is `begin`, any number of `load`, `finish`."""

    def begin(self) -> None:
        """Hold generation; requests under way go on after `finish`."""

    def load(self, payload: bytes) -> None:
        """Take tensors in the safetensors format, under the names of a checkpoint."""

    def finish(self, version: int) -> None:
        """Compute with what was loaded from now on, and say so."""


def payloads(tensors: Iterable[tuple[str, Tensor]], *, max_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
    """Named tensors as safetensors, in pieces of about `max_bytes`; a larger tensor is a piece of its own."""
    from safetensors.torch import save

    held: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        num_bytes = tensor.numel() * tensor.element_size()
        if held and size + num_bytes > max_bytes:
            yield save(held)
            held, size = {}, 0
        held[name] = tensor.contiguous().cpu()
        size += num_bytes
    if held:
        yield save(held)


def push(receiver: WeightReceiver, tensors: Iterable[tuple[str, Tensor]], version: int) -> int:
    """Push tensors to one receiver; the bytes that were sent."""
    receiver.begin()
    num_bytes = 0
    for payload in payloads(tensors):
        receiver.load(payload)
        num_bytes += len(payload)
    receiver.finish(version)
    return num_bytes


@dataclass(frozen=True, slots=True)
class CanaryReading:
    """What the canary saw after one push.

    Attributes:
        version: that was pushed.
        gap_max, gap_mean: |log-probability of the trainer - of the engine| over the canary's tokens.
        moved: the largest change of the trainer's own log-probabilities since the reading before; 0 at the first.
        alarm: what is wrong, where it is not an error.
    """

    version: int
    gap_max: float
    gap_mean: float
    moved: float
    alarm: str | None = None

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


class Canary:
    """Compares both sides after every push.

    Args:
        config: the bounds.
        fp32: whether both sides compute in float32. Then a gap above `max_gap` is an error, and so is one that is
            no rounding: far above every gap so far, and not small beside the trainer's own movement. That finds a
            push that was skipped, or a layer that was left out, in a step too small to reach `max_gap`. In bfloat16
            rounding alone makes gaps; there growth since the first reading raises an alarm.
    """

    def __init__(self, config: SyncConfig, *, fp32: bool) -> None:
        self._config = config
        self._fp32 = fp32
        self._before_T: Tensor | None = None
        self._first_gap: float | None = None
        self._largest_gap = _LEAST_NOISE

    def check(self, version: int, trainer_T: Tensor, engine_T: Tensor) -> CanaryReading:
        """Compare the log-probabilities of the canary on both sides.

        Raises:
            WeightSyncError: float32, and the engine does not compute what the trainer does.
        """
        if trainer_T.shape != engine_T.shape:
            raise WeightSyncError(
                f"the canary has {len(trainer_T)} tokens for the trainer and {len(engine_T)} for the engine: "
                "they do not have the same tokenizer."
            )
        gap_T = (trainer_T.double() - engine_T.double()).abs()
        gap = gap_T.max().item() if torch.isfinite(gap_T).all() else float("inf")
        moved = 0.0 if self._before_T is None else (trainer_T.double() - self._before_T).abs().max().item()
        first = self._first_gap if self._first_gap is not None else gap
        trouble = self._trouble(gap, moved, first)
        reading = CanaryReading(version, gap, gap_T.mean().item(), moved, trouble)
        if trouble is not None and self._fp32:
            raise WeightSyncError(
                f"version {version} was pushed, and {trouble}.",
                hint="The engine does not hold the weights that are trained; nothing it draws now can be trusted.",
            )
        self._before_T, self._first_gap = trainer_T.double().clone(), first
        self._largest_gap = max(self._largest_gap, gap)
        return reading

    def _trouble(self, gap: float, moved: float, first: float) -> str | None:
        if not self._fp32:
            if gap > self._config.max_growth * max(first, _LEAST_NOISE):
                return f"the gap grew from {first:.3g} to {gap:.3g} since the first push"
            return None
        if not gap <= self._config.max_gap:
            return f"engine and trainer differ by {gap:.3g} on the canary, above {self._config.max_gap:g}"
        if gap > _NOISE_MARGIN * self._largest_gap and gap > _FOLLOWED_SHARE * moved > 0:
            return f"they differ by {gap:.3g} while the trainer moved by {moved:.3g}: the engine did not follow"
        return None
