"""Thoughts, whole: only what is answered after them is trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from rayswift.data.weighting import Factors


class IgnoreThink:
    """The thoughts of another model may be no model to follow, while its answers are."""

    table: ClassVar[Mapping[str, Factors]] = {
        r"^\s*(<think>)?(?:(?!<think>).)*?</think>\s*": 0.0,
        r"^\s*<seed:think>.*?</seed:think>\s*": 0.0,
        r"^\s*<\|channel>thought.*?<channel\|>": 0.0,
    }
