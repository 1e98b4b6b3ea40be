"""Rows as the model sees them: rendered, tokenized, masked, packed. Reads the first rows only; trains nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any

from rayswift import plugins
from rayswift.config.job import DataSource, Job
from rayswift.data.formats import RowError, UnusedRow
from rayswift.data.types import BadRow, Example
from rayswift.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rayswift.data.sources import FileIndex

SAMPLE_ROWS = 256
_TRAINED, _BAD, _PLAIN = "\x1b[32m", "\x1b[31m", "\x1b[0m"


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of a row that are all trained on, or all not."""

    text: str
    trained: bool


@dataclass(frozen=True)
class SeenRow:
    """A row that was looked at: its pieces and token counts, or the reason why it cannot be used."""

    place: str
    pieces: tuple[Piece, ...] = ()
    num_tokens: int = 0
    num_trained_tokens: int = 0
    bad: str | None = None


@dataclass(frozen=True)
class SeenSource:
    """A source, judged by its first 256 rows. `fill` is the share of packed positions that hold a token."""

    path: str
    format: str
    num_rows: int
    num_looked_at: int
    num_bad: int
    num_unused: int
    mean_tokens: float
    max_tokens: int
    trained_share: float
    fill: float
    rows: tuple[SeenRow, ...]


@dataclass(frozen=True)
class Preview:
    """What a job trains on."""

    method: str
    max_length: int
    sources: tuple[SeenSource, ...]

    def to_plain(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return asdict(self)

    def text(self, *, colour: bool) -> str:
        """The rows with what is trained on in green, or, without colour, between « and »."""
        return "\n".join(line for source in self.sources for line in _source_lines(source, self.max_length, colour))


def preview(job: Job, *, num_rows: int) -> Preview:
    """The first `num_rows` rows of every training source, and figures on its first 256.

    Raises ConfigError or DataError as training would.
    """
    from rayswift.data.hub_sources import settled
    from rayswift.data.inspect import preflight
    from rayswift.data.sources import index_sources
    from rayswift.models.loading import check_folder, load_tokenizer

    rendering = plugins.load("methods", job.method.name, path="method.name").rendering
    check_folder(job.model.path, chat_template=rendering == "chat")
    given = tuple(settled(source, place=f"data.train.{number}") for number, source in enumerate(job.data.train))
    files = index_sources(given)
    formats = preflight(given, files)
    tokenizer = load_tokenizer(job.model.path)
    sources = tuple(
        _see(job, source, formats[number], [f for f in files if f.source == number], tokenizer, rendering, num_rows)
        for number, source in enumerate(given)
    )
    return Preview(job.method.name, job.data.max_length, sources)


def _see(
    job: Job,
    source: DataSource,
    format_name: str,
    files: list[FileIndex],
    tokenizer: PreTrainedTokenizerBase,
    rendering: Any,
    num_rows: int,
) -> SeenSource:
    from rayswift.data.packing import fill, pack

    looked_at = [
        (place, _examples(row, format_name, source, tokenizer, job, rendering))
        for place, row in islice(_rows(files), SAMPLE_ROWS)
    ]
    examples = [example for _, found in looked_at if not isinstance(found, RowError) for example in found]
    if not examples:
        raise DataError(f"has no row that can be used: {looked_at[0][1]}", path="data.train", value=source.path)
    lengths = [len(example.input_ids) for example in examples]
    bins = pack(lengths, job.data.max_length) if job.data.packing else [[i] for i in range(len(lengths))]
    return SeenSource(
        path=source.path,
        format=format_name,
        num_rows=sum(file.num_rows for file in files),
        num_looked_at=len(looked_at),
        num_bad=sum(isinstance(found, RowError) and not isinstance(found, UnusedRow) for _, found in looked_at),
        num_unused=sum(isinstance(found, UnusedRow) for _, found in looked_at),
        mean_tokens=sum(lengths) / len(lengths),
        max_tokens=max(lengths),
        trained_share=sum(_num_trained(example) for example in examples) / sum(lengths),
        fill=fill(lengths, bins, job.data.max_length),
        rows=tuple(_seen_row(place, found, tokenizer) for place, found in looked_at[:num_rows]),
    )


def _rows(files: list[FileIndex]) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    """The rows of the files in order, each with the place it stands at."""
    from rayswift.data.sources import read_rows

    for file in files:
        for span in file.spans:
            for number, line, row in read_rows(file, span):
                yield (f"{file.path}:{line}" if line is not None else f"{file.path} row {number}"), row


def _examples(
    row: dict[str, Any] | BadRow,
    format_name: str,
    source: DataSource,
    tokenizer: PreTrainedTokenizerBase,
    job: Job,
    rendering: Any,
) -> list[Example] | RowError:
    """The Examples of a row, or why it is bad."""
    from rayswift.data.detect import normalise
    from rayswift.data.loss_rule import rule_of
    from rayswift.data.tokenize import encode

    if isinstance(row, BadRow):
        return RowError(row.reason)
    try:
        sample = normalise(row, format_name, source)
    except RowError as error:
        return error
    data = job.data
    rule = rule_of(data, everything=rendering == "text")
    (found,) = encode(
        [sample], tokenizer, max_length=data.max_length, rendering=rendering, truncation=data.truncation, loss=rule
    )
    return found


def _seen_row(place: str, found: list[Example] | RowError, tokenizer: PreTrainedTokenizerBase) -> SeenRow:
    if isinstance(found, RowError):
        return SeenRow(place, bad=str(found))
    pieces = [piece for example in found for piece in _pieces(example, tokenizer)]
    return SeenRow(place, tuple(pieces), sum(len(e.input_ids) for e in found), sum(map(_num_trained, found)))


def _num_trained(example: Example) -> int:
    """Tokens that count for anything, whatever they count."""
    return sum(weight > 0 for weight in example.loss_mask)


def _pieces(example: Example, tokenizer: PreTrainedTokenizerBase) -> Iterator[Piece]:
    """The decoded runs of trained and untrained tokens: what the mask says, not what the template meant."""
    pairs = zip(example.input_ids, example.loss_mask, strict=True)
    for trained, run in groupby(pairs, key=lambda pair: bool(pair[1])):
        yield Piece(str(tokenizer.decode([token for token, _ in run])), trained)


def _source_lines(source: SeenSource, max_length: int, colour: bool) -> Iterator[str]:
    unused = f"{source.num_unused} of no use, " if source.num_unused else ""
    yield f"{source.path}: {source.num_rows} rows, format {source.format}"
    yield (
        f"  first {source.num_looked_at}: {source.num_bad} bad, {unused}{source.mean_tokens:.0f} tokens on average, "
        f"{source.max_tokens} at most, {source.trained_share:.0%} trained on; "
        f"sequences of {max_length} are {source.fill:.0%} full"
    )
    for row in source.rows:
        yield f"-- {row.place}: {row.num_tokens} tokens, {row.num_trained_tokens} trained on"
        yield (_BAD + str(row.bad) + _PLAIN if colour else f"bad: {row.bad}") if row.bad else _row_text(row, colour)


def _row_text(row: SeenRow, colour: bool) -> str:
    before, after = (_TRAINED, _PLAIN) if colour else ("«", "»")
    return "".join(f"{before}{piece.text}{after}" if piece.trained else piece.text for piece in row.pieces)
