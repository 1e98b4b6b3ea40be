"""The rows a model is judged on: found, indexed and read as those of its job, and the questions among them.

Knows what a question is: a conversation up to its last answer. Knows no model and no tokenizer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from rayswift.config.job import DataSource, DataSpec, MixingSpec
from rayswift.data.as_trained import as_trained
from rayswift.data.detect import normalise
from rayswift.data.formats import RowError, UnusedRow
from rayswift.data.hub_sources import settled
from rayswift.data.inspect import OpenedSources, open_sources
from rayswift.data.media import MARKS
from rayswift.data.quarantine import place
from rayswift.data.rendering import Rendering, last_answer
from rayswift.data.row_keys import key_of
from rayswift.data.sources import FileIndex, bad_row, read_rows
from rayswift.data.stream import StreamPlan
from rayswift.data.types import BadRow, Sample

_FIELD = "--rows"


@dataclass(frozen=True)
class Rows:
    """One source of rows, opened."""

    opened: OpenedSources

    @property
    def source(self) -> DataSource:
        """Where they are from."""
        return self.opened.sources[0]

    @property
    def files(self) -> tuple[FileIndex, ...]:
        """The files they stand in."""
        return self.opened.files

    @property
    def format(self) -> str:
        """The format they have."""
        return self.opened.formats[0]

    @property
    def num_rows(self) -> int:
        """All of them, bad ones included."""
        return sum(file.num_rows for file in self.files)

    def stream(self, max_length: int, data: DataSpec | None, rendering: Rendering | None) -> StreamPlan:
        """The rows once, in file order, a document per sequence, and what of them counts as `data` of a job says.

        Without a job answers of conversations count, and all of a text.
        """
        own = {"packing": False, "shuffle": False, "mixing": MixingSpec(), "cache": None, "max_length": max_length}
        data = (data or DataSpec(train=self.opened.sources)).model_copy(update=own)
        return self.opened.stream(data, rendering or "chat")

    def samples(self) -> Iterator[tuple[int, BadRow, Sample | None]]:
        """(key, the row as a BadRow without or with a reason, the row as a Sample or None) of each row."""
        for number, file in enumerate(self.files):
            for span in file.spans:
                for row, line, value in read_rows(file, span):
                    yield key_of(number, row), *self._sample(file, row, line, value)

    def _sample(
        self, file: FileIndex, row: int, line: int | None, value: dict[str, Any] | BadRow
    ) -> tuple[BadRow, Sample | None]:
        if isinstance(value, BadRow):
            return value, None
        try:
            sample = normalise(value, self.format, self.source)
            if sample.label is False:
                raise UnusedRow("is labelled as an answer not to give")
        except RowError as error:
            return bad_row(file, row, line, str(error)), None
        return bad_row(file, row, line, ""), sample


def open_rows(path: str, *, format_name: str = "auto", limit: int | None = None, data: DataSpec | None = None) -> Rows:
    """The rows at a path, glob, folder, URL or hub id, the first `limit` of them, read as `data` of a job says.

    Raises ConfigError where there are none or their format is unknown, DataError when none of the first can be used.
    """
    source, kinds = as_trained(DataSource(path=path, format=format_name, limit=limit), data)
    return Rows(open_sources((settled(source, place=_FIELD),), path=_FIELD, kinds=kinds))


@dataclass(frozen=True)
class Question:
    """A conversation that a model is to answer, and the answer of its row."""

    place: str
    chat: list[dict[str, Any]]
    tools: tuple[dict[str, Any], ...]
    expected: str
    sample: Sample
    """The row, with its media."""
    file: str
    """The file it stands in, from whose folder the paths of media start."""

    @property
    def num_media(self) -> int:
        """How many of the row's media, the first ones, are in the question."""
        contents = [str(turn.get("content") or "") for turn in self.chat]
        return sum(content.count(mark) for content in contents for mark in MARKS.values())


@dataclass(frozen=True)
class Conversations:
    """The questions of rows, which rows cannot be used, and which of the others are not asked, with the reasons."""

    questions: list[Question] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    not_asked: list[str] = field(default_factory=list)


def conversations(rows: Rows, unusable: Collection[int] = ()) -> Conversations:
    """What there is to ask. Rows whose keys are `unusable` are left out: they were refused before, and told then.

    Texts are no questions; nothing is said of them.
    """
    found = Conversations()
    for key, about, sample in rows.samples():
        if key in unusable:
            continue
        if sample is None:
            found.refused.append(f"{place(about)}: {about.reason}")
        elif sample.messages:
            asked = _question(about, sample)
            if isinstance(asked, Question):
                found.questions.append(asked)
            else:
                found.not_asked.append(f"{place(about)}: {asked}")
    return found


def _question(about: BadRow, sample: Sample) -> Question | str:
    """The question of a conversation, or why it has none."""
    last = last_answer(sample)
    if last is None:
        return "has no answer to compare with"
    chat, answer = last
    if answer.get("tool_calls"):
        return "ends in a tool call, which is no text to compare with"
    expected = str(answer["content"])
    if not expected.strip():
        return "has an empty answer"
    return Question(place(about), chat, sample.tools, expected, sample, about.file)
