"""Token borders at mask borders: the ids that a server feeds before an answer, and no artefact at its start."""

from __future__ import annotations

from itertools import accumulate

import pytest
from transformers import PreTrainedTokenizerFast

from rayswift.data.rendering import Rendered, Segment, render
from rayswift.data.segments import puts_prefix, segment_tokens
from rayswift.data.types import Message, Sample
from tests.data_cases import CHATML, LLAMA3, ZEPHYR, make_sentencepiece, make_tokenizer

CHAT = Sample(
    (
        Message("user", "hi there"),
        Message("assistant", "yo there"),
        Message("user", "be brief"),
        Message("assistant", "no more"),
    )
)
KINDS = ("first", "always", "legacy")


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """As the server's prompt is tokenized."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def ids_of_segments(texts: list[Rendered], tokenizer: PreTrainedTokenizerFast) -> list[list[list[int]]]:
    return [[tokens.ids for tokens in text] for text in segment_tokens(texts, tokenizer)]


def test_which_tokenizers_put_a_prefix() -> None:
    assert [puts_prefix(make_sentencepiece(kind, ZEPHYR)) for kind in KINDS] == [True] * 3
    assert not puts_prefix(make_sentencepiece("never", ZEPHYR))
    assert not puts_prefix(make_tokenizer(CHATML))


@pytest.mark.parametrize("kind", [*KINDS, "never", "bytes"])
def test_every_prompt_has_the_ids_the_server_feeds(kind: str) -> None:
    tokenizer = make_tokenizer(LLAMA3) if kind == "bytes" else make_sentencepiece(kind, ZEPHYR)
    (text,) = render(CHAT, tokenizer, "chat")
    (parts,) = ids_of_segments([text], tokenizer)
    starts = list(accumulate(segment.text for segment in text.segments))
    assert len(starts) >= 4
    for number, start in enumerate(starts, 1):
        assert [token for part in parts[:number] for token in part] == ids_of(tokenizer, start)
    answers = [tokenizer.convert_ids_to_tokens(part[0]) for part in parts[1::2]]
    assert not any(answer.startswith("▁") for answer in answers[:2]), answers


def test_all_ids_decode_to_the_text() -> None:
    tokenizer = make_sentencepiece("first", ZEPHYR)
    (text,) = render(CHAT, tokenizer, "chat")
    (parts,) = ids_of_segments([text], tokenizer)
    assert tokenizer.decode([token for part in parts for token in part]) == text.text


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_that_lies_across_a_border_is_cut_there(kind: str) -> None:
    tokenizer = make_sentencepiece(kind, "{% for m in messages %}{{ m['content'] }}{% endfor %}")
    (text,) = render(Sample((Message("user", "hi th"), Message("assistant", "ere yo"))), tokenizer, "chat")
    prompt = ids_of(tokenizer, "hi th")
    assert ids_of(tokenizer, "hi there yo")[: len(prompt)] != prompt, "a token lies across the border"
    (parts,) = ids_of_segments([text], tokenizer)
    assert parts[0] == prompt
    assert "".join(tokenizer.convert_ids_to_tokens(parts[1])) == "ere▁yo</s>"


def test_documents_keep_the_prefix_and_the_order() -> None:
    tokenizer = make_sentencepiece("first", ZEPHYR)
    document = Rendered((Segment("hi there", 1),), add_special_tokens=True)
    (chat,) = render(CHAT, tokenizer, "chat")
    alone = ids_of_segments([chat], tokenizer)[0]
    whole = [ids_of(tokenizer, "hi there")]
    assert ids_of_segments([document, chat, document], tokenizer) == [whole, alone, whole]
