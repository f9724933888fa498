"""METIS's public names, used as its snippets use them."""

from __future__ import annotations

import math

import pytest
import torch
from test_metis_boost import WORDS, WordTokenizer
from test_metis_published import Rule

from sparkray.metis import CoTBoostProcessor, MetisCompositeProcessor, MetisCUSUMProcessor
from sparkray.metis.options import WatchOptions
from sparkray.metis.reward import CognitiveRewardComputer

VOCAB = len(WORDS)


def logits_of(entropy_like: float, seed: int = 0) -> torch.Tensor:
    """Logits whose sharpness goes with 1 / entropy_like."""
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 6.0 / entropy_like


def few(num_words: int) -> torch.Tensor:
    """Logits of `num_words` equally likely words."""
    logits = torch.full((VOCAB,), -30.0)
    logits[:num_words] = 0.0
    return logits


def entropy_of(logits: torch.Tensor) -> float:
    p = torch.softmax(logits.double(), -1)
    return float(-(p * torch.log2(p + 1e-10)).sum())


def test_the_summary_is_the_published_rule() -> None:
    processor, rule, token_ids = MetisCUSUMProcessor(WatchOptions(hedge=2.0)), Rule(hedge=2.0), []
    events = []
    for step in range(200):
        logits = logits_of(0.5, step) if step % 50 else few(8)
        before = logits.clone()
        assert processor(token_ids, logits) is logits
        assert torch.equal(logits, before)
        events.append((entropy_of(logits), *rule.token(entropy_of(logits), VOCAB)))
        token_ids.append(step)
    (summary,) = processor.get_traces_summary()
    assert summary["seq_id"] == 0
    assert summary["total_tokens"] == 200
    assert summary["hedge_count"] == sum(event[4] == 1 for event in events) > 0
    assert summary["refuse_count"] == sum(event[4] == 2 for event in events)
    assert summary["mean_entropy"] == pytest.approx(sum(event[0] for event in events) / 200, abs=2e-4)
    assert summary["peak_cusum"] == pytest.approx(max(event[3] for event in events), abs=2e-3)
    for step, (entropy, confidence, z, seen, action, _) in enumerate(events, start=1):
        got = summary["events"][step - 1]
        assert got["step"] == step
        assert got["entropy"] == pytest.approx(entropy, abs=2e-4)
        assert got["confidence"] == pytest.approx(confidence, abs=2e-4)
        assert got["z_score"] == pytest.approx(z, abs=2e-3)
        assert got["cusum"] == pytest.approx(seen, abs=5e-3)
        assert got["action"] == ("generate", "hedge", "refuse")[action]


def test_requests_called_by_name_do_not_mix() -> None:
    processor = MetisCompositeProcessor(WordTokenizer())
    first, second = processor.for_request("q1"), processor.for_request("q2")
    for step in range(20):
        first([1] * step, logits_of(1.0, step))
        if step % 2:
            second([1] * (step // 2), logits_of(9.0, step))
    summaries = processor.get_traces_summary()
    assert [(item["seq_id"], item["total_tokens"]) for item in summaries] == [("q1", 20), ("q2", 10)]
    assert summaries[0]["mean_entropy"] < 3 < summaries[1]["mean_entropy"]


def test_a_list_that_took_the_place_of_a_dead_one_is_another_request() -> None:
    """METIS's key id(token_ids) joins these; every list here is dropped before the next is made."""
    processor = MetisCUSUMProcessor()
    for request in range(8):
        token_ids: list[int] = []
        for step in range(3):
            processor(token_ids, logits_of(1.0 + request, step))
            token_ids.append(step)
        del token_ids
    assert [item["total_tokens"] for item in processor.get_traces_summary()] == [3] * 8


def test_asked_twice_for_one_token_the_second_counts() -> None:
    """An engine that reads a prompt in pieces asks at every piece, with no token between."""
    twice, once = MetisCUSUMProcessor(), MetisCUSUMProcessor()
    ids_twice, ids_once = [], []
    for step in range(30):
        if step % 4 == 0:
            twice(ids_twice, logits_of(50.0, 999))
        twice(ids_twice, logits_of(2.0, step))
        once(ids_once, logits_of(2.0, step))
        ids_twice.append(step)
        ids_once.append(step)
    assert twice.get_traces_summary() == once.get_traces_summary()


def test_a_list_that_begins_again_is_a_new_request() -> None:
    processor, token_ids = MetisCUSUMProcessor(), []
    for step in range(5):
        processor(token_ids, logits_of(1.0, step))
        token_ids.append(step)
    token_ids.clear()
    processor(token_ids, logits_of(1.0))
    assert [(item["seq_id"], item["total_tokens"]) for item in processor.get_traces_summary()] == [(0, 5), (1, 1)]
    processor.reset()
    assert processor.get_traces_summary() == []


@pytest.mark.parametrize("named", [False, True])
def test_the_boost_is_five_for_fifty_tokens_from_the_alarm_on(named: bool) -> None:
    processor = MetisCompositeProcessor(WordTokenizer(), WatchOptions(hedge=1.0, refuse=1e9))
    call = processor.for_request("q") if named else processor
    boosted_words = {WORDS.index(word) for word in ("Wait", "But", "Let", "Act", "\n\n")}
    token_ids: list[int] = []
    boosted_at = []
    for step in range(200):
        # One token with four choices among tokens with one: the only alarm.
        logits = few(4 if step == 100 else 1)
        logits[WORDS.index("However")] = -math.inf
        before = logits.clone()
        after = call(token_ids, logits)
        added = after - before
        token_ids.append(0)
        assert after[WORDS.index("However")] == -math.inf
        if all(added[at] == 5.0 for at in boosted_words):
            assert added[WORDS.index(" Wait")] == 0
            boosted_at.append(step)
        else:
            assert torch.equal(after, before)
    assert boosted_at == list(range(100, 150))


def test_the_two_halves_make_the_whole() -> None:
    config = WatchOptions(hedge=1.0, refuse=1e9)
    whole = MetisCompositeProcessor(WordTokenizer(), config)
    cusum = MetisCUSUMProcessor(config)
    boost = CoTBoostProcessor(WordTokenizer(), cusum)
    token_ids: list[int] = []
    assert torch.equal(boost([], torch.ones(VOCAB)), torch.ones(VOCAB)), "an unobserved request is not boosted"
    for step in range(120):
        logits = logits_of(0.3, step) if step % 40 else few(4)
        assert torch.equal(whole(token_ids, logits.clone()), boost(token_ids, cusum(token_ids, logits.clone())))
        token_ids.append(step)
    assert whole.get_traces_summary() == cusum.get_traces_summary()
    assert whole.get_cusum_processor().get_traces_summary()[0]["hedge_count"] > 0


def test_traces_feed_the_reward() -> None:
    processor = MetisCompositeProcessor(WordTokenizer())
    watch = processor.for_request(7)
    for step in range(60):
        watch([0] * step, logits_of(0.5 + step % 5, step))
    (trace,) = processor.get_traces()
    assert (trace.request_id, trace.total_tokens) == ("7", 60)
    reward = CognitiveRewardComputer().compute(trace)
    assert not reward.surprise_recorded
    assert -1 <= reward.total <= 1
