"""What a completion is worth: verifiable rewards first, METIS's cognitive reward as shaping beside them.

A Python reward has TRL's signature: it is called with lists by keyword (`prompts`, `completions`, `completion_ids`
and the dataset's columns) and returns a list of numbers; None means that it does not apply. It is called for one
completion at a time, so that one that raises, hangs or returns NaN costs that completion and nothing else.
"""

from __future__ import annotations

import importlib
import math
import signal
import threading
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from sparkray.config.grpo import RewardConfig, RewardTermConfig
from sparkray.errors import InputError, MissingExtraError, UsageError
from sparkray.grpo.rollouts import Rollout
from sparkray.metis.reward import CognitiveRewardComputer

COGNITIVE = "cognitive"

RewardFunction = Callable[["Sample"], float | None]


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One completion as a reward sees it.

    Attributes:
        row: the dataset's columns, `prompt` included.
        rollout: what was drawn.
    """

    row: Mapping[str, Any]
    rollout: Rollout


@dataclass(frozen=True, slots=True)
class Score:
    """What a completion got.

    Attributes:
        total: the weighted sum; NaN where any part of it failed.
        terms: each reward before its weight, under its name; those that failed or do not apply are left out.
        cognitive: the parts of the cognitive reward, where it was computed.
        failure: why there is no total, or None.
    """

    total: float
    terms: Mapping[str, float] = field(default_factory=dict)
    cognitive: Mapping[str, float] = field(default_factory=dict)
    failure: str | None = None


class RewardScorer:
    """Scores completions by a run's rewards.

    Raises:
        UsageError: a Python reward that cannot be imported.
        MissingExtraError: a reward whose library is not installed.
    """

    def __init__(self, config: RewardConfig) -> None:
        self._config = config
        self._functions = [(name, term.weight, load_reward(term)) for name, term in named_terms(config)]
        self._cognitive = CognitiveRewardComputer() if config.cognitive_weight > 0 else None

    def score(self, samples: Sequence[Sample], *, verifiable: bool = False) -> list[Score]:
        """A score of each sample, without the shaping where `verifiable`; none of them raises."""
        return [self._score(sample, shaped=not verifiable) for sample in samples]

    def _score(self, sample: Sample, *, shaped: bool) -> Score:
        terms: dict[str, float] = {}
        parts: dict[str, float] = {}
        total = 0.0
        name = ""
        try:
            with time_limit(self._config.time_limit_seconds):
                for name, weight, function in self._functions:
                    value = function(sample)
                    if value is None:
                        continue
                    value = float(value)
                    if not math.isfinite(value):
                        raise ValueError(f"it returned {value}")
                    terms[name] = value
                    total += weight * value
                name = COGNITIVE
                if self._cognitive is not None and shaped:
                    reward = self._cognitive.compute(sample.rollout.trace())
                    parts = {key: float(value) for key, value in reward.to_dict().items()}
                    terms[COGNITIVE] = reward.total
                    total += self._config.cognitive_weight * reward.total
        except Exception as failure:  # a reward is the user's program and may raise anything
            return Score(math.nan, terms, parts, f"{name}: {type(failure).__name__}: {failure}")
        if not terms:
            return Score(math.nan, failure="no reward applies to it")
        return Score(total, terms, parts)


def named_terms(config: RewardConfig) -> list[tuple[str, RewardTermConfig]]:
    """The terms under the names that are logged; a second one of a name gets a number."""
    names: list[tuple[str, RewardTermConfig]] = []
    for term in config.terms:
        name = term.target.rpartition(":")[2] if term.kind == "python" else term.kind
        same = sum(other == name or other.startswith(f"{name}_") for other, _ in names)
        names.append((f"{name}_{same + 1}" if same else name, term))
    return names


def load_reward(term: RewardTermConfig) -> RewardFunction:
    """The function of a term."""
    if term.kind == "python":
        return _python_reward(term.target)
    if term.kind == "http":
        return _http_reward(term.target)
    return {"exact": lambda: exact_match, "math": _math_reward, "reasoning_gym": _reasoning_gym_reward}[term.kind]()


def exact_match(sample: Sample) -> float:
    """1 where the completion is the column `answer`, spaces around both aside."""
    return float(sample.rollout.text.strip() == str(_column(sample, "answer")).strip())


def as_trl_arguments(sample: Sample) -> dict[str, Any]:
    """The keyword arguments of TRL's reward functions, for one completion."""
    prompt, text = sample.row["prompt"], sample.rollout.text
    completion = text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
    columns = {name: [value] for name, value in sample.row.items() if name not in ("prompt", "completion")}
    return {
        **columns,
        "prompts": [prompt],
        "completions": [completion],
        "completion_ids": [list(sample.rollout.token_ids)],
    }


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after so many seconds; without effect outside a process's main thread.

    It ends whatever Python runs or waits for. What hangs inside a library without returning to Python is ended by
    killing the process, which is for those who own it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def expire(_: int, __: types.FrameType | None) -> None:
        raise TimeoutError(f"no result within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _python_reward(target: str) -> RewardFunction:
    module, _, name = target.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as failure:
        raise UsageError(
            f"the reward {target!r} cannot be imported: {failure}.",
            hint="Give module:function, with the module on PYTHONPATH of every node.",
            param="reward.terms",
        ) from failure

    def reward(sample: Sample) -> float | None:
        values = function(**as_trl_arguments(sample))
        if len(values) != 1:
            raise ValueError(f"one completion was given, and it returned {len(values)} values")
        value: float | None = values[0]
        return value

    return reward


def _http_reward(address: str) -> RewardFunction:
    import httpx

    client = httpx.Client(timeout=None)  # the limit of a sample bounds it

    def reward(sample: Sample) -> float | None:
        answer = client.post(address, json=as_trl_arguments(sample))
        answer.raise_for_status()
        values = answer.json()["rewards"]
        value: float | None = values[0]
        return value

    return reward


def _math_reward() -> RewardFunction:
    try:
        from math_verify import parse, verify
    except ModuleNotFoundError as failure:
        raise MissingExtraError.for_module("math_verify", "search") from failure

    def reward(sample: Sample) -> float:
        # Its own limits use the same alarm as `time_limit`, and are switched off.
        expected = parse(f"${_column(sample, 'answer')}$", parsing_timeout=None)
        given = parse(sample.rollout.text, parsing_timeout=None)
        return float(verify(expected, given, timeout_seconds=None))

    return reward


def _reasoning_gym_reward() -> RewardFunction:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            import reasoning_gym
    except ModuleNotFoundError as failure:
        raise MissingExtraError.for_module("reasoning_gym", "search") from failure

    def reward(sample: Sample) -> float:
        entry = _column(sample, "entry")
        score = reasoning_gym.get_score_answer_fn(entry["metadata"]["source_dataset"])
        return float(score(final_answer(sample.rollout.text), entry))

    return reward


def final_answer(text: str) -> str:
    """The answer at the end of a completion: what follows "answer is" or "<answer>", without a closing full stop."""
    for mark in ("<answer>", "answer is", "Answer:"):
        _, found, rest = text.rpartition(mark)
        if found:
            return rest.partition("</answer>")[0].strip().splitlines()[0].strip().rstrip(".") if rest.strip() else ""
    return text.strip()


def _column(sample: Sample, name: str) -> Any:
    if name not in sample.row:
        raise InputError(f"this reward reads the column `{name}`, and the row has {', '.join(sorted(sample.row))}.")
    return sample.row[name]
