"""Answers to the questions of rows and what they are worth: generated here, as the local engine serves them.

Greedy, from the prompt that is served and trained on, several at a time. Knows nothing of endpoints (`endpoint.py`).
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from rayswift.data.formats import RowError
from rayswift.errors import RaySwiftError, ServeError
from rayswift.evaluation.report import Answered, Answers
from rayswift.evaluation.rows import Question
from rayswift.evaluation.scores import agrees, is_exact
from rayswift.serving.api_errors import ApiError
from rayswift.serving.engine import Delta, EngineOptions, Request, Sampling
from rayswift.serving.prompts import PromptBuilder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rayswift.serving.local.loop import DecodeLoop

_SHOWN, _SHOWN_CHARS = 5, 400
_ALIVE_S = 5.0
_IN_FLIGHT = 2 * EngineOptions.max_concurrency
_Event = tuple[int, Delta | RaySwiftError]


@dataclass(frozen=True)
class Reply:
    """A model's answer. `cut`: it was not finished after so many tokens."""

    text: str
    cut: bool = False


def scored(questions: Sequence[Question], replies: Sequence[Reply | str], not_asked: Sequence[str]) -> Answers:
    """What the replies are worth; a reply that is a text alone is the reason why there is none."""
    pairs = [(question, reply) for question, reply in zip(questions, replies, strict=True) if isinstance(reply, Reply)]
    failed = [f"{question.place}: {reply}" for question, reply in zip(questions, replies, strict=True)
              if isinstance(reply, str)]  # fmt: skip
    exact = [is_exact(reply.text, question.expected) for question, reply in pairs]
    agreed = [agrees(reply.text, question.expected) for question, reply in pairs]
    judged = [one for one in agreed if one is not None]
    reasons = [*not_asked, *failed]
    return Answers(
        num_answered=len(pairs),
        num_exact=sum(exact),
        exact_match=sum(exact) / len(exact) if exact else None,
        num_judged=len(judged),
        num_agreed=sum(judged),
        accuracy=sum(judged) / len(judged) if judged else None,
        num_cut=sum(reply.cut for _, reply in pairs),
        num_unanswered=len(reasons),
        unanswered=tuple(reasons[:_SHOWN]),
        shown=tuple(
            Answered(row=question.place, expected=question.expected[-_SHOWN_CHARS:], answer=reply.text[-_SHOWN_CHARS:],
                     exact=same, agrees=like)
            for (question, reply), same, like in list(zip(pairs, exact, agreed, strict=True))[:_SHOWN]
        ),
    )  # fmt: skip


def answer(
    model: PreTrainedModel,
    folder: str,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    max_new_tokens: int,
) -> list[Reply | str]:
    """The model's greedy answer to each question, or why it has none. `folder` has its tokenizer and processor.

    A failure costs its own answers. Raises ConfigError for a model that the local engine cannot decode.
    """
    from rayswift.serving.engines.local import open_loop

    opened = open_loop(model, folder, EngineOptions())
    encoder = opened.media_encoder
    prompts = PromptBuilder(tokenizer, encoder)

    def request(question: Question) -> Request | str:
        try:
            encoded = encoder.encode(question.sample, question.file) if encoder and question.num_media else ()
            shown = slice(question.num_media)
            prompt = prompts.conversation(question.chat, question.tools, question.sample.media[shown], encoded[shown])
        except (ApiError, RowError) as error:
            return str(error)
        room = min(max_new_tokens, opened.max_model_len - len(prompt.ids))
        if room < 1:
            return (
                f"its prompt has {len(prompt.ids)} tokens, and the model takes {opened.max_model_len} with the answer"
            )
        return Request(question.place, prompt, Sampling(max_new_tokens=room, temperature=0))

    opened.loop.start()
    try:
        return _answers(opened.loop, questions, request)
    finally:
        opened.loop.close()


def _answers(
    loop: DecodeLoop, questions: Sequence[Question], request_of: Callable[[Question], Request | str]
) -> list[Reply | str]:
    """The replies in the order of the questions; few more are prepared than are being answered, media are large."""
    events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
    replies: list[Reply | str] = [""] * len(questions)
    texts: dict[int, str] = {}
    left = iter(range(len(questions)))
    while True:
        while len(texts) < _IN_FLIGHT and (number := next(left, None)) is not None:
            request = request_of(questions[number])
            if isinstance(request, str):
                replies[number] = request
            else:
                texts[number] = ""
                loop.submit(request, _into(events, number))
        if not texts:
            return replies
        number, event = _next(loop, events)
        if isinstance(event, RaySwiftError):
            del texts[number]
            replies[number] = str(event)
            continue
        texts[number] += event.text
        if event.finish_reason is not None:
            replies[number] = Reply(texts.pop(number), cut=event.finish_reason == "length")


def _into(events: queue.SimpleQueue[_Event], number: int) -> Callable[[Delta | RaySwiftError], None]:
    def put(number: int, event: Delta | RaySwiftError) -> None:
        events.put((number, event))

    return partial(put, number)


def _next(loop: DecodeLoop, events: queue.SimpleQueue[_Event]) -> _Event:
    """The next event. Raises ServeError when the loop has ended and none can come."""
    while True:
        try:
            return events.get(timeout=_ALIVE_S)
        except queue.Empty:
            if not loop.is_alive:
                raise ServeError("the decode thread has ended before all answers were there") from None
