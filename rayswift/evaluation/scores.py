"""How an answer is compared with the one of its row. Pure rules on two texts; knows no model.

`is_exact`: the same text, white space at the ends apart. `agrees` decides, in this order:

1. The expected answer has a line with `####` (GSM8K), or is nothing but one number with or without a sign of a currency
   or `%`: the last number of both is the same number. `1,000`, `1000` and `1000.0` are.
2. It is short, at most 12 words and 100 characters: both are the same text after NFKC, case folding, and without
   punctuation, the English articles and white space between words. What changes a value is no punctuation: the point of
   a decimal (`1.5`, not those of `1.2.3`), `+`, `<`, `>`, `≤`, `≥`, `≠`, `±`, and a `-` that is the sign of a number or
   ends a word, as in `B-`. Punctuation are the `-` of `well-known`, `3-5`, `3 - 5` and `2024-01-02`, a `+` that is only
   the sign of a number, arrows, and brackets as `<these>`. `1,000 km` is `1000 km`.
3. Any other cannot be judged by a rule: None, and it does not count.

A minus, hyphen or en dash of Unicode is a `-` in both. What a model thinks before it answers, up to the last
`</think>`, is no part of its answer, nor of the expected one.
"""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?"
_CURRENCY = r"[$€£¥]"
_SIGN = rf"(?<![\w.,)%°\]}}])(?<![0-9]{_CURRENCY})-(?={_CURRENCY}?\.?[0-9])"
"""A sign counts where no operand stands before it: `5-3` ends in 3."""
_NUMBER = re.compile(rf"((?:{_SIGN})?){_CURRENCY}?({_DIGITS}|(?<![\w.])\.[0-9]+)")
_ALONE = re.compile(rf"[-+$€£¥\s]*(?:{_DIGITS}|\.[0-9]+)\s*%?\.?")
_MINUS = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d", "-"))
_UNSPACED = re.compile(rf"([=<>(]\s*)-\s+(?={_CURRENCY}?\.?[0-9])")
_OF_TEXT = (
    (re.compile(r"[-=]>"), " "),  # arrows
    (re.compile(r"<([^\s<>]+)>"), r" \1 "),
    (re.compile("<="), "≤"),
    (re.compile(">="), "≥"),
    (re.compile("!="), "≠"),
    (re.compile(rf"(^\s*|[=(\[:,;<>≤≥≠]\s*)\+(?=\s*{_CURRENCY}?\.?[0-9])"), r"\1"),
    (re.compile(r"(?<![0-9])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])"), lambda found: found[0].replace(",", "")),
    (re.compile(r"(?<![\w.])\.(?=[0-9])"), "0."),
)
"""What is written in several ways, one after the other."""
_ENDING = rf"(?<=\w)-(?![\w-]|\s*{_CURRENCY}?\.?[0-9])"
_WORD = re.compile(rf"(?<!\.)[0-9]+\.[0-9]+(?!\.?[0-9])[^\W_]*|[^\W_]+|{_SIGN}|{_ENDING}|[+<>≤≥≠±]")
_FINAL = re.compile(r"^\s*####", re.MULTILINE)
_ARTICLE = re.compile(rf"\b(?:a|an|the)\b(?!\+|{_ENDING})")
"""The grades `A+` and `A-` begin with none."""
_SHORT_WORDS, _SHORT_CHARS = 12, 100


def is_exact(answer: str, expected: str) -> bool:
    """Whether both are the same text, white space at the ends apart."""
    return _said(answer) == _said(expected)


def agrees(answer: str, expected: str) -> bool | None:
    """Whether the answer says what is expected, by the rules above; None where they cannot tell."""
    answer, expected = _said(answer), _said(expected).translate(_MINUS)
    number = last_number(expected)
    if number is not None and (_FINAL.search(expected) or _ALONE.fullmatch(expected)):
        return last_number(answer) == number
    if len(expected) > _SHORT_CHARS or len(expected.split()) > _SHORT_WORDS:
        return None
    return normalised(answer) == normalised(expected)


def last_number(text: str) -> Decimal | None:
    """The last number that stands in a text; None where there is none."""
    found = _NUMBER.findall(_UNSPACED.sub(r"\1-", text.translate(_MINUS)))
    return Decimal("".join(found[-1]).replace(",", "")) if found else None


def normalised(text: str) -> str:
    """The words and signs of a text as rule 2 compares them; the text itself where that leaves nothing."""
    folded = unicodedata.normalize("NFKC", text).casefold().translate(_MINUS)
    plain = _UNSPACED.sub(r"\1-", folded.replace("_", " "))
    for written, told in _OF_TEXT:
        plain = written.sub(told, plain)
    words = _WORD.findall(_ARTICLE.sub(" ", plain)) or _WORD.findall(plain)  # a choice may be called A
    return " ".join(words) or folded.strip()


def _said(text: str) -> str:
    return text.rpartition("</think>")[2].strip()
