"""Packing against plain forwards of transformers, and one step: direction, cutting, ranks, what is reported."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llama import VOCAB, draw_groups, plain_logprobs, tiny_llama

from sparkray.config.grpo import GrpoConfig
from sparkray.errors import InternalError
from sparkray.grpo.packing import Completion, build_batch, plan_batches
from sparkray.grpo.ranks import OneRank
from sparkray.grpo.scoring import Scorer
from sparkray.grpo.step import Trainee, train_step

MODEL = tiny_llama()
texts = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9).map(tuple)


def run_config(**values: Any) -> GrpoConfig:
    return GrpoConfig(dataset="unused", output_dir="unused", max_completion_tokens=8, **values)


def trainee(seed: int = 0, learning_rate: float = 1e-2) -> Trainee:
    model = tiny_llama(seed)
    parameters = list(model.parameters())
    return Trainee(Scorer(model), torch.optim.SGD(parameters, learning_rate), parameters, torch.device("cpu"))


@settings(max_examples=25)
@given(
    groups=st.lists(st.tuples(texts, st.lists(texts, min_size=1, max_size=4)), min_size=1, max_size=3),
    max_tokens=st.integers(1, 60),
    packing=st.sampled_from(["shared_prefix", "plain"]),
)
def test_packed_logprobs_are_those_of_single_texts(groups: list[Any], max_tokens: int, packing: Any) -> None:
    completions = [
        Completion(number, prompt, text) for number, (prompt, answers) in enumerate(groups) for text in answers
    ]
    seen = []
    for rows in plan_batches(completions, max_tokens=max_tokens, packing=packing):
        batch = build_batch(rows, completions)
        with torch.no_grad():
            logprobs, entropy = Scorer(MODEL)(batch)
        assert (entropy >= 0).all() and (entropy <= np.log(VOCAB) + 1e-5).all()
        packed, mask = batch.to_completions(logprobs), batch.mask()
        for row, number in enumerate(batch.completions):
            one = completions[number]
            expected = plain_logprobs(MODEL, one.prompt_token_ids, one.token_ids)
            assert mask[row].sum() == len(expected)
            torch.testing.assert_close(packed[row, : len(expected)], expected, atol=2e-5, rtol=1e-5)
            seen.append(number)
    assert sorted(seen) == list(range(len(completions)))


def test_batches_keep_to_their_bound_and_share_prompts() -> None:
    completions = [Completion(0, (1,) * 20, (2,) * 4) for _ in range(8)]
    batches = plan_batches(completions, max_tokens=52, packing="shared_prefix")
    assert [[row.num_tokens for row in rows] for rows in batches] == [[52]]
    assert sum(row.num_tokens for rows in batches for row in rows) == 20 + 8 * 4
    plain = plan_batches(completions, max_tokens=52, packing="plain")
    assert [len(rows) for rows in plain] == [2, 2, 2, 2]


def test_entropy_is_that_of_the_distribution() -> None:
    completion = Completion(0, (3, 4), (5,))
    batch = build_batch(plan_batches([completion], max_tokens=8, packing="plain")[0], [completion])
    with torch.no_grad():
        _, entropy = Scorer(MODEL, temperature=0.7)(batch)
        logits = MODEL(input_ids=torch.tensor([[3, 4]])).logits[0, -1] / 0.7
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(entropy[0], expected, atol=1e-5, rtol=1e-5)


def test_a_step_makes_the_better_completions_likelier() -> None:
    subject = trainee()
    groups = draw_groups(subject.scorer.model, 3, 4)
    rewards = np.tile([1.0, 0.0, 0.0, 0.0], (3, 1))
    before = [plain_logprobs(subject.scorer.model, g.prompt_token_ids, g.rollouts[0].token_ids).sum() for g in groups]
    report = train_step(subject, groups, rewards, run_config(num_generations=4), OneRank())
    after = [plain_logprobs(subject.scorer.model, g.prompt_token_ids, g.rollouts[0].token_ids).sum() for g in groups]
    assert all(new > old for new, old in zip(after, before, strict=True))
    assert report.num_completions == 12
    assert report.num_tokens == sum(group.num_tokens for group in groups)
    # The engine's log-probabilities are the trainer's own here.
    assert report.gap_max < 1e-4
    assert report.ratio_mean == pytest.approx(1.0, abs=1e-4)
    assert report.grad_norm > 0


def step_of(**values: Any) -> tuple[dict[str, float], list[torch.Tensor]]:
    subject = trainee()
    groups = draw_groups(subject.scorer.model, 4, 4, seed=5)
    rewards = np.random.default_rng(1).random((4, 4))
    config = run_config(num_generations=4, max_grad_norm=1e9, **values)
    report = train_step(subject, groups, rewards, config, OneRank())
    return report.to_dict(), [parameter.detach() for parameter in subject.parameters]


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo", "cispo", "gspo"])
def test_cutting_into_micro_batches_changes_nothing(loss: str) -> None:
    whole, parameters = step_of(micro_batch_tokens=4096, loss={"name": loss})
    cut, cut_parameters = step_of(micro_batch_tokens=16, loss={"name": loss}, packing="plain")
    for one, other in zip(parameters, cut_parameters, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    for name in ("loss", "num_tokens", "entropy_nats", "grad_norm", "ratio_mean"):
        assert cut[name] == pytest.approx(whole[name], rel=1e-3, abs=1e-5), name
    assert cut["num_positions"] > whole["num_positions"]


def test_groups_that_say_nothing_leave_the_policy_as_it_is() -> None:
    subject = trainee()
    before = [parameter.detach().clone() for parameter in subject.parameters]
    groups = draw_groups(subject.scorer.model, 2, 3)
    report = train_step(subject, groups, np.ones((2, 3)), run_config(num_generations=3), OneRank())
    assert report.zero_variance_share == 1.0
    assert report.num_tokens == 0 and report.grad_norm == 0
    for one, other in zip(before, subject.parameters, strict=True):
        assert torch.equal(one, other)


def test_a_sample_without_a_reward_is_not_trained_on() -> None:
    rewards = np.array([[1.0, 0.0, np.nan]])
    subject, other = trainee(), trainee()
    groups = draw_groups(subject.scorer.model, 1, 3)
    config = run_config(num_generations=3, loss={"name": "grpo"})
    train_step(subject, groups, rewards, config, OneRank())
    without = [type(groups[0])(0, groups[0].prompt_token_ids, groups[0].rollouts[:2])]
    train_step(other, without, rewards[:, :2], config, OneRank())
    for one, two in zip(subject.parameters, other.parameters, strict=True):
        torch.testing.assert_close(one, two)


def test_a_second_pass_is_clipped_against_the_first() -> None:
    subject = trainee(learning_rate=5.0)
    groups = draw_groups(subject.scorer.model, 3, 4)
    rewards = np.tile([1.0, 0.0, 0.0, 0.0], (3, 1))
    loss = {"geometric_low": 1e-6, "geometric_high": 1e6, "token_ratio_cap": 1e6}
    report = train_step(subject, groups, rewards, run_config(num_generations=4, num_iterations=2, loss=loss), OneRank())
    assert report.clip_share > 0.1


def test_a_kl_to_the_reference_is_reported_and_pulls() -> None:
    subject = trainee()
    frozen = Scorer(tiny_llama(9))
    reported = []
    for _ in range(12):
        groups = draw_groups(subject.scorer.model, 3, 4)
        with_reference = Trainee(
            subject.scorer,
            subject.optimizer,
            subject.parameters,
            subject.device,
            reference=lambda batch: frozen(batch)[0].detach(),
        )
        rewards = np.random.default_rng(0).random((3, 4)) * 1e-6
        config = run_config(num_generations=4, loss={"name": "dapo", "kl_beta": 1.0, "advantage": "dr_grpo"})
        reported.append(train_step(with_reference, groups, rewards, config, OneRank()).kl_nats)
    assert reported[0] > 0.05
    assert reported[-1] < reported[0]


def test_a_gradient_that_is_not_finite_stops_the_run() -> None:
    subject = trainee()
    groups = draw_groups(subject.scorer.model, 1, 2)
    with torch.no_grad():
        subject.parameters[-1].fill_(float("nan"))
    with pytest.raises(InternalError, match="norm is nan"):
        train_step(subject, groups, np.array([[1.0, 0.0]]), run_config(num_generations=2), OneRank())
