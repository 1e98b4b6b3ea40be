"""Prepared chunks kept between runs, under a key of everything that decides what is in them.

The key covers the hashes of the data files, formats, settings and seed (the plan's fingerprint), the tokenizer with its
chat template, and this version; what was made of anything else is never found. Rows with media are not kept: the files
they name are no part of any hash.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import uuid
from functools import lru_cache
from typing import TYPE_CHECKING

import fsspec
import pyarrow as pa

from rayswift import __version__
from rayswift.data.prepare import SCHEMA, prepare_chunk
from rayswift.data.stream import StreamPlan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rayswift.data.media.encoder import MediaEncoder

_DIGEST = hashlib.sha256().digest_size
_LOG = logging.getLogger("rayswift.data")


def kept_chunk(
    plan: StreamPlan, index: int, tokenizer: PreTrainedTokenizerBase, media: MediaEncoder | None = None
) -> pa.Table:
    """`prepare_chunk`, from `plan.cache` if it is there, and into it if not.

    A file that is damaged is made again. A cache that cannot be written costs a warning, never the run.
    """
    if plan.cache is None or plan.settings.media_kinds:
        return prepare_chunk(plan, index, tokenizer, media)
    place = f"{plan.cache.rstrip('/')}/{cache_key(plan, tokenizer)}/{index:06d}.arrow"
    table = _read(place)
    if table is None:
        table = prepare_chunk(plan, index, tokenizer, media)
        _write(place, table)
    return table


def cache_key(plan: StreamPlan, tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 (hex) of all that decides the content of the plan's chunks."""
    parts = [plan.fingerprint, _identity(tokenizer), __version__, SCHEMA.to_string()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@lru_cache(maxsize=4)
def _identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 (hex) of what the tokenizer does with text. Kept per tokenizer object: one of a large model is 10 MB."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    others = [type(tokenizer).__name__, tokenizer.chat_template, special]
    return hashlib.sha256((content + json.dumps(others, sort_keys=True)).encode()).hexdigest()


def _read(place: str) -> pa.Table | None:
    """The table of a file, None where there is none or its content is not what was written."""
    filesystem, path = fsspec.url_to_fs(place)
    try:
        with filesystem.open(path, "rb") as stream:
            content = stream.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        _LOG.warning("the token cache %s cannot be read: %s", place, error)
        return None
    if hashlib.sha256(content[_DIGEST:]).digest() != content[:_DIGEST]:
        _LOG.warning("the token cache %s is damaged, and made again", place)
        return None
    return pa.ipc.open_stream(content[_DIGEST:]).read_all()


def _write(place: str, table: pa.Table) -> None:
    """The file as a whole or not at all: several ranks and runs may write the same one."""
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    content = sink.getvalue()
    filesystem, path = fsspec.url_to_fs(place)
    beside = f"{path}.{os.getpid()}.{uuid.uuid4().hex}.tmp"
    try:
        filesystem.makedirs(os.path.dirname(path), exist_ok=True)
        with filesystem.open(beside, "wb") as stream:
            stream.write(hashlib.sha256(content).digest() + content)
        filesystem.mv(beside, path)
    except OSError as error:
        _LOG.warning("the token cache %s cannot be written: %s", place, error)
