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
from sparkray.search.policies.certified import Certified
from sparkray.search.profile import SearchProfile
from sparkray.search.recording import RecordedQuestion, RecordingInfo
from sparkray.search.scorer import Example, PathScorer, fit_scorer
from sparkray.search.trajectories import JudgedQuestion, Trajectory, judge, trajectories

ALPHAS = (0.01, 0.02, 0.05, 0.1, 0.2)
RISKS = (*(round(0.0025 * step, 4) for step in range(4, 13)), 0.04, 0.05, 0.1)
# Candidates run from careful to bold on fixed grids: they must not be chosen by looking at the questions.
_PRUNE_GRID = tuple(float(value) for value in np.geomspace(1e-4, 0.6, 120))
_STOP_GRID = tuple(float(value) for value in np.geomspace(1e-4, 0.6, 120))
_NUM_FOLDS = 4
# Of the risk that is allowed, stopping uses so much on all questions, on average: the rest is kept for new ones.
_USED_PART = 0.1
_MIN_QUESTIONS = 20
# The moments of a question are much alike: there are fewer examples than it seems, and the features overlap.
_REGRET_RIDGE = 10.0

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

    fit_share: float = 0.65
    checkpoints: tuple[int, ...] = tuple(range(4, 129, 4))
    delta: float = 0.1
    wave: int = 4
    num_orders: int = 8
    seed: int = 0


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
    models = _fit(fitting, options)
    # With the roles exchanged: only the mean loss at a stopping level is read from it, which a part of the questions
    # would tell too roughly.
    exchanged = _fit(certifying, options)
    judged = [_judge(models.scorer, question, options) for question in certifying]
    judged_others = [_judge(exchanged.scorer, question, options) for question in fitting]
    prune_below = {alpha: _certify_pruning(models.scorer, certifying, alpha, options) for alpha in ALPHAS}
    stop_below: dict[tuple[float, float], float | None] = {}
    found: dict[float, dict[float, float | None]] = {}
    for alpha, threshold in {0.0: 0.0, **{alpha: value or 0.0 for alpha, value in prune_below.items()}}.items():
        if threshold not in found:
            certifying_replays = models.replays(judged, threshold, options)
            others = exchanged.replays(judged_others, threshold, options)
            found[threshold] = {risk: _certify_stopping(certifying_replays, others, risk, options) for risk in RISKS}
        stop_below.update({(alpha, risk): level for risk, level in found[threshold].items()})
    _log.info("pruning thresholds %s, stopping thresholds %s", prune_below, stop_below)
    return SearchProfile(
        model=info.model,
        temperature=info.temperature,
        tasks=tuple(sorted({question.task for question in questions})),
        scorer=models.scorer,
        regret=models.regret,
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


def _examples(questions: Sequence[RecordedQuestion]) -> list[Example]:
    return [
        Example(path.signals, correct, path.answer is not None, 1 / len(question.paths), question.task)
        for question in questions
        for path, correct in zip(question.paths, question.correct, strict=True)
        if path.num_tokens
    ]


@dataclass(frozen=True, slots=True)
class _Replays:
    """Replays of some questions, and the estimated regret at each of their moments."""

    trajectories: Sequence[Sequence[Trajectory]]
    estimates: Sequence[Sequence[Sequence[float]]]

    def losses(self, stop_below: float) -> Losses:
        """For each question, the part of its replays that lose a right answer by stopping below this level."""
        return np.array(
            [
                np.mean(
                    [
                        run.full_right and not run.right_when_stopped(values, stop_below)
                        for run, values in zip(runs, estimates, strict=True)
                    ]
                )
                for runs, estimates in zip(self.trajectories, self.estimates, strict=True)
            ]
        )


@dataclass(frozen=True, slots=True)
class _Models:
    """What is fitted on a part of the questions."""

    scorer: PathScorer
    regret: Logistic

    def replays(self, judged: Sequence[JudgedQuestion], prune_below: float, options: CalibrationOptions) -> _Replays:
        policy = Certified(self.scorer, prune_below=prune_below, wave=options.wave)
        traced = [trajectories(policy, one) for one in judged]
        estimates = [
            [[self.regret.probability(moment.state) for moment in run.moments] for run in runs] for runs in traced
        ]
        return _Replays(traced, estimates)


def _judge(scorer: PathScorer, question: RecordedQuestion, options: CalibrationOptions) -> JudgedQuestion:
    return judge(scorer, question, num_orders=options.num_orders, seed=options.seed)


def _fit(questions: Sequence[RecordedQuestion], options: CalibrationOptions) -> _Models:
    return _Models(fit_scorer(_examples(questions), options.checkpoints), _fit_regret(questions, options))


def _fit_regret(questions: Sequence[RecordedQuestion], options: CalibrationOptions) -> Logistic:
    # The states of a question come from a scorer that did not see it, as they will on new questions.
    states: list[Features] = []
    regretted: list[bool] = []
    weights: list[float] = []
    for fold in range(_NUM_FOLDS):
        others = [question for number, question in enumerate(questions) if number % _NUM_FOLDS != fold]
        policy = Certified(fit_scorer(_examples(others), options.checkpoints), wave=options.wave)
        for question in questions[fold::_NUM_FOLDS]:
            judged = _judge(policy.scorer, question, options)
            traced = trajectories(policy, judged)
            moments = [(moment, run.full_right) for run in traced for moment in run.moments]
            states.extend(moment.state for moment, _ in moments)
            regretted.extend(full_right and not moment.leader_right for moment, full_right in moments)
            weights.extend([1 / len(moments)] * len(moments))
    return fit_logistic(np.stack(states), np.array(regretted), np.array(weights), _REGRET_RIDGE)


def _certify_pruning(
    scorer: PathScorer, questions: Sequence[RecordedQuestion], alpha: float, options: CalibrationOptions
) -> float | None:
    least = false_prune_losses(scorer, questions)

    def losses_of(threshold: float) -> Losses:
        return np.array([np.mean([value < threshold for value in values]) for values in least])

    return learn_then_test(losses_of, _PRUNE_GRID, alpha, options.delta)


def _certify_stopping(certifying: _Replays, others: _Replays, risk: float, options: CalibrationOptions) -> float | None:
    certified = learn_then_test(certifying.losses, _STOP_GRID, risk, options.delta)
    if certified is None:
        return None

    def mean_loss(level: float) -> float:
        return float(np.concatenate([certifying.losses(level), others.losses(level)]).mean())

    # All levels up to this one are certified. With few questions the bound lies far above the mean, and with many it
    # lets the mean come close to `risk`: a search should not lose as much as it is allowed to. What pruning and weights
    # cost without any stopping is no reason to stop later.
    unstopped = mean_loss(0.0)
    careful = None
    for level in _STOP_GRID:
        if level > certified or mean_loss(level) - unstopped > _USED_PART * risk:
            break
        careful = level
    return careful
