"""Which tokens end an answer: all that the generation config, the config and the tokenizer call an end.

Knows transformers' three places for it; every engine stops at the same ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


def stop_ids(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, generation: Any) -> tuple[int, ...]:
    """The sorted ids of the tokens that end an answer; `generation` is the generation config's `eos_token_id`."""
    places = (generation, config.get_text_config().eos_token_id, tokenizer.eos_token_id)
    found: set[int] = set()
    for place in places:
        found.update(place if isinstance(place, list) else [] if place is None else [place])
    return tuple(sorted(found))
