"""The losses against TRL's own on the same tensors, and what must hold whoever computes them."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.trainer.grpo_trainer import GRPOTrainer

from sparkray.config.grpo import LossConfig
from sparkray.grpo.correction import correct
from sparkray.grpo.losses import Counts, policy_loss

MAX_TOKENS = 9
# Our name -> TRL's loss_type and importance_sampling_level (its documentation names the pair for GSPO).
TRL_NAMES = {
    "grpo": ("grpo", "token"),
    "dr_grpo": ("dr_grpo", "token"),
    "dapo": ("dapo", "token"),
    "cispo": ("cispo", "token"),
    "gspo": ("grpo", "sequence"),
}


def tensors(seed: int = 0, spread: float = 0.4) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 8, (6,), generator=draw)
    mask = (torch.arange(7) < lengths[:, None]).float()
    old = -torch.rand(6, 7, generator=draw) * 3
    return {
        "logprobs": old + spread * torch.randn(6, 7, generator=draw),
        "old": old,
        "reference": old + 0.3 * torch.randn(6, 7, generator=draw),
        "correction": torch.rand(6, 7, generator=draw) * 2,
        "advantages": torch.randn(6, generator=draw),
        "mask": mask,
    }


def counts(given: dict[str, torch.Tensor]) -> Counts:
    return Counts(len(given["mask"]), int(given["mask"].sum()), MAX_TOKENS)


def trl_loss(given: dict[str, torch.Tensor], config: LossConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """TRL's loss and its gradient with respect to the log-probabilities."""
    loss_type, level = TRL_NAMES[config.name]
    logprobs = given["logprobs"].clone().requires_grad_()
    accelerator = SimpleNamespace(
        num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, sync_gradients=True
    )
    trainer: Any = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (logprobs, torch.zeros_like(logprobs), None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=level,
        beta=config.kl_beta,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        loss_type=loss_type,
        epsilon_low=config.clip_low,
        epsilon_high=config.cispo_max_ratio if loss_type == "cispo" else config.clip_high,
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        max_completion_length=MAX_TOKENS,
        accelerator=accelerator,
        _entropy_bonus_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    inputs = {
        "prompt_ids": torch.zeros(6, 2, dtype=torch.long),
        "prompt_mask": torch.ones(6, 2, dtype=torch.long),
        "completion_ids": torch.zeros(6, 7, dtype=torch.long),
        "completion_mask": given["mask"].long(),
        "advantages": given["advantages"],
        "old_per_token_logps": given["old"],
        "ref_per_token_logps": given["reference"],
        "importance_sampling_ratio": given["correction"],
        "num_items_in_batch": given["mask"].sum(),
    }
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    return loss.detach(), logprobs.grad


def our_loss(given: dict[str, torch.Tensor], config: LossConfig, of: Counts) -> tuple[torch.Tensor, torch.Tensor]:
    logprobs = given["logprobs"].clone().requires_grad_()
    parts = policy_loss(
        logprobs,
        given["old"],
        given["advantages"],
        given["mask"],
        config,
        of,
        correction_BT=given["correction"],
        reference_BT=given["reference"] if config.kl_beta else None,
    )
    parts.loss.backward()
    return parts.loss.detach(), logprobs.grad


@pytest.mark.parametrize("beta", [0.0, 0.15])
@pytest.mark.parametrize("name", sorted(TRL_NAMES))
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_loss_and_gradient_are_trls(name: str, beta: float, seed: int) -> None:
    given = tensors(seed)
    config = LossConfig(name=name, kl_beta=beta, cispo_max_ratio=1.5)
    expected, expected_gradient = trl_loss(given, config)
    loss, gradient = our_loss(given, config, counts(given))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-7)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("name", sorted(TRL_NAMES))
def test_micro_batches_add_up_to_the_whole(name: str) -> None:
    given = tensors(3)
    config = LossConfig(name=name, kl_beta=0.1)
    whole, gradient = our_loss(given, config, counts(given))
    parts = [
        our_loss({key: value[rows] for key, value in given.items()}, config, counts(given))
        for rows in (slice(0, 1), slice(1, 4), slice(4, 6))
    ]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole)
    torch.testing.assert_close(torch.cat([part for _, part in parts]), gradient)


def test_losses_by_hand() -> None:
    """Two completions of 2 and 1 tokens, ratios 1 at the start: the loss is a weighted mean of -A."""
    given = {
        "logprobs": torch.tensor([[-1.0, -2.0], [-0.5, 0.0]]),
        "old": torch.tensor([[-1.0, -2.0], [-0.5, 0.0]]),
        "reference": torch.zeros(2, 2),
        "correction": torch.ones(2, 2),
        "advantages": torch.tensor([1.0, -2.0]),
        "mask": torch.tensor([[1.0, 1.0], [1.0, 0.0]]),
    }
    of = Counts(2, 3, 4)
    expected = {
        "grpo": (-1 + 2) / 2,
        "gspo": (-1 + 2) / 2,
        "dr_grpo": (-1 - 1 + 2) / (2 * 4),
        "dapo": (-1 - 1 + 2) / 3,
        "cispo": (1 * 1 + 1 * 2 + (-2) * 0.5) / 3,
    }
    for name, value in expected.items():
        loss, _ = our_loss(given, LossConfig(name=name), of)
        assert loss.item() == pytest.approx(value, abs=1e-6), name


def test_the_clip_takes_the_gradient_away() -> None:
    given = tensors(0)
    given["old"] = given["logprobs"] - 1.0  # every ratio is e
    given["advantages"] = torch.ones(6)
    given["correction"] = torch.ones(6, 7)
    loss, gradient = our_loss(given, LossConfig(name="dapo", clip_high=0.28), counts(given))
    assert loss.item() == pytest.approx(-1.28, rel=1e-6)
    assert gradient.abs().max() == 0
    parts = policy_loss(
        given["logprobs"], given["old"], given["advantages"], given["mask"], LossConfig(name="dapo"), counts(given)
    )
    assert parts.clipped_sum == given["mask"].sum()


def test_what_is_masked_does_not_matter_even_where_it_is_infinite() -> None:
    given = tensors(4)
    config = LossConfig(name="grpo", kl_beta=0.1)
    expected, _ = our_loss(given, config, counts(given))
    hidden = given["mask"] == 0
    for name in ("logprobs", "old", "reference"):
        given[name] = given[name].masked_fill(hidden, 1e4)
    loss, gradient = our_loss(given, config, counts(given))
    torch.testing.assert_close(loss, expected)
    assert gradient[hidden].abs().max() == 0


class TestCorrection:
    def test_by_hand(self) -> None:
        trainer = torch.tensor([[-1.0, -1.0], [-1.0, -3.0]])
        engine = torch.tensor([[-1.0, -2.0], [-1.0, -1.0]])
        mask = torch.ones(2, 2)
        found = correct(trainer, engine, mask, token_ratio_cap=2.0, geometric_low=0.5, geometric_high=2.0)
        e = 2.718281828459045
        # Log ratios 0, 1 and 0, -2: geometric means e^0.5 = 1.65 (kept) and e^-1 = 0.37 (left out).
        torch.testing.assert_close(found.weights_BT, torch.tensor([[1.0, 2.0], [0.0, 0.0]]))
        assert found.masked_completions == 1
        assert found.truncated_sum == 1
        # Raw figures know nothing of the cap.
        assert found.ratio_sum.item() == pytest.approx(1 + e + 1 + e**-2, rel=1e-6)
        assert found.max_ratio.item() == pytest.approx(e, rel=1e-6)
        assert found.gap_sum.item() == pytest.approx(3.0)
        assert found.max_gap.item() == pytest.approx(2.0)
        assert found.k3_sum.item() == pytest.approx((e - 1 - 1) + (e**-2 - 1 + 2), rel=1e-5)

    def test_padding_counts_for_nothing(self) -> None:
        mask = torch.tensor([[1.0, 0.0]])
        found = correct(
            torch.tensor([[-1.0, 50.0]]),
            torch.tensor([[-1.5, -50.0]]),
            mask,
            token_ratio_cap=2.0,
            geometric_low=0.1,
            geometric_high=10.0,
        )
        assert found.weights_BT.tolist() == [[pytest.approx(1.6487, rel=1e-4), 0.0]]
        assert found.gap_sum.item() == pytest.approx(0.5)

    @settings(max_examples=50)
    @given(seed=st.integers(0, 10_000), cap=st.floats(1.0, 4.0))
    def test_weights_are_bounded_and_equal_policies_are_left_alone(self, seed: int, cap: float) -> None:
        given = tensors(seed)
        bounds = {"token_ratio_cap": cap, "geometric_low": 0.9, "geometric_high": 1.1}
        found = correct(given["logprobs"], given["old"], given["mask"], **bounds)
        assert found.weights_BT.max() <= cap + 1e-6
        same = correct(given["old"], given["old"], given["mask"], **bounds)
        torch.testing.assert_close(same.weights_BT, given["mask"])
        assert same.masked_completions == 0
