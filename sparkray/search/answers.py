r"""Finding the answer in a path's text, in a form in which equal answers are equal.

The answer stands behind the last marker ("The answer is", "Answer:", "####", "\\boxed{}"). Without a marker the last
number, choice, code block or line of a text that ended by itself is taken; of a text that was cut off nothing is,
since a number out of the middle of the work is no answer.
"""

from __future__ import annotations

import re
import textwrap
import unicodedata
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Literal, get_args

from sparkray.errors import InputError, MissingExtraError

AnswerKind = Literal["auto", "number", "choice", "code", "text", "math"]

_MARKER = re.compile(r"(?:final answer|the answer|answer)\s*(?:is\s*:?|:|=)\s*|####\s*", re.IGNORECASE)
_NUMBER = re.compile(
    r"[-+−]?\s?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?(?:\s?/\s?\d+(?!\.?\d))?%?|[-+−]?\.\d+"
)
_CHOICE = re.compile(r"\(([A-Ja-j])\)|(?<![A-Za-z'])([A-J])(?![A-Za-z'])")
_CODE = re.compile(r"```[^\n`]*\n(.*?)```", re.DOTALL)
_MAX_ANSWER_CHARS = 2000


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer: `key` is equal where two answers are, `shown` is how the path wrote it."""

    key: str
    shown: str


def extract_answer(text: str, kind: AnswerKind = "auto", *, complete: bool = True) -> Answer | None:
    """The answer that `text` gives, or None.

    Args:
        text: what one path wrote.
        kind: what an answer looks like; "auto" tries code, number, then text.
        complete: whether the path ended by itself. Of a cut one only a marked answer counts, and only where
            something follows it.

    Raises:
        InputError: an unknown kind.
        MissingExtraError: "math" without the extra `search`.
    """
    if kind not in get_args(AnswerKind):
        raise InputError(
            f"answer kind {kind!r} was given, and one of {', '.join(get_args(AnswerKind))} is expected.",
            param="answer_kind",
        )
    if kind in ("auto", "code"):
        blocks = _CODE.findall(text)
        if blocks:
            return normalise_code(blocks[-1])
        if kind == "code":
            return None
    marked = _marked(text)
    if marked is None and not complete:
        return None
    if marked is None:
        return _unmarked(text, kind)
    if not complete and not re.search(r"[\s.,;!)\]}]$", marked):
        # The cut may have gone through the answer itself.
        return None
    return _read(marked, kind, first=True)


def normalise_number(shown: str) -> Answer | None:
    """A number as an exact fraction: "1,200.50", "2401/2" and "1.2005e3" have one key. None if it is no number."""
    plain = shown.replace(",", "").replace("−", "-").replace(" ", "").rstrip(".")
    scale = Fraction(1)
    if plain.endswith("%"):
        plain, scale = plain[:-1], Fraction(1, 100)
    numerator, slash, denominator = plain.partition("/")
    try:
        top = Decimal(numerator)
        if not top.is_finite() or abs(top.adjusted()) > _MAX_ANSWER_CHARS:
            return None
        value = Fraction(top) * scale
        if slash:
            value /= Fraction(Decimal(denominator))
    except (InvalidOperation, ZeroDivisionError, ValueError):
        return None
    return Answer(str(value), shown.strip())


def normalise_text(shown: str) -> Answer | None:
    """Free text without case, accents' spelling, quotes, articles, outer punctuation and doubled blanks."""
    plain = unicodedata.normalize("NFKC", shown).casefold()
    plain = re.sub(r"[\"'`“”‘’*_]", "", plain)
    plain = re.sub(r"\s*,\s*", ", ", re.sub(r"\s+", " ", plain)).strip(" .,;:!?()[]{}")
    plain = re.sub(r"^(?:the|a|an)\s+", "", plain)
    return Answer(plain[:_MAX_ANSWER_CHARS], shown.strip()) if plain else None


def normalise_code(shown: str) -> Answer | None:
    """Code without outer indentation, trailing blanks, empty lines and whole-line comments."""
    lines = [line.rstrip() for line in textwrap.dedent(shown).splitlines()]
    kept = [line for line in lines if line and not line.lstrip().startswith(("#", "//"))]
    return Answer("\n".join(kept)[:_MAX_ANSWER_CHARS], shown.strip("\n")) if kept else None


def normalise_choice(shown: str) -> Answer | None:
    """A choice of A to J: "(b)", "B." and "B" have one key."""
    found = _CHOICE.search(shown) or re.fullmatch(r"\s*()([A-Ja-j])[\s.)]*", shown)
    if found is None:
        return None
    letter = (found.group(1) or found.group(2)).upper()
    return Answer(letter, letter)


def normalise_math(shown: str) -> Answer | None:
    """An expression in LaTeX or plain notation, as `math-verify` reads it."""
    try:
        from math_verify import parse
    except ModuleNotFoundError as failure:
        raise MissingExtraError.for_module("math_verify", "search") from failure
    # Its time limit needs signals, which only a main thread has.
    parsed = parse(f"${shown}$", parsing_timeout=None) or parse(shown, parsing_timeout=None)
    if not parsed:
        return normalise_text(shown)
    value = parsed[0]
    number = normalise_number(str(value))
    return Answer(number.key if number else str(value), shown.strip())


def _marked(text: str) -> str | None:
    r"""What follows the last marker, up to the end of its line; the inside of the last \\boxed{} comes first."""
    boxed = _boxed(text)
    if boxed is not None:
        return boxed
    found = list(_MARKER.finditer(text))
    if not found:
        return None
    line = text[found[-1].end() :].split("\n", 1)[0]
    return line if line.strip() else None


def _boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed")
    for position in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[begin + 1 : position]
    return None


def _unmarked(text: str, kind: AnswerKind) -> Answer | None:
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        return None
    if kind in ("text", "math"):
        return _read(lines[-1], kind, first=False)
    return _read(text, kind, first=False) or (normalise_text(lines[-1]) if kind == "auto" else None)


def _read(shown: str, kind: AnswerKind, *, first: bool) -> Answer | None:
    """The answer in `shown`; of several numbers or letters the first behind a marker, else the last."""
    shown = shown.strip()[:_MAX_ANSWER_CHARS]
    if kind == "math":
        return normalise_math(shown.rstrip("."))
    if kind == "choice":
        letters = [match.group() for match in _CHOICE.finditer(shown)] or [shown]
        return normalise_choice(letters[0 if first else -1])
    if kind in ("number", "auto"):
        # A marked answer that is not a number and little else is free text: "the answer is ['3', '5']".
        numbers = [match.group() for match in _NUMBER.finditer(shown)]
        if numbers and (kind == "number" or not first or _is_mostly(numbers[0], shown)):
            return normalise_number(numbers[0 if first else -1])
        if kind == "number":
            return None
    return normalise_text(shown) if first or kind == "text" else None


def _is_mostly(number: str, shown: str) -> bool:
    rest = shown.replace(number, "", 1)
    return not re.search(r"\d", rest) and len(re.findall(r"[^\W\d_]+", rest)) <= 3
