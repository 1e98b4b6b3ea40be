"""From messages or text to token ids, with the model folder's own tokenizer and chat template, as in training.

Knows transformers' tokenizers; knows no model and no engine.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rayswift.data.templates import chat_text
from rayswift.serving.api_errors import ApiError
from rayswift.serving.openai import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PromptBuilder:
    """Turns what clients send into token ids. Safe to call from several threads; the tokenizer itself is not."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer, self._lock = tokenizer, threading.Lock()

    def chat(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a conversation that the model is to continue. Raises ApiError when the template refuses it."""
        if not self._tokenizer.chat_template:
            raise ApiError(
                "this model has no chat template; use /v1/completions", param="messages", code="no_chat_template"
            )
        return self.turns([{"role": _template_role(m.role), "content": m.content} | _named(m) for m in messages])

    def turns(self, turns: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """The ids of a conversation in the words that chat templates take, tool calls and tools included."""
        from jinja2 import TemplateError

        with self._lock:
            try:
                text = chat_text(self._tokenizer, turns, tools, generation_prompt=True)
            except TemplateError as error:
                raise ApiError(
                    f"messages: the model's chat template refuses this conversation: {error}",
                    param="messages",
                    code="invalid_value",
                ) from None
            ids = self._encode(text, add_special_tokens=False)
        if not ids:
            raise ApiError(
                "messages: the model's chat template makes no prompt of this conversation",
                param="messages",
                code="invalid_value",
            )
        return ids

    def text(self, prompt: str | list[int]) -> list[int]:
        """The ids of a plain prompt, begun as the tokenizer begins a text. Ids are checked and taken as they are."""
        if isinstance(prompt, str):
            with self._lock:
                ids = self._encode(prompt, add_special_tokens=True)
        else:
            ids = prompt
        if not ids:
            raise ApiError("prompt: must not be empty", param="prompt", code="invalid_value")
        if max(ids) >= len(self._tokenizer):
            raise ApiError(
                f"prompt: token ids must be below {len(self._tokenizer)}", param="prompt", code="invalid_value"
            )
        return ids

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        # verbose=False: a prompt that is too long is refused by name later, not warned about in a log
        encoded = self._tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)
        return list(encoded["input_ids"])


def _template_role(role: str) -> str:
    return "system" if role == "developer" else role


def _named(message: Message) -> dict[str, str]:
    return {} if message.name is None else {"name": message.name}
