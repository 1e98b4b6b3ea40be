"""Rows that an export is calibrated and judged on: the job's own, through the pipeline that it was trained with.

Knows sources, how many rows of each are taken, and that none is on both sides. Does not know what is done with them.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from rayswift.config.job import DataSource, DataSpec, MixingSpec
from rayswift.data.as_trained import as_trained
from rayswift.data.blocks import packed_sequences
from rayswift.data.inspect import open_sources
from rayswift.data.prepare import prepare_chunk
from rayswift.data.rendering import Rendering
from rayswift.data.stream import StreamPlan
from rayswift.data.types import Example
from rayswift.errors import ConfigError, RaySwiftError
from rayswift.export.measured import RowsUsed
from rayswift.export.source import Source
from rayswift.export.terms import QuantizeSpec
from rayswift.models.config_sizes import num_positions
from rayswift.models.folder import read_json
from rayswift.models.loading import local_folder
from rayswift.training.media import media_encoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPTION = "--calibration"
NUM_HELD_OUT = 16
"""Rows of an export that is not quantized: each costs two passes in float32 on a CPU, and rounding moves all alike."""


@dataclass(frozen=True)
class Rows:
    """Documents in the order in which they are seen, and which files they are from."""

    examples: tuple[Example, ...]
    used: RowsUsed
    trained_on: bool = False
    """Whether they are of a file that is among the training data."""


@dataclass(frozen=True)
class Chosen:
    """Rows to calibrate on and rows to judge by; `unread` is why there are none to judge by."""

    calibration: Rows | None = None
    held_out: Rows | None = None
    unread: str | None = None


def choose(
    what: Source, tokenizer: PreTrainedTokenizerBase, spec: QuantizeSpec | None, *, needs_rows: bool,
    num_held_out: int | None, is_bounded: bool,
) -> Chosen:  # fmt: skip
    """The rows of an export: as its spec says, or rows of the job for one that is only merged or rounded.

    For the latter, rows that cannot be read again are told and missed, unless `num_held_out` or a bound on them was
    asked for: then they raise ConfigError, as they do for a spec.
    """
    if spec is not None:
        num = spec.num_calibration if needs_rows else 0
        found = read_rows_of(what, tokenizer, path=spec.calibration, num_calibration=num,
                             num_held_out=spec.num_held_out, max_length=spec.max_length)  # fmt: skip
        return Chosen(*found)
    is_asked = is_bounded or num_held_out is not None
    if what.data is None and not is_asked:
        return Chosen()
    try:
        _, held_out = read_rows_of(what, tokenizer, path=None, num_calibration=0,
                                   num_held_out=num_held_out or NUM_HELD_OUT, max_length=None)  # fmt: skip
    except ConfigError as error:
        if is_asked:
            raise
        print(f"note: perplexity is not compared: {error}", file=sys.stderr)
        return Chosen(unread=str(error))
    return Chosen(held_out=held_out)


def read_rows_of(
    what: Source,
    tokenizer: PreTrainedTokenizerBase,
    *,
    path: str | None,
    num_calibration: int,
    num_held_out: int,
    max_length: int | None,
) -> tuple[Rows, Rows]:
    """Rows to calibrate on and rows that calibration does not see, of `path` or else of the job that was trained.

    Held out are the job's `data.eval` rows; where it has none, rows behind those of the calibration, a fifth of all if
    there are not enough. No row is on both sides, however often its source repeats it.

    Raises ConfigError where there is no data, or too little.
    """
    data, rendering = _data_of(what, tokenizer, path)
    data = data.model_copy(update={"max_length": _longest(what, max_length, data.max_length)})
    train = _plan(data, data.train, rendering, "data.train" if path is None else OPTION)
    evaluated = _plan(data, data.eval, rendering, "data.eval") if data.eval and path is None else None
    if evaluated:
        held_out = list(islice(_documents(evaluated, tokenizer, what.base), num_held_out))
        found = list(islice(_documents(train, tokenizer, what.base, but=held_out), num_calibration))
    else:
        wanted = num_calibration + num_held_out
        found = list(islice(_documents(train, tokenizer, what.base), wanted))
        count = num_held_out if len(found) == wanted else min(num_held_out, max(1, len(found) // 5))
        count = count if num_calibration else len(found)
        found, held_out = found[: len(found) - count], found[len(found) - count :]
    if (num_calibration and not found) or not any(any(one.loss_mask) for one in held_out):
        raise ConfigError(
            "has too few rows that can be used: at least one to calibrate on and one to judge by are needed",
            path=OPTION, value=path or "the job's data", fix=f"name a file with more of them: {OPTION} rows.jsonl",
        )  # fmt: skip
    judging = evaluated or train
    trained = {file.sha256 for file in train.files} if path is None else _trained_files(what)
    trained_on = any(file.sha256 in trained for file in judging.files)
    return _rows(found, train), _rows(held_out, judging, trained_on=trained_on)


def _data_of(what: Source, tokenizer: PreTrainedTokenizerBase, path: str | None) -> tuple[DataSpec, Rendering]:
    """What the job says of its data, with packing off: a document that is calibrated on must not see another."""
    rendering = what.rendering or ("chat" if tokenizer.chat_template else "text")
    if path is not None:
        source, kinds = as_trained(DataSource(path=path), what.data)
        given = what.data or DataSpec(train=(source,))
        media = given.media.model_copy(update={"kinds": kinds})
        return given.model_copy(
            update={"train": (source,), "mixing": MixingSpec(), "media": media, "packing": False, "cache": None}
        ), rendering
    if what.data is None:
        raise ConfigError(
            "is needed: a model folder does not say which rows it was trained on", path=OPTION,
            fix=f"{OPTION} rows.jsonl, in any of the formats that training reads",
        )  # fmt: skip
    return what.data.model_copy(update={"packing": False, "cache": None}), rendering


def _longest(what: Source, asked: int | None, own: int) -> int:
    """The longest row in tokens: as asked for, else as in training, and what the model has positions for.

    Raises ConfigError when it is asked for more than that.
    """
    config = read_json(local_folder(what.base, weights=False) / "config.json", field="model.path")
    positions = num_positions(config)
    if asked is not None and positions is not None and asked > positions:
        raise ConfigError("is more than the model has positions", path="--max-length", value=asked,
                          fix=f"use {positions}")  # fmt: skip
    return min(asked or own, positions or sys.maxsize)


def _trained_files(what: Source) -> set[str]:
    """The sha256 of each file that was trained on, as far as that is recorded."""
    return set(what.lineage.data.values()) if what.lineage else set()


def _plan(data: DataSpec, sources: Sequence[DataSource], rendering: Rendering, place: str) -> StreamPlan:
    try:
        opened = open_sources(sources, path=place, kinds=data.media.kinds)
    except RaySwiftError as error:
        if place == OPTION:
            raise
        raise ConfigError(
            f"cannot be read again: {error}", path=OPTION, value="the job's data", fix=f"give {OPTION} rows.jsonl"
        ) from error
    return opened.stream(data, rendering)


def _documents(
    plan: StreamPlan, tokenizer: PreTrainedTokenizerBase, base: str, *, but: Iterable[Example] = ()
) -> Iterator[Example]:
    """The documents of a stream `but` for some, as a model is given them: each once, however often it comes."""
    media, seen = media_encoder(base, plan.settings), {_content(one) for one in but}
    for index in range(plan.num_chunks):
        for one in packed_sequences(prepare_chunk(plan, index, tokenizer, media)):
            found = Example(one.input_ids.tolist(), one.loss_mask.tolist(), tuple(one.media), one.rope_AT)
            if found.input_ids and (content := _content(found)) not in seen:
                seen.add(content)
                yield found


def _content(example: Example) -> bytes:
    """A hash of what a model is given: of its media too, for questions about two images may have the same ids."""
    digest = hashlib.sha256(np.asarray(example.input_ids, np.int64).tobytes())
    for features in example.media:
        for name in sorted(features):
            digest.update(np.ascontiguousarray(features[name]).tobytes())
    return digest.digest()


def _rows(examples: Sequence[Example], plan: StreamPlan, *, trained_on: bool = False) -> Rows:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(np.asarray(example.input_ids, np.int64).tobytes() + b"|")
    return Rows(
        tuple(examples),
        RowsUsed(
            files={file.path: file.sha256 for file in plan.files},
            num_rows=len(examples),
            num_tokens=sum(len(example.input_ids) for example in examples),
            sha256=digest.hexdigest(),
        ),
        trained_on,
    )
