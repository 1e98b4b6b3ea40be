"""From messages or text to token ids and features, with the model folder's own tokenizer, chat template and processor.

The path is that of training. Knows transformers' tokenizers; knows no model and no engine.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from rayswift.data.formats import RowError, one_row
from rayswift.data.templates import chat_text
from rayswift.data.types import Encoded, Medium
from rayswift.serving.api_errors import ApiError, too_long
from rayswift.serving.calls import thought_end
from rayswift.serving.engine import Prompt
from rayswift.serving.messages import Message
from rayswift.serving.tools import OPEN, Calling, is_readable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rayswift.data.media.encoder import MediaEncoder

_MAX_MEDIA = 8
_LONG_CHARS, _PIECE_CHARS = 8, 2**14
"""Characters per token from which on a text is counted in pieces first, and how long a piece is."""
_BEFORE = "a\n"
"""What an answer follows where its ids are looked for: some tokenizers put a space before the first word of a text."""
_SETTINGS = {"data.media.max_bytes": "max_media_bytes", "data.media.max_pixels": "max_media_pixels",
             "data.media.max_audio_seconds": "max_media_seconds"}  # fmt: skip
"""What a bound is called in a serve spec, by its name in a job."""


class PromptBuilder:
    """Turns what clients send into prompts. Safe to call from several threads; the tokenizer itself is not."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        encoder: MediaEncoder | None = None,
        max_media: int = _MAX_MEDIA,
        max_tokens: int | None = None,
        num_ids: int | None = None,
    ) -> None:
        """`num_ids` is how many ids the model has vectors for; unless given, those of the tokenizer."""
        self._tokenizer, self._encoder, self._max_media = tokenizer, encoder, max_media
        self._max_tokens = max_tokens
        self._given_num_ids = num_ids
        self._lock = threading.Lock()

    @property
    def takes_media(self) -> bool:
        """Whether there may be more than text in a conversation."""
        return self._encoder is not None and self._max_media > 0

    @property
    def chat_takes(self) -> frozenset[str]:
        """Which of `messages`, `tools` and a free `tool_choice` the chat template lets a request have."""
        template = str(self._tokenizer.chat_template or "")
        tools = "tools" in template
        reads = tools and is_readable(template) and OPEN not in self._hidden
        known = {"messages": bool(template), "tools": tools, "tool_choice": reads}
        return frozenset(name for name, is_known in known.items() if is_known)

    @cached_property
    def _hidden(self) -> frozenset[str]:
        """The special tokens, which engines leave out of an answer's text, and with them marks that are such tokens."""
        return frozenset(token.content for token in self._tokenizer.added_tokens_decoder.values() if token.special)

    def calling(self, calling: Calling | None) -> Calling | None:
        """The same tools, with calls that are demanded written as this model was trained to, where that can be read."""
        return calling and replace(calling, is_written="tool_choice" in self.chat_takes)

    def chat(self, messages: Sequence[Message], calling: Calling | None = None) -> Prompt:
        """The conversation that the model is to continue, told of the tools it may call.

        Raises ApiError when template or processor refuse it.
        """
        if not self._tokenizer.chat_template:
            raise ApiError(
                "this model has no chat template; use /v1/completions", param="messages", code="no_chat_template"
            )
        self._check_tools(calling)
        turns = [{"role": _template_role(m.role), "content": m.content.text} | _extras(m) for m in messages]
        found = [(f"messages[{i}].content", one) for i, m in enumerate(messages) for one in m.content.media]
        if found and len(found) > self._max_media:
            raise _refusal(found[self._max_media][0], f"more than {self._max_media} images or sounds in one request")
        encoded = [self._encoded(place, medium) for place, medium in found]
        return self.conversation(
            turns, calling.for_template() if calling else (), [medium for _, medium in found], encoded
        )

    def _check_tools(self, calling: Calling | None) -> None:
        """Raises ApiError for tools that the template would drop without a word, or whose calls nobody could read."""
        if calling is None:
            return
        if "tools" not in self.chat_takes:
            raise _refusal("tools", "this model's chat template knows no tools")
        if calling.demanded is None and "tool_choice" not in self.chat_takes:
            raise _refusal(
                "tool_choice", "this model writes calls in a way that this server cannot read; demand a call"
            )

    def turns(self, turns: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """The ids of a conversation in the words that chat templates take, tool calls and tools included."""
        return list(self.conversation(turns, tools).ids)

    def _encoded(self, place: str, medium: Medium) -> Encoded:
        if self._encoder is None:
            raise _refusal(place, "this model is served with text only")
        assert isinstance(medium.source, bytes), "a request brings its files with it"
        content = medium.source
        if not content or len(content) > (limit := self._encoder.spec.max_bytes):
            raise _refusal(place, f"a file of more than max_media_bytes={limit}" if content else "an empty file")
        try:
            with one_row():
                decoded = self._encoder.decoded(medium.kind, content)  # takes long: texts are read meanwhile
                with self._lock:
                    return self._encoder.encoded(medium.kind, decoded)
        except RowError as error:
            raise _refusal(place, _in_own_words(str(error), _SETTINGS)) from None

    def conversation(
        self,
        turns: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] = (),
        media: Sequence[Medium] = (),
        encoded: Sequence[Encoded] = (),
    ) -> Prompt:
        """As `turns`, with media in the order of their marks, encoded. Raises ApiError as `chat` does."""
        with self._lock:
            text = self._rendered(turns, tools)
            try:
                prompt = self._filled(text, media, encoded)
            except (RowError, ValueError) as error:  # how processors say that they do not take a medium
                raise _refusal("messages", str(error)) from None
        if not prompt.ids:
            raise _refusal("messages", "the model's chat template makes no prompt of this conversation")
        self._check_ids(prompt.ids, "messages")
        end = thought_end(text)
        return prompt if end is None or end in self._hidden else replace(prompt, thought_end=end)

    def _rendered(self, turns: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> str:
        """The conversation as the template writes it. Raises ApiError for whatever the template raises."""
        from jinja2 import TemplateError

        try:
            return chat_text(self._tokenizer, turns, tools, generation_prompt=True)
        except TemplateError as error:  # its words are the template's own, for whoever asks
            raise _refusal("messages", f"the model's chat template refuses this conversation: {error}") from None
        except Exception as error:  # other people's code too: what a conversation provokes in it cannot be listed
            what = f"the model's chat template cannot write this conversation ({type(error).__name__})"
            raise _refusal("messages", what) from error

    def _filled(self, text: str, media: Sequence[Medium], encoded: Sequence[Encoded]) -> Prompt:
        if self._encoder is None:
            return Prompt(tuple(self._encode(text, "messages", add_special_tokens=False)))
        self._check_length(text, "messages")
        found = self._encoder.prompt(text, media, encoded)
        return Prompt(tuple(found.input_ids), found.media, found.rope_AT)

    def text(self, prompt: str | list[int], place: str = "prompt") -> Prompt:
        """A plain prompt, begun as the tokenizer begins a text. Ids are checked and taken as they are.

        `place` is what the client calls it, in a refusal.
        """
        if isinstance(prompt, str):
            with self._lock:
                ids = self._encode(prompt, place, add_special_tokens=True)
        else:
            ids = prompt
        if not ids:
            raise _refusal(place, "must not be empty")
        kept = self._placeholders
        if found := kept.keys() & set(ids):
            raise _refusal(place, f"has {kept[min(found)]}, which stands for a medium; use /v1/chat/completions")
        self._check_ids(ids, place)
        return Prompt(tuple(ids))

    @cached_property
    def _placeholders(self) -> dict[int, str]:
        """The tokens that stand for media, by id. Their vectors are not read, and some models have none for them."""
        return {} if self._encoder is None else {number: token for token, number in self._encoder.placeholders.items()}

    def _check_ids(self, ids: Sequence[int], place: str) -> None:
        """Raises ApiError for an id without a vector: engines die of it, with all that they were answering.

        Tokens that were added to a tokenizer and not to its model have such ids.
        """
        known = len(self._tokenizer) if self._given_num_ids is None else self._given_num_ids
        found = max((one for one in ids if one not in self._placeholders), default=0)
        if found >= known:
            told = self._tokenizer.convert_ids_to_tokens(found) if found < len(self._tokenizer) else None
            what = f"has the token {told}, of which this model knows nothing; " if told else ""
            raise _refusal(place, f"{what}token ids must be below {known}, and {found} is not")

    def answer_ids(self, text: str) -> list[int]:
        """The ids of an answer, as they follow a prompt: behind another text they say this one, if any such ids do."""
        with self._lock:
            before = self._tokens(_BEFORE, add_special_tokens=False)
            behind = self._tokens(_BEFORE + text, add_special_tokens=False)
            alone = self._tokens(text, add_special_tokens=False)
            ways = [alone, behind[len(before) :]] if behind[: len(before)] == before else [alone]
            said = self._decode(before) + text
            return next((ids for ids in ways if self._decode(before + ids) == said), alone)

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _check_length(self, text: str, place: str) -> None:
        """Raises ApiError for a text that is far too long, after about as much work as the longest that fits takes.

        Tokenizing all of it would cost seconds, in which nobody else gets a prompt. A cut between pieces makes a token
        or two more, for which there is room in the margin; what comes close to the limit is counted as a whole.
        """
        if self._max_tokens is None or len(text) <= _LONG_CHARS * self._max_tokens:
            return
        count = 0
        for start in range(0, len(text), _PIECE_CHARS):
            count += len(self._tokens(text[start : start + _PIECE_CHARS], add_special_tokens=False))
            if count > self._max_tokens * 5 // 4 + 64:
                raise too_long(f"the prompt has more than {self._max_tokens} tokens", self._max_tokens, place)

    def _encode(self, text: str, place: str, *, add_special_tokens: bool) -> list[int]:
        self._check_length(text, place)
        return self._tokens(text, add_special_tokens=add_special_tokens)

    def _tokens(self, text: str, *, add_special_tokens: bool) -> list[int]:
        # verbose=False: a prompt that is too long is refused by name later, not warned about in a log
        encoded = self._tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)
        return list(encoded["input_ids"])


def _refusal(place: str, rule: str) -> ApiError:
    return ApiError(f"{place}: {rule}", param=place, code="invalid_value")


def _in_own_words(text: str, names: Mapping[str, str]) -> str:
    for job_name, own in names.items():
        text = text.replace(job_name, own)
    return text


def _template_role(role: str) -> str:
    return "system" if role == "developer" else role


def _extras(message: Message) -> dict[str, Any]:
    """What a message has beside role and content."""
    calls = [call.for_template() for call in message.tool_calls]
    found = {"name": message.name, "tool_calls": calls or None, "tool_call_id": message.tool_call_id}
    return {key: value for key, value in found.items() if value is not None}
