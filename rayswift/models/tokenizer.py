"""Trains a byte-level BPE tokenizer with a ChatML template from the user's own files.

Knows how text is taken out of a file and which special tokens a chat needs. Does not know any model: the number of
embedding rows is decided in `models/init.py`.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayswift.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (PAD, TURN_START, TURN_END)
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
"""Every byte and every special token has an id, so that no text is unknown."""

CHAT_TEMPLATE = """\
{%- if tools %}{{- raise_exception('this chat template has no tools') }}{%- endif %}
{%- for message in messages %}
{%- if message['role'] not in ['system', 'user', 'assistant'] %}
{{- raise_exception('unknown role ' + message['role'] + '; use system, user or assistant') }}
{%- endif %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

_BLOCK_CHARS = 64 * 1024
_OPTION = "--train-tokenizer"


def train_tokenizer(
    files: Sequence[str | os.PathLike[str]], *, vocab_size: int, max_length: int
) -> PreTrainedTokenizerFast:
    """A tokenizer of at most `vocab_size` ids, the same for the same files; `len()` tells how many the text gave.

    Any text survives encode and decode byte for byte: there is no normalizer and no unknown token.
    Raises ConfigError for a vocabulary below `MIN_VOCAB_SIZE` and for a file that is missing, empty or not text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < MIN_VOCAB_SIZE:
        raise ConfigError(
            f"is too small: 256 bytes and {len(SPECIAL_TOKENS)} special tokens need {MIN_VOCAB_SIZE}",
            path="--vocab-size",
            value=vocab_size,
            fix=f"use {MIN_VOCAB_SIZE} or more",
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(files), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=PAD,
        additional_special_tokens=[TURN_START],
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _texts(files: Sequence[str | os.PathLike[str]]) -> Iterator[str]:
    """The text of all files, in order. Every file must hold some."""
    if not files:
        raise ConfigError("names no file", path=_OPTION, fix="give at least one text file")
    for file in files:
        path = Path(file)
        if not path.is_file():
            rule = "is a folder, not a file" if path.is_dir() else "does not exist"
            raise ConfigError(rule, path=_OPTION, value=str(path), fix="give text, JSON, JSONL or CSV files")
        empty = True
        for text in _read(path):
            empty = empty and not text.strip()
            yield text
        if empty:
            raise ConfigError("holds no text", path=_OPTION, value=str(path), fix="leave it out or give another file")


def _read(path: Path) -> Iterator[str]:
    """The text of one file, read as its suffix says."""
    readers = {".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".csv": _csv}
    try:
        yield from readers.get(path.suffix.lower(), _plain)(path)
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"is not UTF-8 text ({error.reason})", path=_OPTION, value=str(path), fix="convert it to UTF-8 text first"
        ) from error
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", path=_OPTION, value=str(path)) from error


def _plain(path: Path) -> Iterator[str]:
    """Blocks of whole lines: merges over line ends are learned, and memory does not grow with the file."""
    with open(path, encoding="utf-8", newline="") as stream:
        while lines := stream.readlines(_BLOCK_CHARS):
            yield "".join(lines)


def _jsonl(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield from _strings(_parse(line, f"{path}:{number}"))


def _json(path: Path) -> Iterator[str]:
    yield from _strings(_parse(path.read_text(encoding="utf-8"), str(path)))


def _csv(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            yield from _strings(list(row.values()))


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"is not JSON: {error}", path=_OPTION, value=place, fix="mend the line or rename the file to .txt"
        ) from error


def _strings(value: Any) -> Iterator[str]:
    """Every string value at any depth: the text of a row, whatever its columns are called."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)
