"""Rows as the model sees them: rendered, tokenized, masked, packed. Reads the first rows only; trains nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rayswift import plugins
from rayswift.config.job import DataSource, Job
from rayswift.data.formats import RowError, UnusedRow
from rayswift.data.types import BadRow, Example
from rayswift.errors import DataError
from rayswift.seen import Preview, SeenSource, num_trained, seen_row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rayswift.data.media.encoder import MediaEncoder
    from rayswift.data.sources import FileIndex
    from rayswift.data.stream import StreamSettings
    from rayswift.models.embeddings import EmbeddingStats

SAMPLE_ROWS, SAMPLE_MEDIA_ROWS = 256, 32
"""Rows that are looked at; fewer of those whose images, sounds and videos have to be decoded."""
MAX_WEIGHT_BYTES = 4 << 30
"""Weights up to this size are loaded to look at embeddings, unless it is asked for or forbidden."""
_BINS = 8


def preview(job: Job, *, num_rows: int, embeddings: bool | None = None) -> Preview:
    """The first `num_rows` rows of every training source, and figures on its first 256, or 32 where they have media.

    `embeddings` loads the model to compare what it is fed of text and of media; None does where that is cheap.
    Raises ConfigError or DataError as training would.
    """
    from rayswift.data.hub_sources import settled
    from rayswift.data.inspect import open_sources
    from rayswift.models.loading import check_folder, load_tokenizer
    from rayswift.training.media import media_encoder

    rendering = plugins.load("methods", job.method.name, path="method.name").rendering
    check_folder(job.model.path, chat_template=rendering == "chat")
    given = tuple(settled(source, place=f"data.train.{number}") for number, source in enumerate(job.data.train))
    opened = open_sources(given, kinds=job.data.media.kinds)
    settings = opened.stream(job.data, rendering).settings
    look = _Look(job, settings, load_tokenizer(job.model.path), media_encoder(job.model.path, settings), embeddings)
    sources = tuple(
        look.at(source, opened.formats[number], [f for f in opened.files if f.source == number], num_rows)
        for number, source in enumerate(given)
    )
    return Preview(job.method.name, job.data.max_length, sources)


@dataclass(frozen=True)
class _Look:
    """What rows are looked at with."""

    job: Job
    settings: StreamSettings
    tokenizer: PreTrainedTokenizerBase
    media: MediaEncoder | None
    embeddings: bool | None

    def at(self, source: DataSource, format_name: str, files: list[FileIndex], num_rows: int) -> SeenSource:
        """One source. Raises DataError when none of its first rows can be used."""
        from rayswift.data.packing import fill, pack

        limit = SAMPLE_ROWS if self.media is None else SAMPLE_MEDIA_ROWS
        looked_at = [
            (place, self._examples(row, format_name, source, file))
            for place, row, file in islice(_rows(files), max(limit, num_rows))
        ]
        examples = [example for _, found in looked_at if not isinstance(found, RowError) for example in found]
        if not examples:
            raise DataError(f"has no row that can be used: {looked_at[0][1]}", path="data.train", value=source.path)
        lengths = [len(example.input_ids) for example in examples]
        length = self.job.data.max_length
        bins = pack(lengths, length) if self.job.data.packing else [[i] for i in range(len(lengths))]
        return SeenSource(
            path=source.path,
            format=format_name,
            num_rows=sum(file.num_rows for file in files),
            num_looked_at=len(looked_at),
            num_bad=sum(isinstance(found, RowError) and not isinstance(found, UnusedRow) for _, found in looked_at),
            num_unused=sum(isinstance(found, UnusedRow) for _, found in looked_at),
            mean_tokens=sum(lengths) / len(lengths),
            max_tokens=max(lengths),
            trained_share=sum(num_trained(example) for example in examples) / sum(lengths),
            fill=fill(lengths, bins, length),
            lengths=_histogram(lengths),
            rows=tuple(seen_row(place, found, self.tokenizer) for place, found in looked_at[:num_rows]),
            embeddings=self._embeddings(examples[: max(4, num_rows)]),
        )

    def _examples(
        self, row: dict[str, Any] | BadRow, format_name: str, source: DataSource, file: FileIndex
    ) -> list[Example] | RowError:
        """The Examples of a row, or why it is bad."""
        from rayswift.data.detect import normalise
        from rayswift.data.tokenize import encode

        if isinstance(row, BadRow):
            return RowError(row.reason)
        try:
            sample = normalise(row, format_name, source)
            if sample.media and self.media is None:
                return RowError("has media, and none of the first rows had: name them in data.media.kinds")
            encoded = self.media.encode(sample, file.path) if self.media is not None else ()
        except RowError as error:
            return error
        (found,) = encode(
            [sample], self.tokenizer, max_length=self.settings.max_length, rendering=self.settings.rendering,
            truncation=self.settings.truncation, loss=self.settings.loss, media=self.media, encoded=[encoded],
        )  # fmt: skip
        return found

    def _embeddings(self, examples: list[Example]) -> tuple[EmbeddingStats, ...]:
        """Of the first rows with media; nothing where there are none, or the model is too large to load for it."""
        from rayswift.data.collate import PackedSequence, collate
        from rayswift.models.adapters import load_base
        from rayswift.models.embeddings import input_embeddings

        shown = [example for example in examples if example.media]
        if self.media is None or not shown or self.embeddings is False:
            return ()
        if self.embeddings is None and _weight_bytes(self.job.model.path) > MAX_WEIGHT_BYTES:
            return ()
        sequences = [
            PackedSequence(np.array(e.input_ids), np.array(e.loss_mask), [len(e.input_ids)], e.media, e.rope_AT)
            for e in shown
        ]
        model = load_base(self.job.model.path, dtype="float32")
        return input_embeddings(model, collate(sequences, 0), self.media.placeholders)


def _histogram(lengths: Sequence[int]) -> dict[int, int]:
    """Counts by length, in bins of equal width up to the longest."""
    width = max(1, -(-max(lengths) // _BINS))
    counts = Counter((length - 1) // width for length in lengths)
    return {(i + 1) * width: counts[i] for i in range(-(-max(lengths) // width))}


def _rows(files: list[FileIndex]) -> Iterator[tuple[str, dict[str, Any] | BadRow, FileIndex]]:
    """The rows of the files in order, each with the place it stands at and its file."""
    from rayswift.data.sources import read_rows

    for file in files:
        for span in file.spans:
            for number, line, row in read_rows(file, span):
                yield (f"{file.path}:{line}" if line is not None else f"{file.path} row {number}"), row, file


def _weight_bytes(path: str) -> int:
    """The size of the weights of a local folder; of a hub id, which would have to be fetched, more than any bound."""
    files = list(Path(path).glob("*.safetensors"))
    return sum(file.stat().st_size for file in files) if files else MAX_WEIGHT_BYTES + 1
