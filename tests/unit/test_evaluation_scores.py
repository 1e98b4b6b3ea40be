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
        ("5", "1,5", False, False),
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


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("x = 3", "x = -3"),
        ("x = 3", "x = - 3"),
        ("x + 3", "x - 3"),
        ("3 degrees", "-3 degrees"),
        ("3 degrees", "\u22123 degrees"),
        ("$5 owed", "-$5 owed"),
        ("B-", "B+"),
        ("B", "B-"),
        ("A-", "A+"),
        ("A-", "-"),
        ("< 5", "> 5"),
        ("x < y", "x > y"),
        ("x <= 5", "x >= 5"),
        ("C", "C++"),
        ("Na+", "Na-"),
        ("1 5 km", "1.5 km"),
        ("1,5 km", "1.5 km"),
        ("15 km", "1.5 km"),
        ("5 km", ".5 km"),
        ("Python 3.1", "Python 3.10"),
        ("5", "\u22125"),
        ("5", "-$5"),
    ],
)
def test_another_value_is_not_right(answer: str, expected: str) -> None:
    assert (agrees(answer, expected), agrees(expected, answer)) == (False, False)
    assert agrees(expected, expected)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("\u22125", "-5"),
        ("-5", "$-5.00"),
        ("x = \u22123", "x=-3"),
        ("x = +3", "x = 3"),
        ("+5 degrees", "5 degrees"),
        ("x+3", "x + 3"),
        ("x <= 3", "x \u2264 3"),
        ("well-known", "well known"),
        ("a well\u2010known one", "Well-known one."),
        ("covid-19", "COVID 19"),
        ("3-5 days", "3 - 5 days"),
        ("3\u20135 days", "3-5 days"),
        ("5%-10% more", "5 % - 10 % more"),
        ("$3-$5 each", "$3 - $5 each"),
        ("2024-01-02", "2024 01 02"),
        ("on 01.02.2024", "on 01/02/2024"),
        ("$5 a day", "5 $ a day"),
        ("5% more", "5 % more."),
        ("1,000 km", "1000 km"),
        ("0.5 km", ".5 km"),
        ("3,4 and 5", "3, 4 and 5"),
        ("It is 1.5 km.", "it is 1.5 km"),
        ("<Paris>", "Paris"),
        ("a -> b", "a \u2192 b"),
        ("B- .", "b-"),
        ("A.", "A"),
        ("C ++", "c++"),
    ],
)
def test_another_spelling_is_right(answer: str, expected: str) -> None:
    assert (agrees(answer, expected), agrees(expected, answer)) == (True, True)
