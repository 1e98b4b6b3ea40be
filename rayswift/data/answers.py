"""Where a turn lies in a rendered text: behind exactly the prompt that the server sends then, up to its end of turn.

Knows the ways in which templates announce an answer otherwise than they render one, and mends the text there: what
stands before an answer is what will stand before it when the model is served. Knows no weights.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from rayswift.data.formats import RowError
from rayswift.data.templates import apply, generation_spans, special_tokens
from rayswift.data.types import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Chat = list[dict[str, Any]]
_OPENED = re.compile(r"<(?P<name>think|thinking|reasoning|thought)>\s*$")
"""A thought that a generation prompt opens, as DeepSeek-R1's does."""
_WINDOW = 16  # characters on either side of a border


@dataclass(frozen=True)
class Turn:
    """A text that a message ends, and [start, stop) of what is said in it, the end-of-turn token included."""

    text: str
    start: int
    stop: int


def locate(tokenizer: PreTrainedTokenizerBase, chat: Chat, index: int, sample: Sample, after: str) -> Turn:
    """The message `index` in its text, which is `after`, the chat rendered up to and with it, or is mended from it.

    Raises RowError where it cannot be found.
    """
    text, start = (after, 0) if not index else _behind_its_prompt(tokenizer, chat, index, sample, after)
    if start is not None:
        return Turn(text, start, _end_of_turn(tokenizer, text, start))
    marked = generation_spans(tokenizer, chat[: index + 1], sample)
    if not marked:
        raise RowError(
            f"turn {index + 1} cannot be found in the rendered text: the chat template neither extends the text "
            "of the turns before with its own generation prompt nor marks answers with {% generation %}"
        )
    return Turn(after, *marked[-1])


def ends_itself(tokenizer: PreTrainedTokenizerBase, turn: Turn) -> bool:
    """Whether a turn's own text has a token that ends it, so that a model learns to stop there."""
    return turn.text[turn.start : turn.stop].endswith(special_tokens(tokenizer))


def stands_apart(tokenizer: PreTrainedTokenizerBase, text: str, place: int) -> bool:
    """Whether no token lies across a place in a text: what follows would have other ids in one conversation.

    An answer that begins with a newline behind a header that ends with one is where it does.
    """
    left = text[max(0, place - _WINDOW) : place]
    return _is_border(tokenizer, left, text[place : place + _WINDOW])


@lru_cache(maxsize=4096)
def _is_border(tokenizer: PreTrainedTokenizerBase, left: str, right: str) -> bool:
    """Through the Rust tokenizer where there is one, several times as fast: every turn of every row is asked for."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if tokenizer.is_fast and backend is not None:
        backend.no_truncation()
        backend.no_padding()
        before, both = (backend.encode(part, add_special_tokens=False).ids for part in (left, left + right))
    else:
        before, both = (
            tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"] for part in (left, left + right)
        )
    return bool(both[: len(before)] == before)


def _behind_its_prompt(
    tokenizer: PreTrainedTokenizerBase, chat: Chat, index: int, sample: Sample, after: str
) -> tuple[str, int | None]:
    """The text and where the message begins in it: behind the text of those before it and, for an answer, its header.

    None where the text before is no beginning of `after`, or the template announces answers in other words than it
    renders them in: no cut would then leave a prompt that the server feeds.
    """
    if chat[index]["role"] != "assistant":
        return after, _length_before(tokenizer, chat[:index], sample, after)
    prompt = apply(tokenizer, chat[:index], sample, True)
    if len(prompt) < len(after) and after.startswith(prompt):
        return after, len(prompt)
    shared = _shared_header(tokenizer, prompt, after, chat[index]["content"])
    before = _length_before(tokenizer, chat[:index], sample, after)
    if before is None or not before < shared < len(after):
        return after, None
    return prompt + _continued(prompt[shared:], after[shared:], chat[index]), len(prompt)


def _length_before(tokenizer: PreTrainedTokenizerBase, chat: Chat, sample: Sample, after: str) -> int | None:
    """How much of `after` is the chat before its last message, None where that is no beginning of it."""
    before = apply(tokenizer, chat, sample, False)
    for length in (len(before), _end_of_turn(tokenizer, before, 0)):
        if length < len(after) and after.startswith(before[:length]):
            return length
    return None


def _shared_header(tokenizer: PreTrainedTokenizerBase, prompt: str, after: str, content: str) -> int:
    """Where the header ends that a generation prompt shares with the rendered answer.

    The prompt of the R1 family goes on with `<think>`, which a rendered answer does not have. An answer that happens
    to go on as the prompt does is not cut into, nor is a special token that it begins with.
    """
    pairs = enumerate(zip(prompt, after, strict=False))
    shared = next((place for place, (one, other) in pairs if one != other), min(len(prompt), len(after)))
    said = content.strip() if content.strip() in after else _without_thought(content)[1]
    place = after.rfind(said) if said else -1
    shared = min(shared, place) if place >= 0 else shared
    starts = (after.find(token, max(0, shared - len(token) + 1)) for token in special_tokens(tokenizer))
    return min([shared, *(start for start in starts if 0 <= start < shared)])


def _continued(tail: str, answer: str, message: dict[str, Any]) -> str:
    """What a model says behind a prompt with this tail, which the rendered answer lacks.

    A thought that the tail opens is thought and closed, even where there was none: the model has to close it to speak.
    """
    opened = _OPENED.search(tail)
    if opened is None:
        return answer.lstrip("\n") if tail.endswith("\n") else answer.lstrip() if not tail.strip() else answer
    name = opened["name"]
    if answer.lstrip().startswith(f"<{name}>"):
        return answer.lstrip().removeprefix(f"<{name}>").lstrip("\n")
    inline, _ = _without_thought(message["content"], name)
    thought = message.get("reasoning_content", inline).strip()
    return f"{thought}\n</{name}>\n\n{answer.lstrip()}"


def _without_thought(content: str, name: str = "think") -> tuple[str, str]:
    """The thought that a content begins with, and what is said behind it."""
    found = re.match(rf"\s*<{name}>(.*?)</{name}>(.*)", content, re.DOTALL)
    return (found[1].strip(), found[2].strip()) if found else ("", content.strip())


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, text: str, start: int) -> int:
    """Where a turn that starts at `start` and ends the text stops: right after its end-of-turn token.

    The server stops there too; a newline that the template puts behind it is never generated.
    """
    bare = text.rstrip()
    if len(bare) <= start or not bare.endswith(special_tokens(tokenizer)):
        return len(text)
    return _before_end_of_text(tokenizer, bare, start)


def _before_end_of_text(tokenizer: PreTrainedTokenizerBase, text: str, start: int) -> int:
    """Where the end of the turn is, if an end of the whole text follows it, as in Phi-3; or else that of the text.

    Told apart by what stands before the turn: there, turns end without the text ending.
    """
    eos = tokenizer.eos_token
    if not isinstance(eos, str) or not text.endswith(eos):
        return len(text)
    said = text.removesuffix(eos).rstrip()
    ends = [token for token in special_tokens(tokenizer) if token != eos and said[start:].endswith(token)]
    if not ends:
        return len(text)
    end = max(ends, key=len)
    alone = re.search(re.escape(end) + rf"(?!\s*{re.escape(eos)})", text[: start or len(said) - len(end)])
    return len(said) if alone else len(text)
