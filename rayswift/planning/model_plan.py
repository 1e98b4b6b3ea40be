"""ModelPlan: the ways a model can be cut over workers. Knows no sizes; those are in model_shape.py."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelPlan:
    """For which axes transformers has a plan of this architecture. True where nobody has looked: an engine will say."""

    tp: bool = True
    pp: bool = True
    ep: bool = True
