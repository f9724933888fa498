"""Two models compared by their likeliest tokens: exact where all are named, a bound elsewhere; by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkray.errors import InputError
from sparkray.pruning.top_logprobs import NO_TOKEN, TopLogprobs, compare_top


def top(came: int, probabilities: list[float], num_top: int) -> TopLogprobs:
    """One place: the token that came, then the likeliest others."""
    ranked = sorted(range(len(probabilities)), key=lambda token: -probabilities[token])[:num_top]
    ids = [came, *(token for token in ranked if token != came)]
    ids += [NO_TOKEN] * (num_top + 1 - len(ids))
    logs = [math.log(probabilities[token]) if token != NO_TOKEN else 0.0 for token in ids]
    return TopLogprobs(np.array([ids]), np.array([logs]))


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def test_two_places_by_hand() -> None:
    p, q = [0.5, 0.3, 0.2], [0.2, 0.3, 0.5]
    found = compare_top([top(0, p, 3), top(2, p, 3)], [top(0, q, 3), top(2, p, 3)])
    assert found.num_tokens == 2
    assert found.perplexity_before == pytest.approx(1 / math.sqrt(0.5 * 0.2))
    assert found.perplexity_after == pytest.approx(1 / math.sqrt(0.2 * 0.2))
    assert found.token_kl == pytest.approx(kl(p, q) / 2)
    assert found.top1_agreement == 0.5
    assert found.engine == "vllm"


def test_what_both_do_not_name_is_one_cell() -> None:
    p, q = [0.4, 0.3, 0.2, 0.1], [0.1, 0.3, 0.2, 0.4]
    # Before names 0, 1 and after 3, 1: token 1 is common, the rest are 0.7 and 0.7.
    assert compare_top([top(1, p, 2)], [top(1, q, 2)]).token_kl == pytest.approx(0.0)
    # The token that came is named by both: cells {0}, {1}, {2, 3}.
    found = compare_top([top(0, p, 2)], [top(0, q, 2)])
    assert found.token_kl == pytest.approx(kl([0.4, 0.3, 0.3], [0.1, 0.3, 0.6]))


weights = st.lists(st.floats(0.01, 1.0), min_size=6, max_size=6)


@given(weights, weights, st.integers(1, 6), st.integers(0, 5))
def test_the_kl_is_never_above_the_true_one(a: list[float], b: list[float], num_top: int, came: int) -> None:
    p, q = [x / sum(a) for x in a], [x / sum(b) for x in b]
    found = compare_top([top(came, p, num_top)], [top(came, q, num_top)])
    assert -1e-9 <= found.token_kl <= kl(p, q) + 1e-5
    if num_top == 6:
        assert found.token_kl == pytest.approx(kl(p, q), abs=1e-9)


def test_no_place_is_refused() -> None:
    empty = TopLogprobs(np.empty((0, 3), dtype=np.int64), np.empty((0, 3)))
    with pytest.raises(InputError, match="two tokens"):
        compare_top([empty], [empty])
