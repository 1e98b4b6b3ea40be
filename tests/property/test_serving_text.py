"""Invariants of what clients see: no half characters, stop strings cut however text arrives, top-p keeps its weight."""

from __future__ import annotations

from functools import cache

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayswift.serving.local.sampling import GREEDY_BELOW, probabilities
from rayswift.serving.local.text import Detokenizer, StopMatcher, TextStream


@cache
def _byte_tokenizer():
    """A byte-level tokenizer in which a character such as an emoji takes several tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["hello wörld, grüße ", "über größe"], trainer)
    return tokenizer


@given(st.text(max_size=40))
def test_streamed_text_is_the_text(text: str) -> None:
    tokenizer = _byte_tokenizer()
    stream = Detokenizer(tokenizer.decode)
    pieces = [stream.push(token) for token in tokenizer.encode(text).ids]
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text
    assert "".join(pieces) + stream.finish() == text.rstrip("\ufffd")


@given(st.lists(st.integers(0, 279), max_size=60))
def test_streamed_text_of_any_ids_is_the_whole_decoding_without_its_unfinished_end(ids: list[int]) -> None:
    tokenizer = _byte_tokenizer()
    stream = Detokenizer(tokenizer.decode)
    streamed = "".join([stream.push(token) for token in ids]) + stream.finish()
    assert streamed == tokenizer.decode(ids).rstrip("\ufffd")


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
