"""From a Sample to text with the tokenizer's OWN chat template, cut where training starts and stops.

Knows templates and special tokens. The cuts become token borders (`tokenize`), so the prompt's ids are exactly
those the server will feed, and the mask cannot be off by a token. Loads neither torch nor transformers itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, cast

from rayswift.data.formats import RowError
from rayswift.data.types import Message, Sample
from rayswift.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Rendering = Literal["text", "chat"]


@dataclass(frozen=True)
class Segment:
    """A piece of text that is tokenized by itself; `trained` says whether its tokens are predicted in training."""

    text: str
    trained: bool


@dataclass(frozen=True)
class Rendered:
    """One training text, its segments in order. `add_special_tokens`: a plain document, which gets BOS and EOS."""

    segments: tuple[Segment, ...]
    add_special_tokens: bool = False

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(segment.text for segment in self.segments)


@dataclass(frozen=True)
class _Turn:
    """Consecutive messages of the assistant that a template renders as one: a text, tool calls, or both."""

    index: int
    trained: bool


def render(sample: Sample, tokenizer: PreTrainedTokenizerBase, rendering: Rendering) -> list[Rendered]:
    """The training texts of a Sample: one, or one per assistant turn where the template rewrites earlier turns.

    `chat` trains assistant turns (or what `Message.loss` says), `text` every token. Plain text is trained
    everywhere in both. Raises RowError for a row the template refuses, ConfigError without a template.
    """
    if sample.text is not None:
        return [Rendered((Segment(sample.text, True),), add_special_tokens=True)]
    if rendering == "text":
        chat, _ = _chat(sample.messages)
        return [Rendered((Segment(_apply(tokenizer, chat, sample, False), True),))]
    return render_chat(sample, tokenizer)


def render_chat(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> list[Rendered]:
    """The conversation with its assistant turns trained.

    A turn is trained from where the template's generation prompt ends to its end-of-turn token. A template that
    rewrites the past (Qwen3 drops the thoughts of earlier turns) gives one text per turn, each after exactly the
    prompt the server will send then.
    """
    chat, turns = _chat(sample.messages)
    whole = _apply(tokenizer, chat, sample, False)
    if sample.tools or any("tool_calls" in message for message in chat):
        _check_tools(sample, chat, whole)
    spans: list[tuple[int, int]] = []
    alone: list[Rendered] = []
    for turn in turns:
        if not turn.trained:
            continue
        after = whole if turn.index == len(chat) - 1 else _apply(tokenizer, chat[: turn.index + 1], sample, False)
        start, stop = _span(tokenizer, chat, turn.index, sample, after)
        alone.append(_cut(tokenizer, after, [(start, stop)]))
        if whole.startswith(after):
            spans.append((start, stop))
    if not alone:
        raise RowError("has no turn to train on: every `loss` is false")
    return [_cut(tokenizer, whole, spans)] if len(spans) == len(alone) else alone


def require_chat_template(tokenizer: PreTrainedTokenizerBase, *, path: str = "model.path") -> None:
    """Raises ConfigError when conversations cannot be rendered."""
    if not tokenizer.chat_template:
        raise ConfigError(
            "has a tokenizer without a chat template",
            path=path,
            value=tokenizer.name_or_path,
            fix="add chat_template.jinja to the folder, or train plain text with method.name=pretrain",
        )


def _chat(messages: Sequence[Message]) -> tuple[list[dict[str, Any]], list[_Turn]]:
    """Messages as templates take them, and the trained or untrained turns: by default the assistant's are trained."""
    chat: list[dict[str, Any]] = []
    trained: list[bool] = []
    for message in messages:
        wanted = message.role in ("assistant", "tool_call") if message.loss is None else message.loss
        if message.role != "tool_call":
            chat.append({"role": message.role, "content": message.content})
            trained.append(wanted)
            continue
        if not chat or chat[-1]["role"] != "assistant":
            chat.append({"role": "assistant", "content": ""})
            trained.append(wanted)
        chat[-1].setdefault("tool_calls", []).append({"type": "function", "function": json.loads(message.content)})
        trained[-1] = trained[-1] or wanted
    turns = [_Turn(i, trained[i]) for i in range(len(chat)) if trained[i] or chat[i]["role"] == "assistant"]
    return chat, turns


def _span(
    tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, Any]], index: int, sample: Sample, after: str
) -> tuple[int, int]:
    """[start, stop) of the message `index` in `after`, the text rendered up to and with it."""
    answers = chat[index]["role"] == "assistant"
    for generation_prompt in (True, False) if answers else (False,):
        before = _apply(tokenizer, chat[:index], sample, generation_prompt) if index else ""
        if len(before) < len(after) and after.startswith(before):
            return len(before), _end_of_turn(tokenizer, after, len(before))
    marked = _generation_spans(tokenizer, chat[: index + 1], sample)
    if not marked:
        raise RowError(
            f"turn {index + 1} cannot be found in the rendered text: the chat template neither extends the text "
            "of the turns before nor marks answers with {% generation %}"
        )
    return marked[-1]


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, text: str, start: int) -> int:
    """Where a turn that starts at `start` and ends the text stops: right after its end-of-turn token.

    The server stops there too; a newline that the template puts behind it is never generated.
    """
    bare = text.rstrip()
    return len(bare) if len(bare) > start and bare.endswith(_special_tokens(tokenizer)) else len(text)


def _cut(tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[tuple[int, int]]) -> Rendered:
    """The text in segments. A last answer without an end-of-turn token gets EOS, or the model would never stop."""
    segments: list[Segment] = []
    position = 0
    for start, stop in spans:
        segments += [Segment(text[position:start], False), Segment(text[start:stop], True)]
        position = stop
    rest = text[position:]
    eos = tokenizer.eos_token
    if isinstance(eos, str) and not rest.strip() and not text.rstrip().endswith(_special_tokens(tokenizer)):
        last = segments.pop()
        segments.append(Segment(last.text.rstrip("\n") + eos, True))
        rest = ""
    segments.append(Segment(rest, False))
    return Rendered(tuple(segment for segment in segments if segment.text))


def _apply(
    tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, Any]], sample: Sample, generation_prompt: bool
) -> str:
    from jinja2.exceptions import TemplateError

    if not tokenizer.chat_template:
        require_chat_template(tokenizer)
    tools: Any = list(sample.tools) or None
    try:
        text = tokenizer.apply_chat_template(chat, tools=tools, tokenize=False, add_generation_prompt=generation_prompt)
    except (TemplateError, TypeError, ValueError) as error:
        raise RowError(f"is refused by the chat template: {error}") from error
    assert isinstance(text, str)
    return text


def _generation_spans(
    tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, Any]], sample: Sample
) -> list[tuple[int, int]]:
    """What the template itself marks as generated, by transformers' own rendering of `{% generation %}`."""
    template = tokenizer.chat_template
    if not isinstance(template, str) or "generation" not in template:
        return []
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered: Any = render_jinja_template(  # annotated as text, returns texts and spans
        [chat],
        tools=list(sample.tools) or None,
        chat_template=template,
        return_assistant_tokens_mask=True,
        **cast(Any, tokenizer.special_tokens_map),
    )
    spans = rendered[1]
    return [(int(start), int(stop)) for start, stop in spans[0]] if spans else []


def _check_tools(sample: Sample, chat: list[dict[str, Any]], text: str) -> None:
    """A template that knows no tools drops them silently; the model would learn calls it was never offered."""
    for name in _tool_names(sample, chat):
        if name not in text:
            raise RowError(f"has the tool {name!r}, which the tokenizer's chat template does not render")


def _tool_names(sample: Sample, chat: list[dict[str, Any]]) -> Iterator[str]:
    for tool in sample.tools:
        yield str(tool.get("function", {}).get("name", ""))
    for message in chat:
        for call in message.get("tool_calls", ()):
            yield str(call["function"]["name"])


@lru_cache(maxsize=8)
def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Kept per tokenizer object: listing the 256 added tokens of Llama 3 costs more than rendering a row."""
    added = tokenizer.added_tokens_decoder.values()
    return tuple({*tokenizer.all_special_tokens, *(token.content for token in added if token.special)})
