"""Small trained tokenizers of the kinds that differ in how they decode: what is a byte, and where spaces are."""

from __future__ import annotations

import json
from functools import cache

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

KINDS = ("byte_level", "llama", "unigram")
_TEXTS = ["hello wörld, grüße an alle ", "über größe und sonne", "the sun is up, the sea is wide", "a\nb\n  c"] * 3
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


@cache
def tokenizer_of(kind: str) -> Tokenizer:
    """A tokenizer whose first two tokens are special: `<s>`, `</s>`. Characters that it does not know are bytes."""
    return {"byte_level": _byte_level, "llama": _llama, "unigram": _unigram}[kind]()


def _byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"],
                                  show_progress=False)  # fmt: skip
    tokenizer.train_from_iterator(_TEXTS, trainer)
    return tokenizer


def _llama() -> Tokenizer:
    """As Llama 2 and Mistral: SentencePiece's BPE, a space before the first word, no pre-tokenizer."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(?=▁)"), "isolated")  # words, to learn from
    specials = ["<s>", "</s>", "<unk>", *_BYTES]
    trainer = trainers.BpeTrainer(vocab_size=len(specials) + 80, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(_TEXTS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    whole = Tokenizer(models.BPE(model["vocab"], merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    whole.normalizer = normalizers.Sequence(spaces)
    whole.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    whole.add_special_tokens(["<s>", "</s>", "<unk>"])
    return whole


def _unigram() -> Tokenizer:
    """As T5's and Gemma's kin: SentencePiece's unigram model with Metaspace around it."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=70, special_tokens=["<s>", "</s>", "<unk>"], unk_token="<unk>",
                                      show_progress=False)  # fmt: skip
    tokenizer.train_from_iterator(_TEXTS, trainer)
    vocab = [tuple(one) for one in json.loads(tokenizer.to_str())["model"]["vocab"]]
    whole = Tokenizer(models.Unigram([*vocab, *((byte, -20.0) for byte in _BYTES)], unk_id=2, byte_fallback=True))
    whole.pre_tokenizer = pre_tokenizers.Metaspace()
    whole.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    whole.add_special_tokens(["<s>", "</s>", "<unk>"])
    return whole
