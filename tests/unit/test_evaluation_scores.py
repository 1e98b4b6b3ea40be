"""How answers are compared: cases written by hand."""

from __future__ import annotations

from decimal import Decimal

import pytest

from rayswift.evaluation.scores import agrees, is_exact, last_number, normalised

LONG = "It depends on what is meant, since the word has more than one meaning in this sentence."


@pytest.mark.parametrize(
    ("answer", "expected", "exact", "agreed"),
    [
        ("Paris", "Paris", True, True),
        (" Paris\n", "Paris", True, True),
        ("paris.", "Paris", False, True),
        ("The Paris", "Paris", False, True),
        ("Paris, France", "Paris", False, False),
        ("42", "42", True, True),
        ("So it is 42.", "42", False, True),
        ("42 or 43", "42", False, False),
        ("none", "42", False, False),
        ("$1,000.00", "1000", False, True),
        ("12%", "12 %", False, True),
        ("-3", "3", False, False),
        ("5-3", "3", False, True),
        ("She has 5+4=9\n#### 9", "First 5, then 4 more: 5+4=<<5+4=9>>9\n#### 9", False, True),
        ("She has 5+4=9, so nine", "First 5, then 4 more.\n#### 9", False, True),
        ("#### 9\nthat is 8", "First 5, then 4 more.\n#### 9", False, False),
        ("#### 70000", "Much.\n#### 70,000", False, True),
        ("Apollo 13", "Apollo 11", False, False),
        ("apollo 11!", "Apollo 11", False, True),
        (LONG, LONG, True, None),
        ("yes", LONG, False, None),
        ("<think>\n17?\n</think>\n\n42", "42", True, True),
        ("+", "+", True, True),
        ("-", "+", False, False),
        ("", "+", False, False),
    ],
)
def test_exact_and_agreeing(answer: str, expected: str, exact: bool, agreed: bool | None) -> None:
    assert (is_exact(answer, expected), agrees(answer, expected)) == (exact, agreed)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("no number", None),
        ("1, 2 and 3", "3"),
        ("1,234,567.5 people", "1234567.5"),
        ("it is -7.", "-7"),
        ("20-5=15", "15"),
        ("20-5", "5"),
        ("version 1.2.3", "3"),
        ("half is .5", "0.5"),
        ("(2)1,000", "1000"),
    ],
)
def test_the_last_number(text: str, number: str | None) -> None:
    assert last_number(text) == (None if number is None else Decimal(number))


def test_a_text_is_normalised_to_its_words() -> None:
    assert normalised("The  \uff21\uff22C's, an_end!") == "abc s end"
