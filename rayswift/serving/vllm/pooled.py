"""An embedding model in vLLM: what its pooling is called there, and how a text's vector is asked for.

The pooling is the one that `models/pooling.py` reads, told to vLLM outright: what vLLM does not know in a folder it
replaces by its own default for the architecture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from rayswift.errors import ConfigError
from rayswift.models.pooling import Mode, Pooling
from rayswift.serving.engine import Embedding, EngineOptions

if TYPE_CHECKING:
    import numpy as np

_TYPES: Mapping[Mode, str] = {"cls": "CLS", "mean": "MEAN", "last": "LAST"}


def arguments(pooling: Pooling, options: EngineOptions) -> dict[str, Any]:
    """What vLLM's engine is given beside the rest. Raises ConfigError for options that go with answers alone."""
    from vllm.config import PoolerConfig

    if options.adapters:
        raise ConfigError("are for models that generate, and this one embeds", path="adapters", fix="leave them out")
    return {
        "runner": "pooling",
        "pooler_config": PoolerConfig(seq_pooling_type=_TYPES[pooling.mode], use_activation=pooling.normalize),
    }


def embedding(pooling: Pooling, model_config: Any) -> Embedding:
    """What the vectors of a started engine are like."""
    return Embedding(int(model_config.embedding_size), pooling.is_matryoshka, pooling.dimensions)


async def vector(llm: Any, ids: Sequence[int], num_dims: int | None, request_id: str) -> np.ndarray:
    """The vector of a text in float32, of length 1 where the model is trained so. Raises what vLLM raises."""
    from vllm import PoolingParams

    params = PoolingParams(task="embed", dimensions=num_dims)
    async with aclosing(llm.encode({"prompt_token_ids": list(ids)}, params, request_id)) as outputs:
        async for output in outputs:
            found: np.ndarray = output.outputs.data.float().numpy()
            return found
    raise AssertionError("vLLM ended without a vector")
