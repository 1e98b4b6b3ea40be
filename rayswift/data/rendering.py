"""From a Sample to text with the tokenizer's OWN chat template, cut where training starts and stops.

Knows turns and their borders; what a template does is known by `templates`. The cuts become token borders
(`tokenize`), so the prompt's ids are exactly those the server will feed, and the mask cannot be off by a token.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from rayswift.data.formats import RowError, UnusedRow
from rayswift.data.loss_rule import LossRule
from rayswift.data.templates import apply, check_reasoning, check_tools, generation_spans, special_tokens
from rayswift.data.types import Message, Sample

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

Rendering = Literal["text", "chat"]


@dataclass(frozen=True)
class Segment:
    """A piece of text whose borders are token borders; `weight` is what predicting each of its tokens counts.

    `factors` multiply the weight, one per character; None stands for ones.
    """

    text: str
    weight: float
    factors: np.ndarray | None = field(default=None, compare=False)


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
    answers: bool


_Span = tuple[int, int, _Turn]
"""[start, stop) of a turn in a text."""
_DEFAULT = LossRule()


def render(
    sample: Sample, tokenizer: PreTrainedTokenizerBase, rendering: Rendering, rule: LossRule = _DEFAULT
) -> list[Rendered]:
    """The training texts of a Sample: one, or one per assistant turn where the template rewrites earlier turns.

    `chat` trains the turns that `rule` (or `Message.loss`) says, `text` every token. Plain text is trained
    everywhere in both. Raises RowError for a row the template refuses, ConfigError without a template.
    """
    if sample.label is False:
        raise UnusedRow("is labelled as an answer not to give, which this method would teach to give")
    if sample.text is not None:
        return [Rendered((Segment(sample.text, 1),), add_special_tokens=True)]
    if rendering == "text":
        chat, _ = _chat(sample.messages)
        whole = apply(tokenizer, chat, sample, False)
        check_tools(sample, chat, whole)
        check_reasoning(chat, whole)
        return [Rendered((Segment(whole, 1),))]
    return render_chat(sample, tokenizer, rule)


def render_chat(sample: Sample, tokenizer: PreTrainedTokenizerBase, rule: LossRule = _DEFAULT) -> list[Rendered]:
    """The conversation with the turns of `rule` trained.

    A turn is trained from where the template's generation prompt ends to its end-of-turn token. A template that
    rewrites the past (Qwen3 drops the thoughts of earlier turns) gives one text per turn, each after exactly the
    prompt the server will send then.
    """
    chat, turns = _chat(sample.messages, rule)
    whole = apply(tokenizer, chat, sample, False)
    check_tools(sample, chat, whole)
    outside = 1.0 if rule.turns == "all" else 0.0
    spans: list[_Span] = []
    alone: list[Rendered] = []
    for turn in _to_be_found(turns, outside, rule):
        after = whole if turn.index == len(chat) - 1 else apply(tokenizer, chat[: turn.index + 1], sample, False)
        check_reasoning([chat[turn.index]], after)
        span = (*_span(tokenizer, chat, turn.index, sample, after), turn)
        alone.append(_cut(tokenizer, after, [span], 0, rule))
        if whole.startswith(after):
            spans.append(span)
    if not alone and not outside:
        raise RowError("has no turn to train on: every `loss` is false")
    if len(spans) < len(alone) and outside:
        raise RowError(
            "has weights inside turns that the chat template rewrites when others follow; data.loss=all trains "
            "the whole text once, and knows no place for them: use data.loss=default"
        )
    return [_cut(tokenizer, whole, spans, outside, rule)] if len(spans) == len(alone) else alone


def _to_be_found(turns: Sequence[_Turn], outside: float, rule: LossRule) -> Iterator[_Turn]:
    """The turns that are trained otherwise than the text around them."""
    for turn in turns:
        if turn.weight != outside or (turn.weight and turn.answers and rule.tables):
            yield turn


def _chat(messages: Sequence[Message], rule: LossRule = _DEFAULT) -> tuple[list[dict[str, Any]], list[_Turn]]:
    """Messages as templates take them, and their turns, whose weight is 1 or 0 by `rule` if they say nothing else."""
    chat: list[dict[str, Any]] = []
    weights: list[float] = []
    question = max((place for place, message in enumerate(messages) if message.role == "user"), default=-1)
    for place, message in enumerate(messages):
        answers = message.role in ("assistant", "tool_call") and (rule.turns != "last_round" or place > question)
        weight = int(answers or rule.turns == "all") if message.loss is None else message.loss
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
    return chat, [_Turn(i, weights[i], message["role"] == "assistant") for i, message in enumerate(chat)]


def _span(
    tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, Any]], index: int, sample: Sample, after: str
) -> tuple[int, int]:
    """[start, stop) of the message `index` in `after`, the text rendered up to and with it."""
    start = _start(tokenizer, chat, index, sample, after) if index else 0
    if start is not None:
        return start, _end_of_turn(tokenizer, after, start)
    marked = generation_spans(tokenizer, chat[: index + 1], sample)
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
        before = apply(tokenizer, chat[:index], sample, False)
        return len(before) if len(before) < len(after) and after.startswith(before) else None
    prompt = apply(tokenizer, chat[:index], sample, True)
    if len(prompt) < len(after) and after.startswith(prompt):
        return len(prompt)
    before = apply(tokenizer, chat[:index], sample, False)
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
    return len(bare) if len(bare) > start and bare.endswith(special_tokens(tokenizer)) else len(text)


def _cut(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[_Span], outside: float, rule: LossRule
) -> Rendered:
    """The text in segments, `outside` the weight of what is in no span.

    A last answer without an end-of-turn token gets EOS, or the model would never stop.
    """
    pieces: list[tuple[str, float, bool]] = []
    position = 0
    for start, stop, turn in spans:
        pieces += [(text[position:start], outside, False), (text[start:stop], turn.weight, turn.answers)]
        position = stop
    rest = text[position:]
    eos = tokenizer.eos_token
    if isinstance(eos, str) and not rest.strip() and not text.rstrip().endswith(special_tokens(tokenizer)) and pieces:
        last, weight, answers = pieces.pop()
        pieces.append((last.rstrip("\n") + eos, weight, answers))
        rest = ""
    pieces.append((rest, outside, False))
    return Rendered(tuple(_segment(tokenizer, *piece, rule) for piece in pieces if piece[0]))


def _segment(tokenizer: PreTrainedTokenizerBase, text: str, weight: float, answers: bool, rule: LossRule) -> Segment:
    if not (answers and weight and rule.tables):
        return Segment(text, weight)
    ends = (len(token) for token in special_tokens(tokenizer) if text.endswith(token))
    return Segment(text, weight, rule.factors(text, len(text) - max(ends, default=0)))
