"""Requests to the replica whose cache has most of their prompt: Ray's prefix-aware router over token ids.

Fronts have the prompt as the engine gets it, so a prefix here is exactly what the engine's cache of keys and values
holds. Knows Ray Serve's request router; is named in `placement.routing_options` and loaded by Serve in each front.
"""

from __future__ import annotations

from typing import Any

# The public name imports vLLM or SGLang, which no front has. (ray 2.60)
from ray.llm._internal.serve.routing_policies.prefix_aware.prefix_aware_router import PrefixCacheAffinityRouter

from rayswift.serving.engine import Request

_MAX_IDS = 8192
"""Tokens of a prompt that are compared: a tree of long prompts costs memory, and its look-up time."""
_FIRST, _SURROGATES, _NUM_SURROGATES = 0x20, 0xD800, 0x800


class PrefixRouter(PrefixCacheAffinityRouter):
    """Ray's router, which compares texts, given the ids of a prompt as one character each."""

    def _extract_text_from_request(self, pending_request: Any) -> str | None:  # type: ignore[override]
        """What is compared; None for a call that is no request for an answer, which goes by load."""
        first = pending_request.args[0]
        return as_text(first.prompt.ids) if isinstance(first, Request) else None


def as_text(ids: tuple[int, ...]) -> str:
    """A text with one character per token id, equal where the ids are."""
    return "".join(map(_character, ids[:_MAX_IDS]))


def _character(number: int) -> str:
    place = number + _FIRST
    return chr(place if place < _SURROGATES else place + _NUM_SURROGATES)
