"""ReAct agents: the tool that is chosen and what it is given count twice, what the tool answers does not count.

Source of the weights: ModelScope-Agent, arXiv 2309.00986, section 3.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from rayswift.data.weighting import Factors


class React:
    """`Thought: ... Action: ... Action Input: ... Observation: ... Final Answer: ...`"""

    table: ClassVar[Mapping[str, Factors]] = {
        "Action:": (2.0, 2.0),
        "Action Input:": (2.0, 2.0),
        "Thought:": (1.0, 1.0),
        "Final Answer:": (1.0, 1.0),
        "Observation:": (2.0, 0.0),
    }
