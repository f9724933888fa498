"""Calibrating `certified` on recorded questions whose answers are known.

The questions are divided in two. On the first part the path scorer and the regret of stopping are fitted; on the
second, which they never saw, the two thresholds are certified by `learn_then_test`:

- pruning: the loss of a question is the part of its right paths that the rule prunes (questions without a right path
  have none to lose and are left out);
- stopping: the loss is the part of the replays in which the vote over all paths is right and the early one wrong.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sparkray.errors import InputError
from sparkray.search.bounds import Losses, learn_then_test
from sparkray.search.logistic import Features, Logistic, fit_logistic
from sparkray.search.paths import Lane
from sparkray.search.policies.base import PolicyRun
from sparkray.search.policies.certified import Certified, CertifiedRun
from sparkray.search.policies.full import Full
from sparkray.search.profile import SearchProfile
from sparkray.search.recording import RecordedQuestion, RecordingInfo
from sparkray.search.replay import replay, shuffled_orders
from sparkray.search.scorer import Example, PathScorer, fit_scorer
from sparkray.search.stopping import vote_state

ALPHAS = (0.01, 0.02, 0.05, 0.1, 0.2)
RISKS = (0.02, 0.03, 0.05, 0.1)
# Candidates run from careful to bold on fixed grids: they must not be chosen by looking at the questions.
_PRUNE_GRID = tuple(float(value) for value in np.geomspace(1e-4, 0.6, 120))
_STOP_GRID = tuple(float(value) for value in np.geomspace(1e-4, 0.6, 120))
_NUM_FOLDS = 4
# Of the risk that is allowed, so much is used on the certifying questions, on average: the rest is kept for new ones.
_USED_PART = 0.3
_MIN_QUESTIONS = 20

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CalibrationOptions:
    """How to calibrate.

    Attributes:
        fit_share: part of the questions on which scorer and regret are fitted; the others certify.
        checkpoints: numbers of tokens at which a running path is judged.
        delta: each certified rate may be exceeded with this probability, over the draw of the questions.
        wave: paths launched together.
        num_orders: replays of each question, with its paths in different orders.
        seed: of the division and of the orders.
    """

    fit_share: float = 0.4
    checkpoints: tuple[int, ...] = tuple(range(4, 129, 4))
    delta: float = 0.1
    wave: int = 4
    num_orders: int = 8
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Moment:
    """What was known at one moment of a replay: the state, whether the leader was right, and who it was."""

    state: Features
    leader_right: bool


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One replay without early stopping: its moments, and whether its last vote and the vote over all are right."""

    moments: tuple[Moment, ...]
    last_right: bool
    full_right: bool

    def right_when_stopped(self, estimates: Sequence[float], stop_below: float) -> bool:
        """Whether the answer is right if the search stops at the first estimate below `stop_below`."""
        for moment, estimate in zip(self.moments, estimates, strict=True):
            if estimate < stop_below:
                return moment.leader_right
        return self.last_right


def calibrate(
    info: RecordingInfo, questions: Sequence[RecordedQuestion], options: CalibrationOptions | None = None
) -> SearchProfile:
    """Make a profile for the model and temperature of a recording and the tasks of `questions`.

    Raises:
        InputError: fewer than 20 questions, or paths that are all right or all wrong.
    """
    options = options or CalibrationOptions()
    if len(questions) < _MIN_QUESTIONS:
        raise InputError(
            f"{len(questions)} calibration questions were given, and at least {_MIN_QUESTIONS} are needed.",
            hint="Around 100 are needed before anything can be pruned at alpha 0.05.",
        )
    fitting, certifying = divide(questions, options.fit_share, options.seed)
    scorer = fit_scorer(_examples(fitting), options.checkpoints)
    regret = _fit_regret(fitting, options)
    prune_below = {alpha: _certify_pruning(scorer, certifying, alpha, options) for alpha in ALPHAS}
    stop_below: dict[tuple[float, float], float | None] = {}
    certified: dict[float, dict[float, float | None]] = {}
    for alpha, found in {0.0: None, **prune_below}.items():
        threshold = found or 0.0
        if threshold not in certified:
            policy = Certified(scorer, prune_below=threshold, wave=options.wave)
            traced = [trajectories(policy, question, options) for question in certifying]
            certified[threshold] = {risk: _certify_stopping(regret, traced, risk, options) for risk in RISKS}
        stop_below.update({(alpha, risk): level for risk, level in certified[threshold].items()})
    _log.info("pruning thresholds %s, stopping thresholds %s", prune_below, stop_below)
    return SearchProfile(
        model=info.model,
        temperature=info.temperature,
        tasks=tuple(sorted({question.task for question in questions})),
        scorer=scorer,
        regret=regret,
        prune_below=prune_below,
        stop_below=stop_below,
        delta=options.delta,
        num_questions=len(questions),
        num_certifying=len(certifying),
    )


def divide(
    questions: Sequence[RecordedQuestion], share: float, seed: int
) -> tuple[list[RecordedQuestion], list[RecordedQuestion]]:
    """Two parts, the first with `share` of the questions of every task; the second in random order."""
    generator = np.random.default_rng(seed)
    first: list[RecordedQuestion] = []
    second: list[RecordedQuestion] = []
    for task in sorted({question.task for question in questions}):
        of_task = [question for question in questions if question.task == task]
        shuffled = [of_task[number] for number in generator.permutation(len(of_task))]
        cut = round(share * len(of_task))
        first.extend(shuffled[:cut])
        second.extend(shuffled[cut:])
    return first, [second[number] for number in generator.permutation(len(second))]


def false_prune_losses(scorer: PathScorer, questions: Sequence[RecordedQuestion]) -> list[list[float]]:
    """For each question that has right paths: the least estimate that each of these had at any checkpoint."""
    least = [
        [
            scorer.least_so_far(path.signals)
            for path, correct in zip(question.paths, question.correct, strict=True)
            if correct
        ]
        for question in questions
    ]
    return [values for values in least if values]


def trajectories(policy: Certified, question: RecordedQuestion, options: CalibrationOptions) -> list[Trajectory]:
    """Replays of one question under `policy`, which must not stop early, with every moment noted."""
    found = []
    for order in shuffled_orders(question, options.num_orders, options.seed):
        tracing = _Tracing(policy, question)
        outcome = replay(tracing, question.paths, order)
        full = replay(Full(), question.paths, order)
        found.append(
            Trajectory(
                tuple(tracing.moments), question.is_right(outcome.result.key), question.is_right(full.result.key)
            )
        )
    return found


class _Tracing:
    """`certified` that notes the state whenever it might stop, instead of stopping."""

    name = "certified"

    def __init__(self, policy: Certified, question: RecordedQuestion) -> None:
        self._policy = policy
        self._question = question
        self.moments: list[Moment] = []

    def start(self, max_paths: int) -> PolicyRun:
        return _TracingRun(self._policy, max_paths, self._question, self.moments)


class _TracingRun(CertifiedRun):
    def __init__(self, policy: Certified, max_paths: int, question: RecordedQuestion, moments: list[Moment]) -> None:
        super().__init__(policy, max_paths)
        self._question = question
        self._moments = moments

    def certificate(self, lanes: Sequence[Lane]) -> str | None:
        result = self.vote(lanes)
        if result.winner is not None and not result.tied:
            known = {lane.index: self.probabilities[lane.index] for lane in lanes if lane.answer is not None}
            state = vote_state(result, lanes, known)
            self._moments.append(Moment(state, self._question.is_right(result.key)))
        return super().certificate(lanes)


def _examples(questions: Sequence[RecordedQuestion]) -> list[Example]:
    return [
        Example(path.signals, correct, path.answer is not None, 1 / len(question.paths))
        for question in questions
        for path, correct in zip(question.paths, question.correct, strict=True)
        if path.num_tokens
    ]


def _fit_regret(questions: Sequence[RecordedQuestion], options: CalibrationOptions) -> Logistic:
    # The states of a question come from a scorer that did not see it, as they will on new questions.
    states: list[Features] = []
    regretted: list[bool] = []
    weights: list[float] = []
    for fold in range(_NUM_FOLDS):
        others = [question for number, question in enumerate(questions) if number % _NUM_FOLDS != fold]
        policy = Certified(fit_scorer(_examples(others), options.checkpoints), wave=options.wave)
        for question in questions[fold::_NUM_FOLDS]:
            traced = trajectories(policy, question, options)
            moments = [(moment, run.full_right) for run in traced for moment in run.moments]
            states.extend(moment.state for moment, _ in moments)
            regretted.extend(full_right and not moment.leader_right for moment, full_right in moments)
            weights.extend([1 / len(moments)] * len(moments))
    return fit_logistic(np.stack(states), np.array(regretted), np.array(weights))


def _certify_pruning(
    scorer: PathScorer, questions: Sequence[RecordedQuestion], alpha: float, options: CalibrationOptions
) -> float | None:
    least = false_prune_losses(scorer, questions)

    def losses_of(threshold: float) -> Losses:
        return np.array([np.mean([value < threshold for value in values]) for values in least])

    return learn_then_test(losses_of, _PRUNE_GRID, alpha, options.delta)


def _certify_stopping(
    regret: Logistic, traced: Sequence[Sequence[Trajectory]], risk: float, options: CalibrationOptions
) -> float | None:
    estimates = [
        [[regret.probability(moment.state) for moment in run.moments] for run in of_question] for of_question in traced
    ]

    def losses_of(threshold: float) -> Losses:
        return np.array(
            [
                np.mean(
                    [
                        run.full_right and not run.right_when_stopped(values, threshold)
                        for run, values in zip(of_question, numbers, strict=True)
                    ]
                )
                for of_question, numbers in zip(traced, estimates, strict=True)
            ]
        )

    certified = learn_then_test(losses_of, _STOP_GRID, risk, options.delta)
    if certified is None:
        return None
    # All candidates up to this one are certified. With few questions the bound lies far above the mean, and with many
    # it lets the mean come close to `risk`: a search should not lose as much as it is allowed to.
    careful = [level for level in _STOP_GRID if level <= certified and losses_of(level).mean() <= _USED_PART * risk]
    return careful[-1] if careful else None
