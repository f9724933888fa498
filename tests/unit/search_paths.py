"""Paths made by hand, and recordings whose signals tell as much about right and wrong as a test wants."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sparkray.search.answers import Answer
from sparkray.search.paths import FinishReason, Lane, Path
from sparkray.search.recording import RecordedQuestion, RecordingInfo
from sparkray.search.signals import COLUMN, empty_signals

INFO = RecordingInfo("toy", temperature=0.7, top_p=1.0, max_tokens=64, num_paths=16, vocab_size=100)


def path(answer: str | None, num_tokens: int = 3, **signals: float | Sequence[float]) -> Path:
    """A path that ended by itself; every signal that is not given is 0."""
    rows = empty_signals(num_tokens)
    rows[:] = 0
    for name, values in signals.items():
        rows[:, COLUMN[name]] = values
    found = None if answer is None else Answer(answer, answer)
    return Path(tuple(range(num_tokens)), rows, f"The answer is {answer}.", found, FinishReason.STOP)


def paths(answers: str, num_tokens: int = 3) -> list[Path]:
    """One path a letter; "-" is a path without an answer."""
    return [path(None if letter == "-" else letter, num_tokens) for letter in answers]


def ended(answers: str) -> list[Lane]:
    """Lanes that ended, one a letter."""
    return [
        Lane(
            index,
            signals=empty_signals(1),
            finish_reason=FinishReason.STOP,
            answer=None if letter == "-" else Answer(letter, letter),
        )
        for index, letter in enumerate(answers)
    ]


def toy_questions(
    count: int, seed: int, *, told: float = 1.0, split: str = "calibration", num_paths: int = 16
) -> list[RecordedQuestion]:
    """Questions of mixed difficulty. A wrong path's entropies lie `told` above those of a right one, from the start."""
    draw = np.random.default_rng(seed)
    questions = []
    for index in range(count):
        right_rate = draw.uniform(0.1, 0.9)
        found, correct = [], []
        for _ in range(num_paths):
            right = bool(draw.random() < right_rate)
            num_tokens = int(draw.integers(10, 30))
            entropy = 1 + 0.5 * draw.standard_normal(num_tokens) + (0 if right else told)
            answer = "right" if right else f"wrong{draw.integers(6)}"
            found.append(path(answer, num_tokens, entropy=entropy.tolist()))
            correct.append(right)
        questions.append(RecordedQuestion("toy", split, index, f"question {index}", tuple(found), tuple(correct)))
    return questions
