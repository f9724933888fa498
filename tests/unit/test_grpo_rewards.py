"""Rewards by hand, and what a bad one costs: its sample, never the run."""

from __future__ import annotations

import json
import math
import sys
import threading
import time
import types
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import numpy as np
import pytest

from sparkray.config.grpo import RewardConfig, RewardTermConfig
from sparkray.errors import UsageError
from sparkray.grpo.rewards import RewardScorer, Sample, final_answer, named_terms
from sparkray.grpo.rollouts import Rollout
from sparkray.metis.fields import NUM_FIELDS
from sparkray.metis.reward import CognitiveRewardComputer


def sample(text: str, **row: Any) -> Sample:
    tokens = tuple(range(len(text.split()) or 1))
    return Sample({"prompt": "?", **row}, Rollout(tokens, text, np.zeros(len(tokens), np.float32), "stop", 0))


def scorer(*terms: RewardTermConfig, **values: Any) -> RewardScorer:
    return RewardScorer(RewardConfig(terms=terms, **values))


@pytest.fixture
def user_rewards() -> Iterator[types.ModuleType]:
    module = types.ModuleType("user_rewards")

    def length(prompts: list[Any], completions: list[str], **columns: Any) -> list[float]:
        assert prompts == ["?"] and columns["answer"] == ["7"] and columns["completion_ids"]
        return [float(len(completion)) for completion in completions]

    def bad(completions: list[str], **_: Any) -> list[float | None]:
        kind = completions[0]
        if kind == "raise":
            raise RuntimeError("no such luck")
        if kind == "hang":
            time.sleep(60)
        return {"nan": [math.nan], "none": [None], "two": [1.0, 2.0]}.get(kind, [1.0])

    module.length, module.bad = length, bad  # type: ignore[attr-defined]
    sys.modules["user_rewards"] = module
    yield module
    del sys.modules["user_rewards"]


def test_exact_match_and_weights() -> None:
    subject = scorer(RewardTermConfig(kind="exact", weight=2.0))
    scores = subject.score([sample(" 7 ", answer=7), sample("8", answer=7)])
    assert [score.total for score in scores] == [2.0, 0.0]
    assert scores[0].terms == {"exact": 1.0}


def test_a_python_reward_has_trls_signature(user_rewards: types.ModuleType) -> None:
    subject = scorer(RewardTermConfig(kind="python", target="user_rewards:length"), RewardTermConfig(kind="exact"))
    (score,) = subject.score([sample("7", answer="7")])
    assert score.total == 2.0
    assert score.terms == {"length": 1.0, "exact": 1.0}


def test_messages_get_messages() -> None:
    from sparkray.grpo.rewards import as_trl_arguments

    asked = as_trl_arguments(sample("yes", prompt=[{"role": "user", "content": "?"}]))
    assert asked["completions"] == [[{"role": "assistant", "content": "yes"}]]


def test_a_bad_reward_costs_its_sample(user_rewards: types.ModuleType) -> None:
    subject = scorer(RewardTermConfig(kind="python", target="user_rewards:bad"), time_limit_seconds=0.2)
    texts = ["good", "raise", "hang", "nan", "two", "none", "fine"]
    scores = subject.score([sample(text) for text in texts])
    assert [math.isnan(score.total) for score in scores] == [False, True, True, True, True, True, False]
    reasons = " | ".join(score.failure or "" for score in scores)
    for word in ("no such luck", "TimeoutError", "nan", "2 values", "no reward applies"):
        assert word in reasons


def test_a_missing_column_is_named() -> None:
    (score,) = scorer(RewardTermConfig(kind="exact")).score([sample("7")])
    assert score.failure is not None and "`answer`" in score.failure


def test_a_reward_that_cannot_be_imported_is_refused_at_once() -> None:
    with pytest.raises(UsageError, match="no_such_module"):
        scorer(RewardTermConfig(kind="python", target="no_such_module:f"))


@pytest.mark.parametrize(
    ("answer", "text", "expected"),
    [("1/2", "So it is $\\frac{1}{2}$.", 1.0), ("1/2", "So it is $0.6$.", 0.0), ("12", "The answer is $12$", 1.0)],
)
def test_mathematics_is_compared_as_such(answer: str, text: str, expected: float) -> None:
    (score,) = scorer(RewardTermConfig(kind="math")).score([sample(text, answer=answer)])
    assert score.total == expected


def test_reasoning_gym_scores_by_its_own_rule() -> None:
    import reasoning_gym

    entry = reasoning_gym.create_dataset("chain_sum", size=1, seed=3)[0]
    subject = scorer(RewardTermConfig(kind="reasoning_gym"))
    right, wrong = subject.score(
        [sample(f"I add. The answer is {entry['answer']}.", entry=entry), sample("The answer is -1.", entry=entry)]
    )
    assert right.total == 1.0
    assert wrong.total < 0.1


def test_an_http_reward_is_asked_over_http() -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            body = json.dumps({"rewards": [len(asked["completions"][0]) / 10]}).encode()
            self.send_response(200 if asked["completions"] != ["fail"] else 500)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/"
    try:
        good, failed = scorer(RewardTermConfig(kind="http", target=address)).score([sample("abcd"), sample("fail")])
    finally:
        server.shutdown()
    assert good.total == 0.4
    assert failed.failure is not None and "500" in failed.failure


def test_cognitive_shaping_adds_the_reward_of_the_trace() -> None:
    random = np.random.default_rng(0)
    recorded = random.random((40, NUM_FIELDS)).astype(np.float32)
    recorded[:, -2:] = 0
    rollout = Rollout(tuple(range(40)), "text", -random.random(40).astype(np.float32), "stop", 0, recorded)
    subject = scorer(RewardTermConfig(kind="exact"), cognitive_weight=0.5)
    (score,) = subject.score([Sample({"prompt": "?", "answer": "text"}, rollout)])
    expected = CognitiveRewardComputer().compute(rollout.trace())
    assert expected.total != 0
    assert score.total == pytest.approx(1.0 + 0.5 * expected.total)
    assert score.cognitive["coherence"] == expected.coherence
    assert score.terms["cognitive"] == expected.total


def test_two_rewards_of_a_name_are_told_apart() -> None:
    config = RewardConfig(terms=(RewardTermConfig(kind="exact"), RewardTermConfig(kind="exact", weight=2)))
    assert [name for name, _ in named_terms(config)] == ["exact", "exact_2"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2 + 3 = 5. The answer is 5.", "5"),
        ("<answer>a b</answer> done", "a b"),
        ("Answer: 12\nmore", "12"),
        ("7", "7"),
        ("The answer is", ""),
    ],
)
def test_final_answers(text: str, expected: str) -> None:
    assert final_answer(text) == expected
