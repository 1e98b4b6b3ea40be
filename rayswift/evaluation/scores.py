"""How an answer is compared with the one of its row. Pure rules on two texts; knows no model.

`is_exact`: the same text, white space at the ends apart. `agrees` decides, in this order:

1. The expected answer has a line with `####` (GSM8K), or is nothing but one number with or without a sign of a currency
   or `%`: the last number of both is the same number. `1,000`, `1000` and `1000.0` are.
2. It is short, at most 12 words and 100 characters: both are the same text after NFKC, case folding, and without
   punctuation, the English articles and white space between words.
3. Any other cannot be judged by a rule: None, and it does not count.

What a model thinks before it answers, up to the last `</think>`, is no part of its answer, nor of the expected one.
"""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?"
_NUMBER = re.compile(rf"(?<![\w.,)])-?(?:{_DIGITS}|\.[0-9]+)|{_DIGITS}")
"""A sign counts where no operand stands before it: `5-3` ends in 3."""
_ALONE = re.compile(r"[-+$€£¥\s]*[0-9][0-9,]*(?:\.[0-9]+)?\s*%?\.?")
_FINAL = re.compile(r"^\s*####", re.MULTILINE)
_ARTICLES = {"a", "an", "the"}
_SHORT_WORDS, _SHORT_CHARS = 12, 100


def is_exact(answer: str, expected: str) -> bool:
    """Whether both are the same text, white space at the ends apart."""
    return _said(answer) == _said(expected)


def agrees(answer: str, expected: str) -> bool | None:
    """Whether the answer says what is expected, by the rules above; None where they cannot tell."""
    answer, expected = _said(answer), _said(expected)
    number = last_number(expected)
    if number is not None and (_FINAL.search(expected) or _ALONE.fullmatch(expected)):
        return last_number(answer) == number
    if len(expected) > _SHORT_CHARS or len(expected.split()) > _SHORT_WORDS:
        return None
    return normalised(answer) == normalised(expected)


def last_number(text: str) -> Decimal | None:
    """The last number that stands in a text; None where there is none."""
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def normalised(text: str) -> str:
    """The words of a text without case, punctuation and articles; the text itself where that leaves nothing."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    words = re.sub(r"[^\w\s]|_", " ", folded).split()
    return " ".join(word for word in words if word not in _ARTICLES) or folded.strip()


def _said(text: str) -> str:
    return text.rpartition("</think>")[2].strip()
