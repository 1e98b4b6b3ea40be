"""Tool calls as Hermes and Qwen2.5 and later write them: `<tool_call>` around JSON. They count twice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from rayswift.data.weighting import Factors


class Hermes:
    """A call is a few tokens of a long answer, and one wrong token of it loses the whole call."""

    table: ClassVar[Mapping[str, Factors]] = {r"<tool_call>.+?</tool_call>": 2.0}
