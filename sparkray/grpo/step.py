"""One optimizer step from scored groups, as a function.

Shapes: P prompts, G completions of each, B completions, T positions, N completion tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sparkray.config.grpo import GrpoConfig
from sparkray.errors import InternalError
from sparkray.grpo.advantages import Advantages, group_advantages, shuffled
from sparkray.grpo.correction import correct
from sparkray.grpo.losses import Counts, policy_loss
from sparkray.grpo.packing import Completion, PackedBatch, build_batch, plan_batches
from sparkray.grpo.ranks import Ranks
from sparkray.grpo.rollouts import Rollout, RolloutGroup
from sparkray.grpo.scoring import Scorer


@dataclass(frozen=True, slots=True)
class StepReport:
    """What a step did, over all ranks.

    Attributes:
        loss: as the formulas have it.
        num_completions, num_tokens: trained on.
        zero_variance_share: of the groups, those dropped because all their rewards are the same.
        unscored_share: of the groups, those with fewer than two rewards.
        entropy_nats: mean over trained tokens, under the policy at the start.
        clip_share: of the tokens, those whose gradient the clip took away in the last pass.
        kl_nats: mean KL to the reference a token; 0 without one.
        ratio_mean, ratio_max: raw trainer-to-engine ratio of a token, before truncation.
        gap_mean, gap_max: |log-probability of the trainer - of the engine|.
        engine_kl_nats: k3 estimate of KL(engine || trainer) a token.
        truncated_share: of the tokens, those above the ratio cap.
        masked_share: of the completions, those outside the geometric bounds.
        grad_norm: before clipping; 0 where nothing was trained on.
        num_positions: computed, prompts and padding included.
    """

    loss: float
    num_completions: int
    num_tokens: int
    zero_variance_share: float
    unscored_share: float
    entropy_nats: float
    clip_share: float
    kl_nats: float
    ratio_mean: float
    ratio_max: float
    gap_mean: float
    gap_max: float
    engine_kl_nats: float
    truncated_share: float
    masked_share: float
    grad_norm: float
    num_positions: int

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Trainee:
    """What a step moves.

    Attributes:
        scorer: the policy.
        optimizer: over the parameters that are trained.
        parameters: those parameters.
        device: where the policy is.
        reference: gives a forward without what was trained, for the KL; None where there is no KL.
        autocast: the context of a forward.
    """

    scorer: Scorer
    optimizer: torch.optim.Optimizer
    parameters: Sequence[nn.Parameter]
    device: torch.device
    reference: Callable[[PackedBatch], Tensor] | None = None
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext


@dataclass(frozen=True, slots=True, eq=False)
class _Sample:
    rollout: Rollout
    advantage: float


def train_step(
    trainee: Trainee,
    groups: Sequence[RolloutGroup],
    rewards_PG: NDArray[np.float64],
    config: GrpoConfig,
    ranks: Ranks,
    *,
    step: int = 0,
) -> StepReport:
    """Move the policy by this rank's groups and those of the other ranks.

    Args:
        trainee: the policy; its parameters and optimizer are changed.
        groups: this rank's P groups of G completions.
        rewards_PG: their rewards, NaN where there is none.
        config: of the run.
        ranks: the others; each calls this at the same time.
        step: number of the step, the seed of a control's shuffling.
    """
    advantages = group_advantages(rewards_PG, config.loss.advantage)
    if config.shuffle_advantages:
        advantages = shuffled(advantages, seed=config.seed + 1_000_003 * step + ranks.rank)
    samples, completions = _kept(groups, advantages)
    rows = plan_batches(completions, max_tokens=config.micro_batch_tokens, packing=config.packing)
    batches = [build_batch(batch, completions).to(trainee.device) for batch in rows]
    totals = ranks.sum(
        torch.tensor(
            [
                len(samples),
                sum(len(sample.rollout.token_ids) for sample in samples),
                len(groups),
                advantages.num_zero_variance,
                advantages.num_unscored,
                sum(batch.num_tokens for batch in batches),
            ],
            dtype=torch.float64,
            device=trainee.device,
        )
    ).tolist()
    counts = Counts(int(totals[0]), int(totals[1]), config.max_completion_tokens)
    num_batches = int(ranks.max(torch.tensor([len(batches)], device=trainee.device)).item())
    tally = _Tally(trainee.device)
    if num_batches:
        _update(trainee, samples, batches, num_batches, counts, config, ranks, tally)
    return tally.report(ranks, counts, totals)


def _kept(groups: Sequence[RolloutGroup], advantages: Advantages) -> tuple[list[_Sample], list[Completion]]:
    samples: list[_Sample] = []
    completions: list[Completion] = []
    for number, group in enumerate(groups):
        for place, rollout in enumerate(group.rollouts):
            if advantages.used_PG[number, place] and rollout.token_ids:
                samples.append(_Sample(rollout, float(advantages.values_PG[number, place])))
                completions.append(Completion(number, group.prompt_token_ids, rollout.token_ids))
    return samples, completions


def _update(
    trainee: Trainee,
    samples: Sequence[_Sample],
    batches: Sequence[PackedBatch],
    num_batches: int,
    counts: Counts,
    config: GrpoConfig,
    ranks: Ranks,
    tally: _Tally,
) -> None:
    # In a single pass the policy at the start of the step is the one that is differentiated: no forward more.
    old = None if config.num_iterations == 1 else [_logprobs(trainee, batch) for batch in batches]
    for iteration in range(config.num_iterations):
        trainee.optimizer.zero_grad(set_to_none=True)
        last = iteration == config.num_iterations - 1
        for at in range(num_batches):
            if at < len(batches):
                old_BT = old[at] if old is not None else None
                _backward(trainee, samples, batches[at], old_BT, counts, config, tally if last else None)
            else:
                _empty_backward(trainee)
        ranks.sum_gradients(trainee.parameters)
        norm = torch.nn.utils.clip_grad_norm_(trainee.parameters, config.max_grad_norm)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if not torch.isfinite(norm):
            raise InternalError(f"the gradient's norm is {norm.item()}; the step was not made.")
        tally.grad_norm = norm.item()
        trainee.optimizer.step()
    trainee.optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def _logprobs(trainee: Trainee, batch: PackedBatch) -> Tensor:
    with trainee.autocast():
        logprobs_N, _ = trainee.scorer(batch)
    return batch.to_completions(logprobs_N)


def _backward(
    trainee: Trainee,
    samples: Sequence[_Sample],
    batch: PackedBatch,
    old_BT: Tensor | None,
    counts: Counts,
    config: GrpoConfig,
    tally: _Tally | None,
) -> None:
    with trainee.autocast():
        logprobs_N, entropy_N = trainee.scorer(batch)
    logprobs_BT, mask_BT = batch.to_completions(logprobs_N), batch.mask()
    old_BT = logprobs_BT.detach() if old_BT is None else old_BT
    engine_BT = torch.zeros_like(old_BT)
    for row, number in enumerate(batch.completions):
        # A copy: what came through Ray's object store is read-only, which torch has no tensors for.
        drawn_T = torch.tensor(samples[number].rollout.engine_logprobs_T)
        engine_BT[row, : len(drawn_T)] = drawn_T.to(engine_BT.device)
    loss_config = config.loss
    correction = correct(
        old_BT,
        engine_BT,
        mask_BT,
        token_ratio_cap=loss_config.token_ratio_cap,
        geometric_low=loss_config.geometric_low,
        geometric_high=loss_config.geometric_high,
    )
    advantages_B = torch.tensor([samples[number].advantage for number in batch.completions], device=trainee.device)
    reference_BT = None
    if trainee.reference is not None and loss_config.kl_beta > 0:
        reference_BT = batch.to_completions(trainee.reference(batch))
    parts = policy_loss(
        logprobs_BT,
        old_BT,
        advantages_B,
        mask_BT,
        loss_config,
        counts,
        correction_BT=correction.weights_BT,
        reference_BT=reference_BT,
    )
    parts.loss.backward()  # type: ignore[no-untyped-call]
    if tally is not None:
        tally.add(
            loss=parts.loss.detach(),
            clipped=parts.clipped_sum,
            kl=parts.kl_sum,
            entropy=entropy_N.sum(),
            ratio=correction.ratio_sum,
            gap=correction.gap_sum,
            k3=correction.k3_sum,
            truncated=correction.truncated_sum,
            masked=correction.masked_completions,
            max_ratio=correction.max_ratio,
            max_gap=correction.max_gap,
        )


def _empty_backward(trainee: Trainee) -> None:
    """Keep step with ranks that have a micro-batch more: under FSDP every forward gathers from all ranks."""
    batch = build_batch(
        plan_batches([Completion(0, (0,), (0,))], max_tokens=2, packing="plain")[0], [Completion(0, (0,), (0,))]
    ).to(trainee.device)
    with trainee.autocast():
        logprobs_N, _ = trainee.scorer(batch)
    (0.0 * logprobs_N.sum()).backward()


_SUMS = ("loss", "clipped", "kl", "entropy", "ratio", "gap", "k3", "truncated", "masked")
_MAXIMA = ("max_ratio", "max_gap")


class _Tally:
    """Sums and maxima over micro-batches, then over ranks."""

    def __init__(self, device: torch.device) -> None:
        self._sums = dict.fromkeys(_SUMS, 0.0)
        self._maxima = dict.fromkeys(_MAXIMA, 0.0)
        self._device = device
        self.grad_norm = 0.0

    def add(self, **values: Tensor) -> None:
        for name in _SUMS:
            self._sums[name] += values[name].item()
        for name in _MAXIMA:
            self._maxima[name] = max(self._maxima[name], values[name].item())

    def report(self, ranks: Ranks, counts: Counts, totals: Sequence[float]) -> StepReport:
        sums = ranks.sum(torch.tensor(list(self._sums.values()), dtype=torch.float64, device=self._device))
        maxima = ranks.max(torch.tensor(list(self._maxima.values()), dtype=torch.float64, device=self._device))
        total = dict(zip(_SUMS, sums.tolist(), strict=True))
        largest = dict(zip(_MAXIMA, maxima.tolist(), strict=True))
        num_tokens, num_completions = max(1, counts.num_tokens), max(1, counts.num_completions)
        num_groups = max(1.0, totals[2])
        report = StepReport(
            loss=total["loss"],
            num_completions=counts.num_completions,
            num_tokens=counts.num_tokens,
            zero_variance_share=totals[3] / num_groups,
            unscored_share=totals[4] / num_groups,
            entropy_nats=total["entropy"] / num_tokens,
            clip_share=total["clipped"] / num_tokens,
            kl_nats=total["kl"] / num_tokens,
            ratio_mean=total["ratio"] / num_tokens,
            ratio_max=largest["max_ratio"],
            gap_mean=total["gap"] / num_tokens,
            gap_max=largest["max_gap"],
            engine_kl_nats=total["k3"] / num_tokens,
            truncated_share=total["truncated"] / num_tokens,
            masked_share=total["masked"] / num_completions,
            grad_norm=self.grad_norm,
            num_positions=int(totals[5]),
        )
        if not math.isfinite(report.loss):
            raise InternalError(f"the loss of this step is {report.loss}.")
        return report
