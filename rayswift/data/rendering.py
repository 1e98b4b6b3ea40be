"""From a Sample to text with the tokenizer's OWN chat template, cut where training starts and stops.

Knows turns and their borders; what a template does is known by `templates`. The cuts become token borders
(`tokenize`), so the prompt's ids are exactly those the server will feed, and the mask cannot be off by a token.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Literal

from rayswift.data.answers import Turn, ends_itself, locate, stands_apart
from rayswift.data.formats import RowError, UnusedRow
from rayswift.data.loss_rule import LossRule
from rayswift.data.media import MARKS
from rayswift.data.templates import apply, check_reasoning, check_tools, special_tokens
from rayswift.data.types import Encoded, Message, Sample

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
    num_media: int = 0
    """Media of the messages that it is made of."""
    media: tuple[Encoded, ...] = ()
    """What stands in place of its placeholders, in order."""

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
        return [Rendered((Segment(whole, 1),), num_media=_num_media(chat))]
    return render_chat(sample, tokenizer, rule)


def render_chat(sample: Sample, tokenizer: PreTrainedTokenizerBase, rule: LossRule = _DEFAULT) -> list[Rendered]:
    """The conversation with the turns of `rule` trained.

    A turn is trained from where the template's generation prompt ends to its end-of-turn token. A template that
    rewrites the past (Qwen3 drops the thoughts of earlier turns) gives one text per turn, each after exactly the
    prompt the server will send then.
    """
    chat, turns = _chat(sample.messages, rule)
    rendered = apply(tokenizer, chat, sample, False)
    check_tools(sample, chat, rendered)
    outside = 1.0 if rule.turns == "all" else 0.0
    wanted = list(_to_be_found(turns, outside, rule))
    if not wanted and not outside:
        raise RowError("has no turn to train on: every `loss` is false")
    if outside:
        check_reasoning(chat, rendered)
    last = _last(tokenizer, chat, sample, rendered, is_wanted=bool(wanted) and wanted[-1].index == len(chat) - 1)
    found = [(turn, _located(tokenizer, chat, turn, sample, last)) for turn in wanted]
    if outside and turns[-1].answers and turns[-1] not in wanted:
        found.append((turns[-1], last))  # its prompt ends in a token, as it does when it is served
    if all(_lies_in(tokenizer, last.text, place, turn, whole=bool(outside)) for turn, place in found):
        spans = [(place.start, place.stop, turn) for turn, place in found]
        return [replace(_cut(tokenizer, last.text, spans, outside, rule), num_media=_num_media(chat))]
    if outside:
        raise RowError(
            "has weights inside turns that the chat template rewrites when others follow; data.loss=all trains "
            "the whole text once, and knows no place for them: use data.loss=default"
        )
    return [
        replace(
            _cut(tokenizer, place.text, [(place.start, place.stop, turn)], 0, rule),
            num_media=_num_media(chat[: turn.index + 1]),
        )
        for turn, place in found
    ]


def _num_media(chat: Sequence[dict[str, Any]]) -> int:
    contents = [str(message.get("content") or "") for message in chat]
    return sum(content.count(mark) for content in contents for mark in MARKS.values())


def prompts_before_answers(sample: Sample, rule: LossRule = _DEFAULT) -> list[list[dict[str, Any]]]:
    """The conversation before each answer that is trained, as the server is sent it: its prompt is trained on too.

    Of a conversation that is trained everywhere, the last: a template may render earlier answers as no server does.
    """
    chat, turns = _chat(sample.messages, rule)
    answers = [turn.index for turn in turns if turn.answers and turn.weight]
    return [chat[:index] for index in (answers[-1:] if rule.turns == "all" else answers)]


def last_answer(sample: Sample) -> tuple[list[dict[str, Any]], dict[str, Any]] | None:
    """The conversation before the last answer, as the server is sent it, and that answer as templates take it.

    None where nobody answers. Whether the answer is trained makes no difference.
    """
    chat, turns = _chat(sample.messages)
    place = max((turn.index for turn in turns if turn.answers), default=None)
    return None if place is None else (chat[:place], chat[place])


def _last(
    tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, Any]], sample: Sample, rendered: str, *, is_wanted: bool
) -> Turn:
    """The last message in the text of all, which is mended where the answer's prompt is another than is rendered."""
    try:
        return locate(tokenizer, chat, len(chat) - 1, sample, rendered)
    except RowError:
        if is_wanted:
            raise
        return Turn(rendered, 0, len(rendered))


def _located(
    tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, Any]], turn: _Turn, sample: Sample, last: Turn
) -> Turn:
    """Where a turn lies in the text that it ends."""
    if turn.index == len(chat) - 1:
        found = last
    else:
        after = apply(tokenizer, chat[: turn.index + 1], sample, False)
        found = locate(tokenizer, chat, turn.index, sample, after)
    check_reasoning([chat[turn.index]], found.text)
    return found


def _lies_in(tokenizer: PreTrainedTokenizerBase, text: str, place: Turn, turn: _Turn, *, whole: bool) -> bool:
    """Whether a turn can be trained within the text of all, and be what it is in its own: the same behind the same
    prompt, ended by a token of its own, with no token across its beginning. `whole`: all of the text is trained."""
    if place.text is text:
        return True
    if not text.startswith(place.text[: place.stop]):
        return False
    if whole or not turn.answers:
        return True
    return ends_itself(tokenizer, place) and stands_apart(tokenizer, text, place.start)


def _to_be_found(turns: Sequence[_Turn], outside: float, rule: LossRule) -> Iterator[_Turn]:
    """The turns that are trained otherwise than the text around them."""
    for turn in turns:
        if turn.weight != outside or (turn.weight and turn.answers and rule.tables):
            yield turn


def _chat(messages: Sequence[Message], rule: LossRule = _DEFAULT) -> tuple[list[dict[str, Any]], list[_Turn]]:
    """Messages as templates take them, and their turns, whose weight is 1 or 0 by `rule` if they say nothing else."""
    chat: list[dict[str, Any]] = []
    weights: list[float] = []
    called: list[dict[str, Any]] = []
    question = max((place for place, message in enumerate(messages) if message.role == "user"), default=-1)
    for place, message in enumerate(messages):
        answers = message.role in ("assistant", "tool_call") and (rule.turns != "last_round" or place > question)
        weight = int(answers or rule.turns == "all") if message.loss is None else message.loss
        if message.role != "tool_call":
            chat.append({"role": message.role, "content": message.content} | _answered(message, called))
            weights.append(weight)
        elif not chat or chat[-1]["role"] != "assistant":
            chat.append({"role": "assistant", "content": ""})
            weights.append(weight)
        if message.role == "tool_call":
            called.append(_call(message.content, place))
            chat[-1].setdefault("tool_calls", []).append(called[-1])
            weights[-1] = max(weights[-1], weight)
        if message.reasoning_content:
            before = chat[-1].get("reasoning_content", "")
            thought = f"{before}\n{message.reasoning_content}".lstrip("\n")
            chat[-1] |= {"reasoning_content": thought, "thinking": thought}  # as gpt-oss calls it
    return chat, [_Turn(i, weights[i], message["role"] == "assistant") for i, message in enumerate(chat)]


def _call(content: str, place: int) -> dict[str, Any]:
    """A tool call as templates take it. Mistral's want an id of nine letters or digits, which a row does not have."""
    return {
        "id": sha256(f"{place} {content}".encode()).hexdigest()[:9], "type": "function",
        "function": json.loads(content),
    }  # fmt: skip


def _answered(message: Message, called: list[dict[str, Any]]) -> dict[str, str]:
    """Which call a tool answers, the first that none has answered; it is taken off the list."""
    if message.role != "tool" or not called:
        return {}
    call = called.pop(0)
    return {"tool_call_id": call["id"], "name": call["function"]["name"]}


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
