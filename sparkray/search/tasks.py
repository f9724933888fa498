"""Tasks with questions that are made by rule and answers that are scored by rule (reasoning-gym).

A task is a generator of reasoning-gym at settings that a small model can half do, with a prompt of worked examples.
Calibration and held-out questions are dealt from one pool by a fixed seed, so that they are exchangeable.
"""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sparkray.errors import InternalError, MissingExtraError, NotFoundError
from sparkray.search.answers import Answer, AnswerKind

SPLITS = ("calibration", "held_out")
STOP = ("\n",)
"""Where a path ends: answers stand on one line."""

_SEED = 20_001
# Half of them for each split.
_POOL_QUESTIONS = 200
_NUM_DRAWS = 8_000

Scorer = Callable[[Answer], bool]
"""Whether an answer is right."""


@dataclass(frozen=True, slots=True)
class TaskQuestion:
    """One question: what to ask, and whether an answer is right."""

    index: int
    text: str
    prompt: str
    is_right: Scorer


@dataclass(frozen=True, slots=True)
class Task:
    """A generator at fixed settings.

    Attributes:
        generator: its name in reasoning-gym.
        settings: its settings.
        answer_kind: what answers look like.
        examples: worked questions, shown before every question.
        pattern: finds what the question is about in the generator's text, whose wording varies.
        question: how it is asked; `{0}`, `{1}` are the pattern's groups.
    """

    name: str
    generator: str
    settings: Mapping[str, Any]
    answer_kind: AnswerKind
    pattern: str
    question: str
    examples: tuple[tuple[str, str], ...]

    def prompt(self, question: str) -> str:
        """The prompt of a question: the worked examples, then the question."""
        worked = "".join(f"Question: {asked}\nAnswer: {answer}\n\n" for asked, answer in self.examples)
        return f"{worked}Question: {question}\nAnswer:"

    def questions(self, split: str, count: int) -> list[TaskQuestion]:
        """`count` different questions of a split; the same every time, and none of them in both splits.

        The splits are dealt from one pool of different questions in a random order that is fixed, calibration from its
        front and held-out from its back. Drawing them one after the other would not do: where easy questions are few,
        the first split uses them up, and what was calibrated on it would not hold for the second.

        Raises:
            NotFoundError: a split that is neither "calibration" nor "held_out", or fewer different questions than
                asked for.
            MissingExtraError: reasoning-gym is not installed.
        """
        if split not in SPLITS:
            raise NotFoundError(f"there is no split {split!r}; there are {' and '.join(SPLITS)}.", param="split")
        pool = self._pool()
        limit = len(pool) // 2
        if count > limit:
            raise NotFoundError(
                f"{count} questions of the task {self.name} were asked for in the split {split!r}, and there are "
                f"{limit}.",
                param="count",
            )
        dealt = pool[:count] if split == "calibration" else pool[::-1][:count]
        return [TaskQuestion(index, text, self.prompt(text), scorer) for index, (text, scorer) in enumerate(dealt)]

    def _pool(self) -> list[tuple[str, Scorer]]:
        """Different questions and how their answers are scored, in the order in which they are dealt."""
        dataset = _create(self.generator, {**self.settings, "size": _NUM_DRAWS, "seed": _SEED})
        found: dict[str, Scorer] = {}
        for number in range(_NUM_DRAWS):
            if len(found) == _POOL_QUESTIONS:
                break
            entry = dataset[number]
            found.setdefault(self._question(entry["question"]), _scorer(dataset, entry))
        pool = list(found.items())
        random.Random(f"{_SEED} {self.name}").shuffle(pool)
        return pool

    def _question(self, text: str) -> str:
        found = re.search(self.pattern, text)
        if found is None:
            raise InternalError(f"the pattern of the task {self.name} does not fit the question {text!r}.")
        return self.question.format(*(" ".join(piece.split()) for piece in found.groups()))


def find_task(name: str) -> Task:
    """The packaged task called `name`.

    Raises:
        NotFoundError: there is none.
    """
    for task in TASKS:
        if task.name == name:
            return task
    raise NotFoundError(f"there is no task {name!r}; there are {', '.join(task.name for task in TASKS)}.", param="task")


def answer_kinds() -> dict[str, AnswerKind]:
    """The kind of answer of every packaged task."""
    return {task.name: task.answer_kind for task in TASKS}


def _scorer(dataset: Any, entry: Mapping[str, Any]) -> Scorer:
    return lambda answer: bool(dataset.score_answer(answer.shown, entry) >= 0.999)


def _create(generator: str, settings: Mapping[str, Any]) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            import reasoning_gym
    except ModuleNotFoundError as failure:
        raise MissingExtraError.for_module("reasoning_gym", "search") from failure
    return reasoning_gym.create_dataset(generator, **settings)


TASKS = (
    Task(
        name="chain_sum",
        generator="chain_sum",
        settings={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
        answer_kind="number",
        pattern=r"(\d+ [-+] \d+)",
        question="What is {0}?",
        examples=(
            ("What is 24 + 13?", "24 + 13 = 37."),
            ("What is 7 - 12?", "7 - 12 = -5."),
            ("What is 58 + 6?", "58 + 6 = 64."),
            ("What is 40 - 9?", "40 - 9 = 31."),
        ),
    ),
    Task(
        name="products",
        generator="products",
        settings={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
        answer_kind="number",
        pattern=r"(\d+) \* (\d+)",
        question="What is {0} * {1}?",
        examples=(
            ("What is 3 * 6?", "3 * 6 = 18."),
            ("What is 20 * 4?", "20 * 4 = 80."),
            ("What is 7 * 9?", "7 * 9 = 63."),
            ("What is 5 * 12?", "5 * 12 = 60."),
        ),
    ),
    Task(
        name="gcd",
        generator="gcd",
        settings={"min_value": 2, "max_value": 20},
        answer_kind="number",
        pattern=r"(\d+), (\d+)",
        question="What is the greatest common divisor of {0} and {1}?",
        examples=(
            ("What is the greatest common divisor of 12 and 18?", "6 * 2, 6 * 3: 6."),
            ("What is the greatest common divisor of 10 and 5?", "5 * 2, 5 * 1: 5."),
            ("What is the greatest common divisor of 9 and 14?", "1 * 9, 1 * 14: 1."),
            ("What is the greatest common divisor of 4 and 10?", "2 * 2, 2 * 5: 2."),
        ),
    ),
    Task(
        name="simple_equations",
        generator="simple_equations",
        settings={
            "min_terms": 2,
            "max_terms": 2,
            "min_value": 1,
            "max_value": 8,
            "operators": ("+", "*"),
            "operators_weights": (0.5, 0.5),
        },
        answer_kind="number",
        pattern=r"([0-9a-z*]+(?: [-+*] [0-9a-z*]+)* = -?\d+)",
        question="Solve {0}.",
        examples=(
            ("Solve 3*x + 5 = 20.", "3*x = 20 - 5 = 15. x = 15 / 3 = 5."),
            ("Solve 2*y + 1 = 7.", "2*y = 7 - 1 = 6. y = 6 / 2 = 3."),
            ("Solve 7*a = 14.", "a = 14 / 7 = 2."),
        ),
    ),
    Task(
        name="letter_counting",
        generator="letter_counting",
        settings={"min_words": 1, "max_words": 2},
        answer_kind="number",
        pattern=r'letter "(.)" appear in the text: "(.*?)"',
        question='How many times does "{0}" appear in "{1}"?',
        examples=(
            ('How many times does "e" appear in "green"?', "g, r, e, e, n: 2."),
            ('How many times does "a" appear in "banana"?', "b, a, n, a, n, a: 3."),
            ('How many times does "o" appear in "dog"?', "d, o, g: 1."),
        ),
    ),
    Task(
        name="number_sequence",
        generator="number_sequence",
        settings={"min_terms": 4, "max_terms": 5, "min_value": 0, "max_value": 10, "max_complexity": 1},
        answer_kind="number",
        pattern=r"((?:-?\d+, )+)\?",
        question="{0} ?",
        examples=(
            ("2, 4, 6, 8, ?", "8 + 2 = 10."),
            ("20, 17, 14, 11, ?", "11 - 3 = 8."),
            ("1, 2, 4, 8, ?", "8 * 2 = 16."),
            ("5, 5, 5, 5, ?", "5 + 0 = 5."),
        ),
    ),
)
