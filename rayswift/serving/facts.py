"""What a version's engine says of itself, and what of it clients would miss in another one."""

from __future__ import annotations

from dataclasses import dataclass

from rayswift.serving.engine import CONTEXT_STEP, Embedding


@dataclass(frozen=True)
class Facts:
    """What an engine says of itself once it is started."""

    max_model_len: int
    takes_media: bool
    can_constrain: bool
    embedding: Embedding | None
    chat_takes: frozenset[str]
    """As `PromptBuilder.chat_takes`."""

    def lacks(self, live: Facts) -> str | None:
        """What clients of the live version would be refused by this one, for which no counter would tell."""
        if (self.embedding is None) != (live.embedding is None):
            return "it makes answers and the live version vectors, or the other way round"
        if self.embedding and live.embedding:
            lack = _vectors_lack(self.embedding, live.embedding)
        else:
            lack = self._answers_lack(live)
        if lack is None and self._is_shorter(live):
            return f"its context has {self.max_model_len} tokens beside {live.max_model_len}"
        return lack

    def _is_shorter(self, live: Facts) -> bool:
        """Whether it takes fewer tokens, by more than chance.

        Two fits into the same memory may fall on either side of a multiple of the step, of the same model: a candidate
        cannot help that, and to start it again may change it. So one step less is nothing where it may be fitted.
        """
        by_chance = 0 if self.max_model_len % CONTEXT_STEP else CONTEXT_STEP
        return self.max_model_len + by_chance < live.max_model_len

    def _answers_lack(self, live: Facts) -> str | None:
        if live.takes_media and not self.takes_media:
            return "it takes text only, and the live version images or sounds"
        if live.can_constrain and not self.can_constrain:
            return "it keeps no answer to a JSON Schema, and the live version does"
        if live.chat_takes and not self.chat_takes:
            return "it has no chat template, and the live version has one"
        if lost := live.chat_takes - self.chat_takes:
            return f"its chat template does without {' and '.join(sorted(lost))}, which the live version's takes"
        return None


def _vectors_lack(mine: Embedding, live: Embedding) -> str | None:
    if mine.num_dims != live.num_dims:
        return f"its vectors have {mine.num_dims} numbers beside {live.num_dims}"
    lost = [length for length in range(1, live.num_dims) if live.admits(length) and not mine.admits(length)]
    return f"its vectors cannot be cut to {lost[0]} numbers, and the live version's can" if lost else None
