"""Which of transformers' auto classes a model needs, and how transformers is imported: lightly, and with all we train.

Knows no folder and no weights.
"""

from __future__ import annotations

import importlib
import sys
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@cache
def import_transformers() -> None:
    """Import what transformers' auto classes need, without scikit-learn, which it would import for assisted generation
    alone where it is installed: two of the four seconds of CPU that every process starts with."""
    if "sklearn" in sys.modules or "transformers.generation.candidate_generator" in sys.modules:
        return
    modules: dict[str, Any] = sys.modules  # None in it makes an import fail as if the package were not there
    modules["sklearn"] = None
    try:
        importlib.import_module("transformers.generation.candidate_generator")
    finally:
        del modules["sklearn"]


def auto_class(config: PretrainedConfig) -> Any:
    """transformers' auto class for a model: with its towers where it takes more than text, else a causal one."""
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING

    register_parts()
    return AutoModelForMultimodalLM if type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING else AutoModelForCausalLM


@cache
def register_parts() -> None:
    """Models that transformers has as a part of another only: what of an omni model is trained is its thinker."""
    from transformers import AutoConfig, AutoModelForMultimodalLM, Qwen2_5OmniThinkerConfig
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration as Thinker

    AutoConfig.register("qwen2_5_omni_thinker", Qwen2_5OmniThinkerConfig, exist_ok=True)
    AutoModelForMultimodalLM.register(Qwen2_5OmniThinkerConfig, Thinker, exist_ok=True)
