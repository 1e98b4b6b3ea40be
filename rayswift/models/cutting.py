"""For which ways of cutting a model transformers has a plan, read from its config class without building anything.

Loads transformers, which takes seconds: asked only where a layout cuts a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rayswift.planning.model_plan import ModelPlan


def model_plan(config: Mapping[str, Any]) -> ModelPlan:
    """The plans that transformers has for the architecture of a parsed config.json, or for the language model in it."""
    classes = [found for name in _types(config) if (found := _config_class(name)) is not None]
    classes += [nested for found in classes if (nested := found.sub_configs.get("text_config")) is not None]
    return ModelPlan(
        tp=any(getattr(found, "base_model_tp_plan", None) for found in classes),
        pp=any(getattr(found, "base_model_pp_plan", None) for found in classes),
        ep=any(getattr(found, "base_model_ep_plan", None) for found in classes),
    )


def _types(config: Mapping[str, Any]) -> list[str]:
    nested = config.get("text_config")
    inner = nested.get("model_type") if isinstance(nested, Mapping) else None
    return [str(name) for name in (config.get("model_type"), inner) if name]


def _config_class(model_type: str) -> Any:
    """The config class of an architecture; None for one that this transformers does not know."""
    from transformers import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[model_type]
    except KeyError:
        return None
