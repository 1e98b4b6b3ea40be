"""Thoughts that are empty: what a template puts before an answer that was given without thinking."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from rayswift.data.weighting import Factors


class IgnoreEmptyThink:
    """Training on them would teach a reasoning model not to reason."""

    table: ClassVar[Mapping[str, Factors]] = {
        r"^\s*<think>\s*</think>\s*": 0.0,
        r"^\s*<seed:think><seed:cot_budget_reflect>[^<]*budget is 0,[^<]*</seed:cot_budget_reflect>\s*"
        r"</seed:think>\s*": 0.0,
        r"^\s*<\|channel>thought\s*<channel\|>": 0.0,
        r"^\s*</think>\s*": 0.0,  # the prompt has opened it already
    }
