"""Votes, ties and the certificates over them, by numbers computed by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from search_paths import ended

from sparkray.search.certificates import beta_certainty, is_locked_in, mixture_e_value
from sparkray.search.votes import STUB_WEIGHT, vote


def test_the_majority_wins_and_answers_are_counted() -> None:
    result = vote(ended("abbab-"))
    assert [(entry.answer.key, entry.weight, entry.paths) for entry in result.ranking] == [
        ("b", 3.0, (1, 2, 4)),
        ("a", 2.0, (0, 3)),
    ]
    assert result.num_without_answer == 1
    assert result.share == 0.6
    assert result.tied == ()


def test_a_tie_goes_to_the_earlier_path_and_is_said() -> None:
    result = vote(ended("baab"))
    assert result.key == "b"
    assert [answer.key for answer in result.tied] == ["b", "a"]


def test_weights_outvote_numbers() -> None:
    weights = [0.9, 0.2, 0.3]
    result = vote(ended("abb"), lambda lane: weights[lane.index])
    assert result.key == "a"
    assert result.share == pytest.approx(0.9 / 1.4)


def test_a_forced_answer_counts_little() -> None:
    lanes = ended("abb")
    lanes[1].is_stub = lanes[2].is_stub = True
    result = vote(lanes)
    assert (result.key, result.ranking[1].weight) == ("a", 2 * STUB_WEIGHT)


def test_nobody_voted() -> None:
    result = vote(ended("--"))
    assert (result.key, result.winner, result.share, result.num_without_answer) == (None, None, 0.0, 2)
    assert vote([]).ranking == ()


@given(st.text("abc-", max_size=12), st.randoms())
def test_the_winner_does_not_depend_on_the_order_of_lanes(answers: str, chance: object) -> None:
    lanes = ended(answers)
    shuffled = lanes.copy()
    chance.shuffle(shuffled)  # type: ignore[attr-defined]
    assert vote(shuffled) == vote(lanes)


@pytest.mark.parametrize(("answers", "to_come", "locked"), [("aaab", 1, True), ("aaab", 2, False), ("aabb", 0, False)])
def test_lock_in(answers: str, to_come: int, locked: bool) -> None:
    # 3 against 1: one more vote makes 3:2, two more can tie.
    assert is_locked_in(vote(ended(answers)), to_come) is locked


@given(st.text("ab", min_size=1, max_size=9), st.text("abc", max_size=6))
def test_a_locked_winner_stays(answers: str, others: str) -> None:
    before = vote(ended(answers))
    if is_locked_in(before, len(others)):
        assert vote(ended(answers + others)).key == before.key


def test_beta_certainty_by_hand() -> None:
    # P(Beta(v+1, 1) > 1/2) = 1 - 2^-(v+1); P(Beta(2, 2) > 1/2) = 1/2; P(Beta(3, 2) > 1/2) = 11/16.
    assert beta_certainty(vote(ended("aaaa"))) == pytest.approx(31 / 32)
    assert beta_certainty(vote(ended("ab"))) == pytest.approx(0.5)
    assert beta_certainty(vote(ended("aab"))) == pytest.approx(11 / 16)
    assert beta_certainty(vote([])) == 0.0


def test_mixture_e_value_by_hand() -> None:
    # v heads alone: 2 * 2^v * (1 - 2^-(v+1)) / (v+1); for v = 3 this is 3.75, shared among one answer and the unseen.
    assert mixture_e_value(vote(ended("aaa"))) == pytest.approx(2 * 8 * (15 / 16) / 4 / 2)
    assert mixture_e_value(vote([])) == 0.0


def test_the_e_value_keeps_its_promise() -> None:
    # Among two equally likely answers a claim "a beats b" at 1/20 may be made for one in twenty sequences at most.
    import random

    claims, chance = 0, random.Random(5)
    for _ in range(300):
        answers = "".join(chance.choice("ab") for _ in range(32))
        claims += any(mixture_e_value(vote(ended(answers[:length]))) >= 20 for length in range(1, 33))
    assert claims / 300 <= 0.05
    assert math.isfinite(mixture_e_value(vote(ended("a" * 400))))
