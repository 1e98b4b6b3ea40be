"""Sources opened in one step: found, indexed and looked at, with errors that name the place they were given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rayswift.config.job import DataSource, DataSpec
from rayswift.data.inspect import open_sources
from rayswift.errors import ConfigError, DataError
from tests.data_cases import write_jsonl

TURNS = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I"}]
SEEN = [{"role": "user", "content": "<image>Who?"}, {"role": "assistant", "content": "I"}]


def source(folder: Path, name: str, *rows: Any) -> DataSource:
    return DataSource(path=str(write_jsonl(folder / name, rows)))


@pytest.mark.parametrize("place", ["data.train", "data.eval", "--rows"])
def test_errors_call_the_sources_what_they_were_called(tmp_path: Path, place: str) -> None:
    good = source(tmp_path, "good.jsonl", {"messages": TURNS})
    named = place if place.startswith("--") else rf"{place}\.1\.path"  # a command's option has one source
    with pytest.raises(ConfigError, match=rf"^{named}=.*gone\.jsonl does not exist"):
        open_sources((good, DataSource(path=str(tmp_path / "gone.jsonl"))), path=place)
    with pytest.raises(ConfigError, match=rf"^{named}=.*empty\.jsonl has no rows"):
        open_sources((good, source(tmp_path, "empty.jsonl")), path=place)
    with pytest.raises(DataError, match=r"bad\.jsonl:1: is not JSON"):
        open_sources((good, source(tmp_path, "bad.jsonl", "{")), path=place)


def test_a_stream_over_them_has_all_rows_and_their_media(tmp_path: Path) -> None:
    sources = (
        source(tmp_path, "a.jsonl", {"messages": TURNS}, {"messages": TURNS}),
        source(tmp_path, "b.jsonl", {"messages": SEEN, "images": ["a.png"]}),
    )
    opened = open_sources(sources)
    assert (opened.formats, opened.media_kinds) == (("messages", "messages"), ("image",))
    plan = opened.stream(DataSpec(train=sources, max_length=77), "chat", epochs=2, seed=3)
    assert (plan.files, plan.sources, plan.num_rows_total) == (opened.files, sources, 6)
    settings = plan.settings
    assert (settings.max_length, settings.seed, settings.media_kinds) == (77, 3, ("image",))


def test_kinds_that_are_said_are_not_looked_for(tmp_path: Path) -> None:
    rows = source(tmp_path, "a.jsonl", {"messages": SEEN, "images": ["a.png"]})
    assert open_sources((rows,), kinds=("video",)).media_kinds == ("video",)
    assert open_sources((rows,), kinds=()).media_kinds == ()
