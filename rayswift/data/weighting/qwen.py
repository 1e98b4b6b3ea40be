"""Tool calls as Qwen-Agent writes them for Qwen and Qwen2: the function and its arguments count twice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from rayswift.data.weighting import Factors


class Qwen:
    """What the tool answers (`RESULT`) is not the model's own."""

    table: ClassVar[Mapping[str, Factors]] = {
        "✿FUNCTION✿:": (2.0, 2.0),
        "✿ARGS✿:": (2.0, 2.0),
        "✿RESULT✿:": (2.0, 0.0),
        "✿RETURN✿:": (1.0, 1.0),
    }
