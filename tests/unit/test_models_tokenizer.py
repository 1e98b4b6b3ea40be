"""A trained tokenizer keeps every text, is the same for the same files, and renders ChatML."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from rayswift.errors import ConfigError
from rayswift.models.tokenizer import MIN_VOCAB_SIZE, PAD, TURN_END, TURN_START, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_text: Path) -> PreTrainedTokenizerFast:
    return train_tokenizer([tiny_text], vocab_size=512, max_length=256)


def test_vocabulary_is_as_asked_and_special_tokens_are_single_ids(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == 512
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token) == (PAD, TURN_END, None)
    for token in (PAD, TURN_START, TURN_END):
        assert len(tokenizer(token)["input_ids"]) == 1
    assert tokenizer.model_max_length == 256


@given(text=st.text())
def test_every_text_survives_encode_and_decode(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@given(text=st.text(min_size=1))
def test_offsets_cover_the_text_without_gap(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    """The data pipeline may place loss masks by offsets."""
    covered = {i for a, b in tokenizer(text, return_offsets_mapping=True)["offset_mapping"] for i in range(a, b)}
    assert covered == set(range(len(text)))


def test_same_files_give_the_same_tokenizer(tokenizer: PreTrainedTokenizerFast, tiny_text: Path) -> None:
    again = train_tokenizer([tiny_text], vocab_size=512, max_length=256)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_template_renders_with_and_without_system(tokenizer: PreTrainedTokenizerFast) -> None:
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}
    answer = {"role": "assistant", "content": " Hello\n"}
    assert tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.apply_chat_template([system, user, answer], tokenize=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n Hello\n<|im_end|>\n"
    )


def test_template_drops_nothing_silently(tokenizer: PreTrainedTokenizerFast) -> None:
    user = [{"role": "user", "content": "Hi"}]
    with pytest.raises(TemplateError, match="no tools"):
        tokenizer.apply_chat_template(user, tools=[{"type": "function", "function": {"name": "f"}}], tokenize=False)
    with pytest.raises(TemplateError, match="unknown role tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "4"}], tokenize=False)


def test_text_is_found_in_rows_whatever_the_columns(tmp_path: Path) -> None:
    word = "zanzibarian"
    rows = [{"messages": [{"role": "user", "content": f"{word} {word}"}], "n": i} for i in range(20)]
    files = {
        "a.jsonl": "\n".join(json.dumps(row) for row in rows) + "\n\n",
        "a.json": json.dumps(rows),
        "a.csv": "question,answer\n" + f"{word},{word}\n" * 20,
        "a.py": f"# {word} {word}\n" * 20,
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        tokenizer = train_tokenizer([tmp_path / name], vocab_size=300, max_length=64)
        assert len(tokenizer(f" {word}")["input_ids"]) <= 2, name


def test_small_text_gives_a_smaller_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ab", encoding="utf-8")
    assert MIN_VOCAB_SIZE <= len(train_tokenizer([tmp_path / "a.txt"], vocab_size=4096, max_length=64)) < 300


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "missing.txt does not exist"),
        ("empty.txt", b" \n", "holds no text"),
        ("binary.txt", b"\xff\xfe\x00", "is not UTF-8 text"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', "bad.jsonl:2 is not JSON"),
        ("bad.json", b"[1, 2", "bad.json is not JSON"),
    ],
)
def test_bad_file_is_a_config_error(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=r"--train-tokenizer=.*") as caught:
        train_tokenizer([tmp_path / name], vocab_size=300, max_length=64)
    assert message in str(caught.value)


def test_folder_and_no_file_and_tiny_vocabulary_are_config_errors(tmp_path: Path, tiny_text: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder"):
        train_tokenizer([tmp_path], vocab_size=300, max_length=64)
    with pytest.raises(ConfigError, match="names no file"):
        train_tokenizer([], vocab_size=300, max_length=64)
    with pytest.raises(ConfigError, match="--vocab-size=258 is too small"):
        train_tokenizer([tiny_text], vocab_size=MIN_VOCAB_SIZE - 1, max_length=64)
