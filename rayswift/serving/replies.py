"""How answers are written: the bodies and stream chunks of the two completion routes, and server-sent events.

Pure functions over what engines return. Knows nothing of requests, models or HTTP.
"""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic_core import to_json

from rayswift.serving.calls import CallReader
from rayswift.serving.engine import INCOMPLETE, Delta, FinishReason, TokenLogprob
from rayswift.serving.tools import Call, Calling

DONE = b"data: [DONE]\n\n"


@dataclass
class Answer:
    """One choice as it grows."""

    index: int
    calling: Calling | None = None
    thought_end: str | None = None
    """What ends the thought that its prompt has begun."""
    num_chars: int = 0
    """Of the tokens whose log-probabilities are told so far: their text may be held back."""
    num_tokens: int = 0
    said: str = ""
    """The text without the calls in it."""
    calls: list[Call] = field(default_factory=list)
    news: tuple[str, list[Call]] = ("", [])
    """What the last delta added to `said` and to `calls`."""

    def __post_init__(self) -> None:
        self._reader = None if self.calling is None else CallReader(self.calling, self.thought_end)
        self._deltas = list[Delta]()

    def add(self, delta: Delta) -> None:
        """Take in what was generated next."""
        self._deltas.append(delta)
        self.num_chars += _num_chars(delta)
        self.num_tokens += delta.num_tokens
        self.news = (delta.text, [])
        if self._reader is not None:
            self.news = self._reader.feed(delta.text, is_last=delta.finish_reason is not None)
        self.said += self.news[0]
        self.calls += self.news[1]

    @property
    def whole(self) -> Delta:
        """All that the engine has sent so far, as one."""
        logprobs = itertools.chain.from_iterable(delta.logprobs for delta in self._deltas)
        text = "".join(delta.text for delta in self._deltas)
        return Delta(text, self.num_tokens, self._reason, tuple(logprobs))

    @property
    def finish_reason(self) -> str | None:
        """Why it ended, as the API says it: to have called the one function that was named is no reason of its own."""
        is_named = self.calling is not None and self.calling.is_named
        return "tool_calls" if self.calls and self._reason == "stop" and not is_named else self._reason

    @property
    def _reason(self) -> FinishReason | None:
        return self._deltas[-1].finish_reason if self._deltas else None


@dataclass(frozen=True)
class Reply:
    """The identity all parts of one reply share, and how they are written. `chat` picks the route's shape."""

    model: str
    chat: bool
    created: int = field(default_factory=lambda: int(time.time()))
    unique: str = field(default_factory=lambda: uuid.uuid4().hex)
    version: str | None = None
    """Of the export that answers: what OpenAI calls the system's fingerprint."""

    @property
    def id(self) -> str:
        """The reply's id, as clients quote it."""
        return f"{'chatcmpl' if self.chat else 'cmpl'}-{self.unique}"

    def body(self, answers: Sequence[Answer], usage: dict[str, int]) -> dict[str, Any]:
        """The whole reply, for a request without a stream."""
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._head(kind), "choices": [self._choice(answer) for answer in answers], "usage": usage}

    def opening(self, index: int) -> dict[str, Any] | None:
        """The first chunk of a choice, which names the role; text completions have none."""
        return (
            self._chunk([_chat_choice(index, {"role": "assistant", "content": ""}, None, None)]) if self.chat else None
        )

    def chunk(self, answer: Answer, delta: Delta) -> dict[str, Any] | None:
        """The chunk for what `answer` has just got, `delta` being counted in already; None while it is held back."""
        if not self.chat:
            return self._chunk([_text_choice(answer.index, delta, answer.num_chars - _num_chars(delta))])
        said, made = answer.news
        if not (said or made or delta.finish_reason or delta.logprobs):
            return None
        told: dict[str, Any] = {"content": said} if said or not made else {}
        if made:
            first = len(answer.calls) - len(made)
            told["tool_calls"] = [{"index": first + number, **call.body()} for number, call in enumerate(made)]
        return self._chunk([_chat_choice(answer.index, told, answer.finish_reason, _chat_logprobs(delta))])

    def closing(self, usage: dict[str, int]) -> dict[str, Any]:
        """The last chunk, with the token counts and no choice."""
        return {**self._chunk([]), "usage": usage}

    def _choice(self, answer: Answer) -> dict[str, Any]:
        delta = answer.whole
        if not self.chat:
            return _text_choice(answer.index, delta, 0)
        message: dict[str, Any] = {"role": "assistant", "content": answer.said, "refusal": None}
        if answer.calls:
            message |= {"content": answer.said or None, "tool_calls": [call.body() for call in answer.calls]}
        choice = _chat_choice(answer.index, {}, answer.finish_reason, _chat_logprobs(delta))
        del choice["delta"]
        return {**choice, "message": message}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head("chat.completion.chunk" if self.chat else "text_completion"), "choices": choices}

    def _head(self, kind: str) -> dict[str, Any]:
        named = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return {**named, "system_fingerprint": self.version}


def usage(answers: Sequence[Answer], num_prompt_tokens: int) -> dict[str, int]:
    """Token counts of a reply; a prompt with several answers is counted once."""
    completion = sum(answer.num_tokens for answer in answers)
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": num_prompt_tokens + completion,
    }


def event(document: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + to_json(document) + b"\n\n"


def model_card(name: str, created: int, max_model_len: int, parent: str | None = None) -> dict[str, Any]:
    """One entry of /v1/models, with the tokens of prompt and answer together; `parent` is what an adapter changes."""
    card = {"id": name, "object": "model", "created": created, "owned_by": "rayswift", "max_model_len": max_model_len}
    return card if parent is None else {**card, "parent": parent}


def _chat_choice(
    index: int, delta: dict[str, Any], finish_reason: str | None, logprobs: dict[str, Any] | None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def _text_choice(index: int, delta: Delta, offset: int) -> dict[str, Any]:
    logprobs = _text_logprobs(delta.logprobs, offset) if delta.logprobs else None
    return {"index": index, "text": delta.text, "logprobs": logprobs, "finish_reason": delta.finish_reason}


def _chat_logprobs(delta: Delta) -> dict[str, Any] | None:
    if not delta.logprobs:
        return None
    content = [
        {**_scored(item.token, item.logprob), "top_logprobs": [_scored(token, value) for token, value in item.top]}
        for item in delta.logprobs
    ]
    return {"content": content, "refusal": None}


def _scored(token: str, logprob: float) -> dict[str, Any]:
    # A token that is part of a character has no text of its own, so its bytes are not known here.
    known = None if INCOMPLETE in token else list(token.encode())
    return {"token": token, "logprob": logprob, "bytes": known}


def _num_chars(delta: Delta) -> int:
    return sum(item.num_chars for item in delta.logprobs)


def _text_logprobs(items: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
    offsets = list(itertools.accumulate((item.num_chars for item in items[:-1]), initial=offset))
    return {
        "tokens": [item.token for item in items],
        "token_logprobs": [item.logprob for item in items],
        # The chosen token is always among them, as in OpenAI's API, so there may be one more than was asked for.
        "top_logprobs": [dict(item.top) | {item.token: item.logprob} for item in items],
        "text_offset": offsets,
    }
