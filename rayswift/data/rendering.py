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
    """A piece of text whose borders are token borders; `weight` is what predicting each of its tokens counts."""

    text: str
    weight: float


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
    """A message of the chat that is trained on: the assistant's text, its tool calls, or both in one."""

    index: int
    weight: float


_Span = tuple[int, int, float]
"""[start, stop) of what is trained on in a text, and its weight."""


def render(sample: Sample, tokenizer: PreTrainedTokenizerBase, rendering: Rendering) -> list[Rendered]:
    """The training texts of a Sample: one, or one per assistant turn where the template rewrites earlier turns.

    `chat` trains assistant turns (or what `Message.loss` says), `text` every token. Plain text is trained
    everywhere in both. Raises RowError for a row the template refuses, ConfigError without a template.
    """
    if sample.text is not None:
        return [Rendered((Segment(sample.text, 1),), add_special_tokens=True)]
    if rendering == "text":
        chat, _ = _chat(sample.messages)
        whole = _apply(tokenizer, chat, sample, False)
        _check_tools(sample, chat, whole)
        _check_reasoning(chat, whole)
        return [Rendered((Segment(whole, 1),))]
    return render_chat(sample, tokenizer)


def render_chat(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> list[Rendered]:
    """The conversation with its assistant turns trained.

    A turn is trained from where the template's generation prompt ends to its end-of-turn token. A template that
    rewrites the past (Qwen3 drops the thoughts of earlier turns) gives one text per turn, each after exactly the
    prompt the server will send then.
    """
    chat, turns = _chat(sample.messages)
    whole = _apply(tokenizer, chat, sample, False)
    _check_tools(sample, chat, whole)
    spans: list[_Span] = []
    alone: list[Rendered] = []
    for turn in turns:
        after = whole if turn.index == len(chat) - 1 else _apply(tokenizer, chat[: turn.index + 1], sample, False)
        _check_reasoning([chat[turn.index]], after)
        span = (*_span(tokenizer, chat, turn.index, sample, after), turn.weight)
        alone.append(_cut(tokenizer, after, [span]))
        if whole.startswith(after):
            spans.append(span)
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
    """Messages as templates take them, and the turns with a weight: 1 for the assistant's that say nothing else."""
    chat: list[dict[str, Any]] = []
    weights: list[float] = []
    for message in messages:
        answers = message.role in ("assistant", "tool_call")
        weight = int(answers) if message.loss is None else message.loss
        if message.role != "tool_call":
            chat.append({"role": message.role, "content": message.content})
            weights.append(weight)
        elif not chat or chat[-1]["role"] != "assistant":
            chat.append({"role": "assistant", "content": ""})
            weights.append(weight)
        if message.role == "tool_call":
            call = {"type": "function", "function": json.loads(message.content)}
            chat[-1].setdefault("tool_calls", []).append(call)
            weights[-1] = max(weights[-1], weight)
        if message.reasoning_content:
            before = chat[-1].get("reasoning_content", "")
            chat[-1]["reasoning_content"] = f"{before}\n{message.reasoning_content}".lstrip("\n")
    return chat, [_Turn(index, weight) for index, weight in enumerate(weights) if weight]


def _span(
    tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, Any]], index: int, sample: Sample, after: str
) -> tuple[int, int]:
    """[start, stop) of the message `index` in `after`, the text rendered up to and with it."""
    start = _start(tokenizer, chat, index, sample, after) if index else 0
    if start is not None:
        return start, _end_of_turn(tokenizer, after, start)
    marked = _generation_spans(tokenizer, chat[: index + 1], sample)
    if not marked:
        raise RowError(
            f"turn {index + 1} cannot be found in the rendered text: the chat template neither extends the text "
            "of the turns before with its own generation prompt nor marks answers with {% generation %}"
        )
    return marked[-1]


def _start(
    tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, Any]], index: int, sample: Sample, after: str
) -> int | None:
    """Where the message `index` begins in `after`: behind the text of those before it and, for an answer, its header.

    None where the text before is no beginning of `after`, or the template announces answers in other words than it
    renders them in: no cut would then leave a prompt that the server feeds.
    """
    if chat[index]["role"] != "assistant":
        before = _apply(tokenizer, chat[:index], sample, False)
        return len(before) if len(before) < len(after) and after.startswith(before) else None
    prompt = _apply(tokenizer, chat[:index], sample, True)
    if len(prompt) < len(after) and after.startswith(prompt):
        return len(prompt)
    before = _apply(tokenizer, chat[:index], sample, False)
    start = _shared_header(prompt, after, chat[index]["content"])
    return start if after.startswith(before) and len(before) < start < len(after) else None


def _shared_header(prompt: str, after: str, content: str) -> int:
    """Where the header ends that a generation prompt shares with the rendered answer.

    The prompt of the R1 family goes on with `<think>`, which a rendered answer does not have. An answer that happens
    to go on as the prompt does is not cut into.
    """
    pairs = enumerate(zip(prompt, after, strict=False))
    shared = next((place for place, (one, other) in pairs if one != other), min(len(prompt), len(after)))
    place = after.rfind(content.strip()) if content.strip() else -1
    return min(shared, place) if place >= 0 else shared


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, text: str, start: int) -> int:
    """Where a turn that starts at `start` and ends the text stops: right after its end-of-turn token.

    The server stops there too; a newline that the template puts behind it is never generated.
    """
    bare = text.rstrip()
    return len(bare) if len(bare) > start and bare.endswith(_special_tokens(tokenizer)) else len(text)


def _cut(tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[_Span]) -> Rendered:
    """The text in segments. A last answer without an end-of-turn token gets EOS, or the model would never stop."""
    segments: list[Segment] = []
    position = 0
    for start, stop, weight in spans:
        segments += [Segment(text[position:start], 0), Segment(text[start:stop], weight)]
        position = stop
    rest = text[position:]
    eos = tokenizer.eos_token
    if isinstance(eos, str) and not rest.strip() and not text.rstrip().endswith(_special_tokens(tokenizer)):
        last = segments.pop()
        segments.append(Segment(last.text.rstrip("\n") + eos, last.weight))
        rest = ""
    segments.append(Segment(rest, 0))
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


def _check_reasoning(chat: Sequence[dict[str, Any]], text: str) -> None:
    """As `_check_tools`. Of several turns the last is enough: a template may drop what was thought earlier."""
    thoughts = [message["reasoning_content"].strip() for message in chat if "reasoning_content" in message]
    if thoughts and thoughts[-1] not in text:
        raise RowError("has `reasoning_content`, which the tokenizer's chat template does not render")


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
