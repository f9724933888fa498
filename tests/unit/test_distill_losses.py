"""Losses against arithmetic done in numpy and, for the sampled ones, against the expectation written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparkray.config.base import validate_settings
from sparkray.config.distill import LossConfig
from sparkray.distill.losses import (
    chunked_rows,
    dense_loss,
    distillation_loss,
    divergence,
    sampled_reverse_kl,
    student_bucket_logprobs,
    uld_loss,
)
from sparkray.distill.scores import TokenScores, joined
from sparkray.distill.targets import (
    TargetRows,
    bucket_logprobs,
    draw_generator,
    scores_from_logits,
    target_rows,
)
from sparkray.errors import UsageError

TEACHER = [0.5, 0.2, 0.15, 0.1, 0.05]
STUDENT = [0.3, 0.3, 0.1, 0.1, 0.2]


def logits(probabilities: list[float]) -> torch.Tensor:
    return torch.tensor([probabilities]).log()


def rows(head: list[int], tail: list[int], probabilities: list[float] = TEACHER) -> TargetRows:
    entropy = -sum(p * math.log(p) for p in probabilities)
    return TargetRows(
        torch.tensor([head]),
        torch.tensor([[probabilities[i] for i in head]]).log(),
        torch.tensor([tail], dtype=torch.int64),
        torch.tensor([entropy]),
    )


def kl(p: list[float], q: list[float]) -> float:
    return float(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a))


def settings_of(**values: object) -> LossConfig:
    return validate_settings(LossConfig, values)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("forward_kl", kl(TEACHER, STUDENT)),
        ("reverse_kl", kl(STUDENT, TEACHER)),
        ("skewed_forward_kl", kl(TEACHER, [0.2 * p + 0.8 * q for p, q in zip(TEACHER, STUDENT, strict=True)])),
        ("skewed_reverse_kl", kl(STUDENT, [0.8 * p + 0.2 * q for p, q in zip(TEACHER, STUDENT, strict=True)])),
        (
            "jensen_shannon",
            0.3 * kl(TEACHER, [0.3 * p + 0.7 * q for p, q in zip(TEACHER, STUDENT, strict=True)])
            + 0.7 * kl(STUDENT, [0.3 * p + 0.7 * q for p, q in zip(TEACHER, STUDENT, strict=True)]),
        ),
    ],
)
def test_each_divergence_is_its_formula(name: str, expected: float) -> None:
    config = settings_of(target="tail_bucket", divergence=name, skew=0.2, beta=0.3)
    assert dense_loss(logits(STUDENT), logits(TEACHER), config).item() == pytest.approx(expected, rel=1e-5)


def test_tail_bucket_is_the_divergence_of_coarser_outcomes() -> None:
    found = distillation_loss(logits(STUDENT), rows([0, 1], []), settings_of(target="tail_bucket"))
    assert found.item() == pytest.approx(kl([0.5, 0.2, 0.3], [0.3, 0.3, 0.4]), rel=1e-5)


def test_renormalised_forgets_the_tail() -> None:
    found = distillation_loss(logits(STUDENT), rows([0, 1], []), settings_of(target="renormalised"))
    assert found.item() == pytest.approx(kl([5 / 7, 2 / 7], [0.3, 0.3]), rel=1e-5)


def test_sampled_tail_is_the_full_divergence_in_expectation() -> None:
    student = logits(STUDENT).requires_grad_()
    config = settings_of(target="sampled_tail")
    # Every possible draw, weighted by its probability in the tail {2, 3, 4} of mass 0.3.
    expected = sum(
        (TEACHER[token] / 0.3) * distillation_loss(student, rows([0, 1], [token]), config)[0] for token in (2, 3, 4)
    )
    assert isinstance(expected, torch.Tensor)
    expected.backward()
    assert expected.item() == pytest.approx(kl(TEACHER, STUDENT), rel=1e-5)
    assert student.grad is not None
    np.testing.assert_allclose(student.grad[0].numpy(), np.array(STUDENT) - np.array(TEACHER), atol=1e-6)


def test_two_draws_weigh_half_each() -> None:
    config = settings_of(target="sampled_tail")
    both = distillation_loss(logits(STUDENT), rows([0, 1], [2, 4]), config).item()
    each = [distillation_loss(logits(STUDENT), rows([0, 1], [token]), config).item() for token in (2, 4)]
    assert both == pytest.approx(sum(each) / 2, rel=1e-5)


def test_temperature_flattens_both_sides_and_scales_by_its_square() -> None:
    def flat(probabilities: list[float]) -> list[float]:
        powers = [p**0.5 for p in probabilities]
        return [p / sum(powers) for p in powers]

    expected = 4 * kl(flat(TEACHER), flat(STUDENT))
    config = settings_of(target="tail_bucket", temperature=2.0)
    assert dense_loss(logits(STUDENT), logits(TEACHER), config).item() == pytest.approx(expected, rel=1e-5)
    # One token outside of the head: an even spread over it is exact, so the bucket gives the same number.
    found = distillation_loss(logits(STUDENT), rows([0, 1, 2, 3], []), config).item()
    assert found == pytest.approx(expected, rel=1e-4)


def test_rows_taken_at_a_temperature_are_used_at_it() -> None:
    full = logits(TEACHER)
    scores = scores_from_logits(full, torch.tensor([0]), top_logprobs=4, tail_draws=1, temperature=2.0)
    config = settings_of(target="sampled_tail", temperature=2.0)
    # Only token 4 is outside of the head, so the draw is certain and the value exact.
    assert distillation_loss(logits(STUDENT), target_rows([scores]), config).item() == pytest.approx(
        dense_loss(logits(STUDENT), full, settings_of(target="tail_bucket", temperature=2.0)).item(), rel=1e-4
    )
    with pytest.raises(UsageError, match=r"wants temperature 1.*taken at 2"):
        distillation_loss(logits(STUDENT), target_rows([scores]), settings_of(target="sampled_tail"))


def test_targets_that_rows_cannot_give_are_refused() -> None:
    with pytest.raises(UsageError, match="hold the head only"):
        distillation_loss(logits(STUDENT), rows([0, 1], []), settings_of(target="sampled_tail"))
    with pytest.raises(UsageError, match="needs target='tail_bucket'"):
        settings_of(target="sampled_tail", divergence="jensen_shannon")
    with pytest.raises(UsageError, match="infinite"):
        settings_of(target="renormalised", divergence="reverse_kl")


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jensen_shannon", "skewed_forward_kl"])
def test_missing_entries_of_a_head_change_nothing(name: str) -> None:
    config = settings_of(target="tail_bucket", divergence=name)
    short = rows([0, 1], [])
    padded = TargetRows(
        torch.tensor([[0, 1, -1]]),
        torch.tensor([[math.log(0.5), math.log(0.2), -1e4]]),
        short.tail_ids_NM,
        torch.ones(1),
    )
    student = logits(STUDENT).requires_grad_()
    other = logits(STUDENT).requires_grad_()
    loss, expected = distillation_loss(student, padded, config)[0], distillation_loss(other, short, config)[0]
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert student.grad is not None
    assert other.grad is not None
    np.testing.assert_allclose(student.grad.numpy(), other.grad.numpy(), atol=1e-7)


def test_tails_of_both_kinds_are_one_minus_the_head_with_its_gradient() -> None:
    """Rows on both sides of where the tail is taken another way, against double precision over all tokens."""
    scale = torch.tensor([[0.1], [1.0], [4.0], [9.0], [30.0]])
    logits_NV = (torch.randn((5, 40), generator=torch.Generator().manual_seed(0)) * scale).requires_grad_()
    ids_NK = torch.cat([logits_NV.detach().topk(3, -1).indices, torch.full((5, 1), -1)], -1)
    found = student_bucket_logprobs(logits_NV, ids_NK)
    (gradient,) = torch.autograd.grad(found[:, -1].sum(), logits_NV)
    exact = logits_NV.detach().double().requires_grad_()
    outside = torch.ones(5, 40, dtype=torch.bool).scatter(-1, ids_NK[:, :3], False)
    tail = exact.masked_fill(~outside, -torch.inf).logsumexp(-1) - exact.logsumexp(-1)
    assert (tail.exp() > 0.1).sum() >= 2
    assert (tail.exp() < 0.1).sum() >= 2
    torch.testing.assert_close(found[:, -1].double(), tail, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), torch.autograd.grad(tail.sum(), exact)[0], rtol=1e-4, atol=1e-6)


def test_a_tail_far_below_rounding_keeps_its_logarithm_and_gradient() -> None:
    student = torch.tensor([[60.0, 0.0, 0.0, 0.0]], requires_grad=True)
    tail = student_bucket_logprobs(student, torch.tensor([[0]]))[0, 1]
    assert tail.item() == pytest.approx(math.log(3) - 60, rel=1e-6)
    tail.backward()
    assert student.grad is not None
    np.testing.assert_allclose(student.grad[0].numpy(), [-1, 1 / 3, 1 / 3, 1 / 3], atol=1e-6)


probabilities = st.lists(st.floats(0.01, 1), min_size=6, max_size=6).map(lambda raw: [p / sum(raw) for p in raw])


@settings(max_examples=60, deadline=None)
@given(probabilities, probabilities, st.integers(1, 4))
def test_the_bucket_is_a_lower_bound_that_grows_with_the_head(p: list[float], q: list[float], k: int) -> None:
    order = sorted(range(6), key=lambda token: -p[token])
    losses = [
        distillation_loss(logits(q), rows(order[:size], [], p), settings_of(target="tail_bucket")).item()
        for size in (k, k + 1)
    ]
    assert -1e-5 <= losses[0] <= losses[1] + 1e-5
    assert losses[1] <= kl(p, q) + 1e-5


@settings(max_examples=40, deadline=None)
@given(probabilities, probabilities)
def test_jensen_shannon_is_symmetric_and_at_most_log_two(p: list[float], q: list[float]) -> None:
    there = divergence(logits(p), logits(q), "jensen_shannon").item()
    back = divergence(logits(q), logits(p), "jensen_shannon").item()
    assert there == pytest.approx(back, abs=1e-6)
    assert -1e-6 <= there <= math.log(2) + 1e-6


def test_reverse_kl_from_the_students_own_tokens_has_its_gradient() -> None:
    student, exact = logits(STUDENT).requires_grad_(), logits(STUDENT).requires_grad_()
    logprobs = student.log_softmax(-1)[0]
    teacher = logits(TEACHER)[0]
    sum(STUDENT[token] * sampled_reverse_kl(logprobs[token], teacher[token]) for token in range(5)).backward()  # type: ignore[union-attr]
    divergence(logits(TEACHER), exact.log_softmax(-1), "reverse_kl")[0].backward()
    assert student.grad is not None
    assert exact.grad is not None
    np.testing.assert_allclose(student.grad.numpy(), exact.grad.numpy(), atol=1e-6)


def test_uld_compares_sizes_and_not_names() -> None:
    assert uld_loss(logits([0.7, 0.2, 0.1]), logits([0.1, 0.7, 0.2])).item() == pytest.approx(0, abs=1e-6)
    # Sorted: (0.7, 0.2, 0.1) against (0.5, 0.5, 0): 0.2 + 0.3 + 0.1.
    assert uld_loss(logits([0.7, 0.2, 0.1]), logits([0.5, 0.5])).item() == pytest.approx(0.6, rel=1e-5)


def test_chunks_give_the_same_losses_and_gradients() -> None:
    generator = torch.Generator().manual_seed(1)
    hidden, head = (torch.randn(shape, generator=generator) for shape in ((7, 4), (11, 4)))
    teacher = torch.randn((7, 11), generator=generator)
    targets = target_rows([scores_from_logits(teacher, torch.arange(7), top_logprobs=3, tail_draws=2)])
    config = settings_of(target="tail_bucket")
    found = []
    for size in (2, 100):
        inputs = [tensor.clone().requires_grad_() for tensor in (hidden, head)]
        loss = chunked_rows(
            *inputs, lambda logits, part: distillation_loss(logits, targets.select(part), config), size
        ).sum()
        loss.backward()
        found.append([loss.detach(), *(tensor.grad for tensor in inputs)])
    for left, right in zip(*found, strict=True):
        assert left is not None
        assert right is not None
        torch.testing.assert_close(left, right)


def test_rows_from_logits_hold_head_tail_and_entropy() -> None:
    probabilities = [0.05, 0.5, 0.1, 0.2, 0.15]
    scores = scores_from_logits(
        logits(probabilities).repeat(400, 1),
        torch.full((400,), 2),
        top_logprobs=2,
        tail_draws=3,
        generator=draw_generator(0, [1]),
    )
    assert scores.head_ids_LK[0].tolist() == [1, 3]
    np.testing.assert_allclose(np.exp(scores.head_logprobs_LK[0]), [0.5, 0.2], rtol=1e-5)
    np.testing.assert_allclose(np.exp(scores.token_logprobs_L), 0.1, rtol=1e-5)
    assert scores.entropy_L[0] == pytest.approx(-sum(p * math.log(p) for p in probabilities), rel=1e-5)
    assert scores.tail_mass[0] == pytest.approx(0.3, rel=1e-5)
    # Three draws a row from {0: 1/6, 2: 1/3, 4: 1/2}: 0.5, 1 and 1.5 of each are expected, and no row is further from
    # that than one. Four standard errors of the mean of 400 rows are 0.1 where a count is one of two.
    counts_L5 = np.stack([np.bincount(draws, minlength=5) for draws in scores.tail_ids_LM])
    expected = np.array([0.5, 0, 1, 0, 1.5])
    assert (np.abs(counts_L5 - expected) < 1).all()
    assert counts_L5[:, 2].tolist() == [1] * 400
    np.testing.assert_allclose(counts_L5.mean(0), expected, atol=0.1)


def test_draws_of_equal_offset_steps_are_unbiased_for_any_weights() -> None:
    weights = torch.tensor([[0.02, 0.9, 0.03, 0.001, 0.029, 0.02]])
    num_offsets, tail = 4000, 0.1
    scores = scores_from_logits(
        weights.log().repeat(num_offsets, 1),
        torch.zeros(num_offsets, dtype=torch.int64),
        top_logprobs=1,
        tail_draws=2,
        generator=torch.Generator().manual_seed(3),
    )
    shares = np.bincount(scores.tail_ids_LM.ravel(), minlength=6) / scores.tail_ids_LM.size
    expected = weights[0].numpy() / tail
    expected[1] = 0
    # Standard error of a share below 0.3 over 4,000 rows of 2 draws: at most 0.006.
    np.testing.assert_allclose(shares, expected, atol=0.02)
    assert (np.diff(scores.tail_ids_LM, axis=1) >= 0).all()


def test_rows_of_unequal_numbers_of_draws_keep_none() -> None:
    def part(num_draws: int) -> TokenScores:
        return scores_from_logits(torch.zeros(2, 9), torch.tensor([0, 1]), top_logprobs=2, tail_draws=num_draws)

    assert joined([part(3), part(3)]).tail_ids_LM.shape == (4, 3)
    assert joined([part(3), part(2)]).tail_ids_LM.shape == (4, 0)


def test_draws_depend_on_tokens_and_seed_alone() -> None:
    def draws(seed: int, tokens: list[int]) -> list[int]:
        even = torch.zeros(1, 50)
        generator = draw_generator(seed, tokens)
        scores = scores_from_logits(even, torch.tensor([0]), top_logprobs=1, tail_draws=8, generator=generator)
        return [int(token) for token in scores.tail_ids_LM[0]]

    assert draws(0, [1, 2]) == draws(0, [1, 2])
    assert draws(0, [1, 2]) != draws(1, [1, 2])
    assert draws(0, [1, 2]) != draws(0, [12])


def test_the_teacher_over_a_bucket_sums_to_one() -> None:
    for temperature in (1.0, 3.0):
        teacher = bucket_logprobs(rows([0, 1], []), "tail_bucket", temperature, vocab_size=5)
        assert teacher.exp().sum().item() == pytest.approx(1, rel=1e-6)
    # At temperature 3 the tail of three tokens, spread evenly, weighs 3 * 0.1^(1/3) before normalising.
    weights = [0.5 ** (1 / 3), 0.2 ** (1 / 3), 3 * 0.1 ** (1 / 3)]
    np.testing.assert_allclose(teacher.exp()[0].numpy(), np.array(weights) / sum(weights), rtol=1e-5)
