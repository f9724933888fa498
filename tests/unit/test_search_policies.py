"""Every policy on paths made by hand, with its tokens, paths and winner counted by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from search_paths import path, paths

from sparkray.errors import InternalError
from sparkray.search.logistic import Logistic
from sparkray.search.paths import FinishReason, Lane, Path
from sparkray.search.policies import (
    AdaptiveConsistency,
    Certified,
    DeepConfOffline,
    DeepConfOnline,
    EarlyStopping,
    Full,
    Metis,
    Policy,
)
from sparkray.search.policies.base import MajorityRun
from sparkray.search.policies.deepconf import lowest_group_confidence
from sparkray.search.replay import replay
from sparkray.search.scorer import FEATURES, PathScorer
from sparkray.search.stopping import STATE_FEATURES

NUM_FEATURES = len(FEATURES)


def by_entropy(weight: float = -4.0) -> Logistic:
    """P(right) = 1 / (1 + exp(-weight * (mean entropy - 1)))."""
    weights = [weight if name == "mean_entropy" else 0.0 for name in FEATURES]
    means = [1.0 if name == "mean_entropy" else 0.0 for name in FEATURES]
    return Logistic(tuple(means), (1.0,) * NUM_FEATURES, tuple(weights), 0.0)


SCORER = PathScorer((2, 4), (by_entropy(), by_entropy()), by_entropy())


def test_full_spends_everything() -> None:
    outcome = replay(Full(), paths("aabb", 3) + paths("b", 7))
    assert (outcome.result.key, outcome.num_tokens, outcome.num_steps, outcome.num_paths) == ("b", 19, 7, 5)
    assert outcome.closed_by is None


def test_adaptive_consistency_stops_when_sure() -> None:
    # Four agreeing paths: P(Beta(5, 1) > 1/2) = 31/32 >= 0.95, three give 15/16.
    outcome = replay(AdaptiveConsistency(0.95), paths("aaaaaaaa"))
    assert (outcome.num_paths, outcome.num_tokens, outcome.closed_by) == (4, 12, "beta")
    # 3 to 1 is 13/16; 5 to 1 is 15/16 = 120/128; 6 to 1 is 247/256.
    assert replay(AdaptiveConsistency(0.95), paths("abaaaaaaa")).num_paths == 7
    assert replay(AdaptiveConsistency(0.95), paths("abab")).closed_by is None


def test_early_stopping_wants_a_whole_window_to_agree() -> None:
    assert replay(EarlyStopping(3), paths("aabbbbaaa")).num_paths == 6
    assert replay(EarlyStopping(3), paths("---bbb")).num_paths == 6
    # A last window that is not whole does not stop anything, and everything is spent.
    outcome = replay(EarlyStopping(3), paths("abcd"))
    assert (outcome.num_paths, outcome.closed_by) == (4, None)


def test_lowest_group_confidence_by_hand() -> None:
    lane = Lane(0, signals=path("a", 4, top_confidence=[4, 2, 3, 9]).signals)
    assert lowest_group_confidence(lane, 2) == 2.5
    assert lowest_group_confidence(lane, 8) == 4.5


def test_deepconf_offline_lets_the_confident_vote() -> None:
    found = [path("a", 3, top_confidence=1), path("a", 3, top_confidence=1), path("b", 3, top_confidence=5)]
    assert replay(DeepConfOffline(keep=1.0), found).result.key == "b"
    found = [path("a", 3, top_confidence=3), path("a", 3, top_confidence=3), path("b", 3, top_confidence=5)]
    assert replay(DeepConfOffline(keep=1.0), found).result.key == "a"
    # A third of three keeps one path.
    assert replay(DeepConfOffline(keep=1 / 3), found).result.key == "b"


def test_deepconf_online_prunes_below_the_warm_up() -> None:
    warm_up = [path("a", 4, top_confidence=5), path("b", 4, top_confidence=5)]
    doubtful = path("b", 9, top_confidence=[5, 5, 1, 1, 1, 1, 1, 1, 1])
    policy = DeepConfOnline(warm_up=2, keep=0.5, consensus=0.95, window=2)
    outcome = replay(policy, [*warm_up, doubtful, path("a", 4, top_confidence=6)])
    # The window of tokens 2 and 3 has mean 3, below 5: three tokens were written.
    assert outcome.pruned == (2,)
    assert outcome.num_tokens == 4 + 4 + 3 + 4
    assert outcome.result.key == "a"


def test_deepconf_online_stops_at_consensus() -> None:
    found = [path("a", 4, top_confidence=5) for _ in range(12)]
    outcome = replay(DeepConfOnline(warm_up=3, window=2), found)
    assert (outcome.num_paths, outcome.closed_by) == (3, "consensus")


def test_metis_prunes_at_checkpoints_and_takes_the_best_score() -> None:
    found = [
        path("long", 10, entropy=1.0),
        path("short", 6, entropy=1.0),
        path("hedging", 10, entropy=1.0, action=1.0),
        path("calm", 10, entropy=0.1),
    ]
    outcome = replay(Metis(prune_ratio=0.5, checkpoints=(4,)), found)
    # At token 4: 0.2 for long and short, -0.2 for hedging, 0 for calm: the lower two are pruned.
    assert set(outcome.pruned) == {2, 3}
    assert outcome.num_tokens == 10 + 6 + 4 + 4
    assert outcome.result.key == "long"
    votes = replay(Metis(prune_ratio=0.0, checkpoints=(4,), majority=True), found + found[1:2])
    assert votes.result.key == "short"


def test_metis_never_prunes_the_last_path() -> None:
    outcome = replay(Metis(prune_ratio=0.9, checkpoints=(1, 2, 3)), paths("abc", 5))
    assert len(outcome.pruned) == 2
    assert outcome.result.key is not None


def test_certified_prunes_hopeless_paths() -> None:
    # Mean entropy 3 gives P = 1 / (1 + e^8) at the first checkpoint, 0 gives 1 / (1 + e^-4).
    found = [path("a", 6, entropy=0.0), path("b", 6, entropy=3.0), path("b", 6, entropy=3.0)]
    outcome = replay(Certified(SCORER, prune_below=0.1, wave=3), found)
    assert outcome.pruned == (1, 2)
    assert outcome.num_tokens == 6 + 2 + 2
    assert outcome.result.key == "a"


def test_certified_stops_when_regret_is_small() -> None:
    size = len(STATE_FEATURES)
    never = Logistic((0.0,) * size, (1.0,) * size, (0.0,) * size, -5.0)
    policy = Certified(SCORER, regret=never, stop_below=0.01, wave=2)
    found = [path("a", 4), path("b", 9), path("a", 4)]
    outcome = replay(policy, found)
    # The first of the first wave ends at token 4; the other one is aborted there.
    assert (outcome.num_tokens, outcome.closed_by, outcome.result.key) == (8, "regret", "a")
    assert outcome.lanes[1].finish_reason is FinishReason.CLOSED
    assert replay(Certified(SCORER, regret=never, stop_below=0.001, wave=2), found).num_paths == 3


def test_certified_locks_in_exactly() -> None:
    # All weigh the same, 0.98: five of eight against none with three to come, and no sooner.
    outcome = replay(Certified(SCORER, wave=1), paths("aaaaaaaa"))
    assert (outcome.num_paths, outcome.closed_by) == (5, "lock_in")


def test_the_task_chooses_what_tells_a_right_end() -> None:
    found = [path("calm", 4, entropy=0.0), path("excited", 4, entropy=2.0)]
    scorer = PathScorer((2, 4), (by_entropy(), by_entropy()), by_entropy(), {"riddles": by_entropy(4.0)})
    for task, key in ((None, "calm"), ("sums", "calm"), ("riddles", "excited")):
        assert replay(Certified(scorer, task=task), found).result.key == key


def test_all_paths_pruned_is_an_outcome() -> None:
    found = [path("a", 6, entropy=3.0) for _ in range(4)]
    outcome = replay(Certified(SCORER, prune_below=0.5), found)
    assert (len(outcome.pruned), outcome.result.key, outcome.num_tokens) == (4, None, 8)


@pytest.mark.parametrize("policy", [Full(), AdaptiveConsistency(), EarlyStopping(), DeepConfOffline(), Metis()])
def test_one_path_is_enough_for_any_policy(policy: Policy) -> None:
    assert replay(policy, paths("a")).result.key == "a"
    assert replay(policy, paths("-")).result.key is None


def test_asking_for_too_many_paths_is_an_error_of_the_policy() -> None:
    class Greedy:
        name = "greedy"

        def start(self, max_paths: int) -> MajorityRun:
            return MajorityRun(max_paths + 1)

    with pytest.raises(InternalError, match="asked for 3 paths of 2"):
        replay(Greedy(), paths("ab"))


class _Witness:
    """Any policy, with a check that no lane shows more than was written."""

    name = "witness"

    def __init__(self, inner: Policy, found: Sequence[Path]) -> None:
        self.inner, self.found, self.steps = inner, found, 0

    def start(self, max_paths: int) -> _Witness:
        self.run = self.inner.start(max_paths)
        return self

    def next_wave(self, lanes: Sequence[Lane]) -> int:
        return self.run.next_wave(lanes)

    def after_step(self, lanes: Sequence[Lane]) -> object:
        self.steps += 1
        for lane in lanes:
            whole = self.found[lane.index]
            assert lane.num_tokens <= self.steps
            assert lane.running == (lane.num_tokens < whole.num_tokens and lane.finish_reason is None)
            assert lane.answer is None or lane.num_tokens == whole.num_tokens
        return self.run.after_step(lanes)

    def vote(self, lanes: Sequence[Lane]) -> object:
        return self.run.vote(lanes)


POLICIES = [
    Full(),
    AdaptiveConsistency(wave=3),
    EarlyStopping(3),
    DeepConfOnline(warm_up=2, window=2, wave=2),
    DeepConfOffline(window=2),
    Metis(checkpoints=(2, 4)),
    Certified(SCORER, prune_below=0.3, wave=3),
]


@given(
    st.lists(st.tuples(st.sampled_from("abc-"), st.integers(1, 8), st.floats(0, 4)), min_size=1, max_size=9),
    st.sampled_from(POLICIES),
)
def test_no_policy_sees_the_future_or_spends_what_is_not_there(
    drawn: list[tuple[str, int, float]], policy: Policy
) -> None:
    found = [
        path(None if answer == "-" else answer, length, entropy=entropy, top_confidence=entropy)
        for answer, length, entropy in drawn
    ]
    outcome = replay(_Witness(policy, found), found)  # type: ignore[arg-type]
    full = replay(Full(), found)
    assert outcome.num_tokens <= full.num_tokens
    assert outcome.num_tokens == sum(lane.num_tokens for lane in outcome.lanes)
    assert not any(lane.running for lane in outcome.lanes)
    if policy.name in ("full", "adaptive_consistency", "esc") and not full.result.tied and outcome.closed_by is None:
        assert outcome.result.key == full.result.key
    assert np.isfinite(outcome.result.total_weight)
