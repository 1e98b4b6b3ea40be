"""Invariants of what clients see: no half characters, stop strings cut however text arrives, top-p keeps its weight."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers.decoders import DecodeStream
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

from rayswift.serving.engine import Sampling
from rayswift.serving.local.sampling import GREEDY_BELOW, Sampler, penalized, probabilities
from rayswift.serving.local.text import Decode, Detokenizer, StopMatcher, TextStream
from tests.tokenizer_cases import KINDS, tokenizer_of

_UNFINISHED = 3
_WORDS = st.text(max_size=4) | st.sampled_from([
    " the", " sun", "sun", "  ", "\n", "é", "ö", "日本語", "🙂", "👩\u200d🚀", " größe", "<s>", "</s>", "x", " ",
])  # fmt: skip


def _streamed(decode: Decode, prompt: list[int], answer: list[int]) -> list[str]:
    stream = Detokenizer(decode, prompt)
    return [*(stream.push(token) for token in answer), stream.finish()]


def _by_definition(decode: Decode, prompt: list[int], answer: list[int]) -> str:
    """What a prompt and its answer say behind what the prompt says, a last character that it does not end left out."""
    least = max(0, len(prompt) - _UNFINISHED)
    sizes = range(len(prompt), least, -1)
    finished = next((size for size in sizes if not decode(prompt[:size]).endswith("\ufffd")), least)
    before, whole = decode(prompt[:finished]), decode(prompt + answer)
    assert whole.startswith(before)
    new, said = whole.removeprefix(before), decode(prompt[finished:])
    while new and said and new[0] == said[0]:
        new, said = new[1:], said[1:]
    return new.rstrip("\ufffd")


@pytest.mark.parametrize("kind", KINDS)
@given(words=st.lists(_WORDS, max_size=14), where=st.floats(0, 1))
def test_streamed_text_is_what_the_whole_has_behind_the_prompt(kind: str, words: list[str], where: float) -> None:
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode("".join(words)).ids
    prompt, answer = ids[: int(where * len(ids))], ids[int(where * len(ids)) :]
    pieces = _streamed(tokenizer.decode, prompt, answer)
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in "".join(words)
    assert "".join(pieces) == _by_definition(tokenizer.decode, prompt, answer)


@pytest.mark.parametrize("kind", KINDS)
@given(words=st.lists(_WORDS, min_size=1, max_size=14), where=st.floats(0, 1))
def test_streamed_text_is_that_of_the_stream_that_vllm_decodes_with(kind: str, words: list[str], where: float) -> None:
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode("".join(words)).ids
    prompt, answer = ids[: int(where * len(ids))], ids[int(where * len(ids)) :]
    assume("\ufffd" not in tokenizer.decode(prompt) + "".join(words))  # where it says the prompt again, or fails
    stream = DecodeStream(ids=prompt, skip_special_tokens=True)
    theirs = [stream.step(tokenizer, token) or "" for token in answer]
    assert _streamed(tokenizer.decode, prompt, answer)[:-1] == theirs


@given(st.lists(st.integers(2, 299), max_size=60), st.lists(st.integers(2, 299), max_size=60))
def test_streamed_text_of_any_ids_is_the_whole_decoding_without_its_unfinished_end(
    prompt: list[int], ids: list[int]
) -> None:
    decode = tokenizer_of("byte_level").decode
    streamed = "".join(_streamed(decode, prompt, ids))
    assert streamed == _by_definition(decode, prompt, ids)
    if not prompt:
        assert streamed == decode(ids).rstrip("\ufffd")


@pytest.mark.parametrize("kind", KINDS)
@given(prompt=st.lists(st.integers(0, 325), max_size=12), ids=st.lists(st.integers(0, 325), max_size=30))
def test_texts_of_tokens_joined_are_the_text(kind: str, prompt: list[int], ids: list[int]) -> None:
    stream = Detokenizer(tokenizer_of(kind).decode, prompt)
    for token in ids:
        told = stream.text_of(token)
        assert stream.push(token) == ("" if told == "\ufffd" else told)


@pytest.mark.parametrize("kind", ["llama", "unigram"])
def test_the_space_before_the_first_word_is_kept(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode("the sea is wide").ids
    at = len(tokenizer.encode("the sea").ids)
    assert "".join(_streamed(tokenizer.decode, ids[:at], ids[at:])) == " is wide"
    for hidden in ([], [0], [0] * 40):  # nothing is said before: it is the begin of a text
        assert "".join(_streamed(tokenizer.decode, hidden, ids)) == "the sea is wide"
        assert "".join(_streamed(tokenizer.decode, ids[:at] + hidden, ids[at:])) == " is wide"
    stream = Detokenizer(tokenizer.decode, ids[:at])
    space, none = (tokenizer.token_to_id(piece) for piece in ("▁s", "s"))
    assert [stream.text_of(token) for token in (space, none)] == [" s", "s"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_character_that_the_prompt_begins_is_the_answers(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    for before in ("the sea", "", "日本" * 30):
        ids = tokenizer.encode(before + "🙂").ids
        for num in (1, 2, 3):
            assert "".join(_streamed(tokenizer.decode, ids[:-num], ids[-num:])) == "🙂"
            stream, told = Detokenizer(tokenizer.decode, ids[:-num]), list[str]()
            for token in ids[-num:]:
                told.append(stream.text_of(token))
                stream.push(token)
            assert told == ["\ufffd"] * (num - 1) + ["🙂"]
            assert "".join(_streamed(tokenizer.decode, ids[:-num], tokenizer.encode("n").ids[-1:])) == "n"


def test_what_stands_in_a_token_before_a_character_that_it_begins_is_the_prompts() -> None:
    def decode(ids: list[int]) -> str:
        return b"".join([b"a", b" x\xe2", b"\x82", b"\xac", b"b"][i] for i in ids).decode(errors="replace")

    assert "".join(_streamed(decode, [0, 1], [2, 3, 4])) == "€b"
    assert "".join(_streamed(decode, [0, 1], [4])) == "b"
    assert "".join(_streamed(decode, [1, 2], [3])) == "€"


def test_a_prompt_is_decoded_as_far_as_it_takes_and_no_further() -> None:
    lengths, tokenizer = list[int](), tokenizer_of("llama")

    def decode(ids: list[int]) -> str:
        lengths.append(len(ids))
        return str(tokenizer.decode(ids))

    Detokenizer(decode, tokenizer.encode("the sea is wide " * 1000).ids)
    assert max(lengths) <= 8
    Detokenizer(decode, tokenizer.encode("日本語" * 1000).ids)  # three bytes each, no other token
    assert max(lengths) <= 16
    lengths.clear()
    Detokenizer(decode, [0] * 10_000)
    assert sum(lengths) < 20 * 10_000


def _cut_by_definition(text: str, stops: list[str]) -> str:
    """Character by character: the first prefix of the text that ends with a stop string, without the longest one."""
    for end in range(1, len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            return text[: end - max(map(len, hits))]
    return text


@settings(max_examples=300)
@given(
    st.lists(st.text(alphabet="abc", max_size=5), max_size=8),
    st.lists(st.text(alphabet="abc", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_stop_strings_cut_the_same_text_however_it_arrives(pieces: list[str], stops: list[str]) -> None:
    matcher, shown, stopped = StopMatcher(stops), "", False
    for piece in pieces:
        text, stopped = matcher.push(piece)
        shown += text
        assert "".join(pieces).startswith(shown)
        if stopped:
            break
    shown += "" if stopped else matcher.finish()
    assert shown == _cut_by_definition("".join(pieces), stops)
    assert stopped == (shown != "".join(pieces))


def test_a_stop_string_in_held_back_text_is_found_at_the_end() -> None:
    texts = {1: "x", 2: "ab\ufffd"}
    stream = TextStream(lambda ids: "".join(texts[i] for i in ids), ["ab"])
    assert stream.push(1) == ("x", False)
    assert stream.push(2) == ("", False)
    assert stream.finish() == ("", True)


@given(
    st.lists(st.floats(-20, 20), min_size=1, max_size=30),
    st.floats(GREEDY_BELOW, 2),
    st.floats(0, 1, exclude_min=True),
)
def test_top_p_keeps_the_fewest_likeliest_tokens_that_weigh_enough(
    logits: list[float], temperature: float, top_p: float
) -> None:
    logits_V = torch.tensor(logits)
    full_V = probabilities(logits_V, temperature, 1.0)
    kept_V = probabilities(logits_V, temperature, top_p)
    kept = kept_V > 0
    assert abs(float(kept_V.sum()) - 1) < 1e-5
    weight = float(full_V[kept].sum())
    assert weight >= top_p - 1e-5
    assert weight - float(full_V[kept].min()) < top_p + 1e-5  # without the least likely one it would weigh too little
    if (~kept).any():
        assert float(full_V[kept].min()) >= float(full_V[~kept].max()) - 1e-6


_LOGITS = st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=30)


@given(_LOGITS, st.floats(0.1, 2), st.integers(-1, 40), st.floats(0, 1), st.floats(0, 1, exclude_min=True))
def test_the_tokens_that_are_kept_are_those_of_transformers(
    logits: list[float], temperature: float, top_k: int, min_p: float, top_p: float
) -> None:
    logits_V = torch.tensor(logits)
    assume(len(set(logits)) == len(logits))  # ties are cut at other places
    steps = [TemperatureLogitsWarper(temperature)]
    steps += [MinPLogitsWarper(min_p)] if min_p else []
    steps += [TopKLogitsWarper(top_k)] if top_k > 0 else []
    wanted_BV = logits_V[None]
    for step in steps:
        wanted_BV = step(None, wanted_BV)
    found_V = probabilities(logits_V, temperature, 1.0, top_k, min_p)
    close = (logits_V - logits_V.max()) / temperature - (math.log(min_p) if min_p else -math.inf)
    assume(float(close.abs().min()) > 1e-4)  # at the bound itself rounding decides
    assert torch.allclose(found_V, torch.softmax(wanted_BV[0], -1), atol=1e-5)
    cut_V = probabilities(logits_V, temperature, top_p, top_k, min_p)
    assert bool(((cut_V > 0) <= (found_V > 0)).all())


@given(_LOGITS, st.lists(st.integers(0, 40), max_size=6), st.lists(st.integers(0, 29), max_size=8), st.data())
def test_penalties_are_those_of_transformers_and_of_openai(
    logits: list[float], prompt: list[int], answer: list[int], data: st.DataObject
) -> None:
    logits_V = torch.tensor(logits)
    answer = [one % len(logits) for one in answer]
    again = data.draw(st.floats(0.5, 2))
    often, once = data.draw(st.floats(-2, 2)), data.draw(st.floats(-2, 2))
    sampling = Sampling(1, repetition_penalty=again, frequency_penalty=often, presence_penalty=once)
    seen_V = Sampler(sampling, [*prompt, *answer])._seen(logits_V)
    found_V = penalized(logits_V, sampling, seen_V, Counter(answer))
    wanted_V, seen = logits_V, [one for one in (*prompt, *answer) if one < len(logits)]
    if seen:
        wanted_V = RepetitionPenaltyLogitsProcessor(again)(torch.tensor([seen]), logits_V[None].clone())[0]
    taken = [often * answer.count(one) + once * (one in answer) for one in range(len(logits))]
    assert torch.allclose(found_V, wanted_V - torch.tensor(taken), atol=1e-4)
    assert logits_V.tolist() == logits  # what they are counted from is not changed


def test_what_an_answer_has_said_counts_against_it_from_then_on() -> None:
    logits_V = torch.tensor([1.0, 3.0, 2.9, 2.8])
    chosen = [Sampler(Sampling(9, temperature=0, repetition_penalty=1.1), [0, 10**6])]
    assert [chosen[0](logits_V) for _ in range(4)] == [1, 2, 3, 1]
    said = Sampler(Sampling(9, temperature=0, frequency_penalty=0.15))
    assert [said(logits_V) for _ in range(4)] == [1, 2, 1, 3]
