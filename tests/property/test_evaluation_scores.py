"""Whatever the number and the words are: another value is never right, another spelling of the same always is."""

from __future__ import annotations

from hypothesis import assume, given
from hypothesis import strategies as st

from rayswift.evaluation.scores import agrees, normalised

ARTICLES = {"a", "an", "the"}
WORDS = st.text("bcdefgmnprstxyz", min_size=1, max_size=8)
NUMBERS = st.integers(1, 10**9)
MINUS = st.sampled_from(["-", "\u2212", "\uff0d", "\u2013"])
FORMS = st.sampled_from(["{}", "{} {word}", "{word} = {}", "{word}: {}", "({}) {word}", "{word} is {}."])


@given(form=FORMS, word=WORDS, number=NUMBERS, minus=MINUS, other=MINUS)
def test_a_sign_is_never_lost_and_any_minus_is_one(form: str, word: str, number: int, minus: str, other: str) -> None:
    plain, signed = form.format(number, word=word), form.format(f"{minus}{number}", word=word)
    assert agrees(plain, signed) is False
    assert agrees(signed, plain) is False
    assert agrees(signed, form.format(f"{other}{number}", word=word))


@given(word=WORDS, whole=NUMBERS, part=st.integers(0, 999), places=st.integers(1, 3))
def test_a_decimal_point_is_never_lost(word: str, whole: int, part: int, places: int) -> None:
    decimal = f"{whole}.{part:0{places}} {word}"
    for other in (f"{whole} {part} {word}", f"{whole}{part:0{places}} {word}", f"{whole} {word}"):
        assert agrees(other, decimal) is False
    assert agrees(f"The {whole:,}.{part:0{places}}  {word.upper()}!", decimal)


@given(word=WORDS, number=NUMBERS)
def test_thousands_may_be_parted(word: str, number: int) -> None:
    assert agrees(f"{number:,} {word}", f"{number} {word}")
    assert agrees(f"{number:,}", f"{number}")


@given(
    first=WORDS, second=WORDS, numbers=st.lists(NUMBERS, min_size=2, max_size=3), glue=st.sampled_from("-\u2013\u2010")
)
def test_a_hyphen_between_two_is_a_space(first: str, second: str, numbers: list[int], glue: str) -> None:
    assert agrees(f"{first}{glue}{second}", f"{first} {second}")
    text = [str(number) for number in numbers]
    assert agrees(f"{glue.join(text)} {first}", f"{' - '.join(text)} {first}")
    assert agrees(f"{first}{glue}{text[0]} {second}", f"{first} {text[0]} {second}")


@given(word=WORDS, one=st.sampled_from(["", "+", "-", "++"]), other=st.sampled_from(["", "+", "-", "++"]))
def test_what_ends_a_word_tells_it_from_others(word: str, one: str, other: str) -> None:
    assert agrees(word + one, word + other) is (one == other)


@given(st.text(max_size=60), st.text(max_size=60))
def test_every_text_agrees_with_itself_and_neither_side_matters(text: str, other: str) -> None:
    assume("####" not in text + other)
    assert agrees(text, text) in (True, None)
    assert (normalised(text) == normalised(other)) is (normalised(other) == normalised(text))
