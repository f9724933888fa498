"""Finding answers: marked, unmarked, cut off, and equal where they mean the same."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkray.errors import InputError
from sparkray.search.answers import extract_answer, normalise_number


def key(text: str, kind: str = "auto", **how: bool) -> str | None:
    found = extract_answer(text, kind, **how)  # type: ignore[arg-type]
    return None if found is None else found.key


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("24 + 13 = 37. The answer is 37.", "37"),
        ("The answer is 4. No: the answer is 5.", "5"),
        ("#### 1,200.50", "2401/2"),
        ("so it is \\boxed{\\frac{1}{2}} and \\boxed{12}", "12"),
        ("first 3, then 4, at last 7", "7"),
        ("The answer is -8", "-8"),
        ("The answer is −8", "-8"),
        ("Answer: 50%", "1/2"),
        ("The answer is 3/4.", "3/4"),
        ("The answer is 1e3", "1000"),
        ("no digits here", None),
        ("", None),
    ],
)
def test_numbers(text: str, expected: str | None) -> None:
    assert key(text, "number") == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The answer is (b).", "B"),
        ("I think C", "C"),
        ("Answer: D) because A is wrong", "D"),
        ("A bee", "A"),
        ("", None),
    ],
)
def test_choices(text: str, expected: str | None) -> None:
    assert key(text, "choice") == expected


def test_code_ignores_comments_indentation_and_blank_lines() -> None:
    one = "```python\n    def f(x):\n        return x\n```"
    two = "Look:\n```\n# twice\ndef f(x):\n\n    return x   \n```\nDone."
    assert key(one) == key(two) == "def f(x):\n    return x"
    assert key("no block", "code") is None


def test_free_text_is_normalised() -> None:
    assert key("The answer is: The  'Eiffel Tower'.", "text") == key("Answer: eiffel tower", "text") == "eiffel tower"
    assert key("I do not know.\nParis", "text") == "paris"


def test_mathematics_is_compared_as_such() -> None:
    pytest.importorskip("math_verify")
    assert key("\\boxed{\\frac{1}{2}}", "math") == key("\\boxed{0.5}", "math") == "1/2"
    assert key("\\boxed{x+1}", "math") == key("\\boxed{1+x}", "math")
    assert key("\\boxed{x+1}", "math") != key("\\boxed{x+2}", "math")


def test_of_a_cut_text_only_a_marked_and_closed_answer_counts() -> None:
    assert key("24 + 13 = 37", "number", complete=False) is None
    assert key("The answer is 3", "number", complete=False) is None
    assert key("The answer is 37.", "number", complete=False) == "37"


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(InputError, match="'poem' was given, and one of auto, number"):
        extract_answer("x", "poem")  # type: ignore[arg-type]


@pytest.mark.parametrize("shown", ["1/0", "e", "1e999999999", "--3", "nan", "inf", ""])
def test_what_is_no_number(shown: str) -> None:
    assert normalise_number(shown) is None


@given(st.integers(-(10**15), 10**15))
def test_every_spelling_of_a_whole_number_has_one_key(value: int) -> None:
    spellings = [f"{value}", f"{value:,}", f"{value}.0", f"{value}/1"]
    assert {key(f"The answer is {shown}", "number") for shown in spellings} == {str(value)}


@given(st.text(max_size=300), st.sampled_from(["auto", "number", "choice", "code", "text"]), st.booleans())
def test_any_text_has_an_answer_or_none(text: str, kind: str, complete: bool) -> None:
    found = extract_answer(text, kind, complete=complete)  # type: ignore[arg-type]
    assert found is None or found.key
