"""Where the bytes of a medium may come from, and that nothing is read beyond the bounds."""

from __future__ import annotations

import base64
import os
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest

from rayswift.config.job import MediaSpec
from rayswift.data.formats import RowError
from rayswift.data.media import reading
from rayswift.data.types import Medium

SPEC = MediaSpec()
OUTSIDE = MediaSpec(allow_outside=True)
URLS = MediaSpec(allow_urls=True)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """The data file of a dataset with a picture beside it, and a secret beside its folder."""
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "a.png").write_bytes(b"picture")
    (folder / "empty.png").touch()
    (tmp_path / "data2").mkdir()
    (tmp_path / "data2" / "b.png").write_bytes(b"neighbour")
    (tmp_path / "secret").write_bytes(b"secret")
    return folder / "rows.jsonl"


def read(source: str | bytes, rows: Path | str, spec: MediaSpec = SPEC) -> bytes:
    return reading.read(Medium("image", source), str(rows), spec)


def test_a_path_starts_from_the_folder_of_the_data_file(rows: Path) -> None:
    assert read("images/a.png", rows) == b"picture"
    assert read("./images/../images/a.png", rows) == b"picture"
    assert read(str(rows.parent / "images" / "a.png"), rows) == b"picture"
    assert read(f"file://{rows.parent}/images/a.png", rows) == b"picture"


@pytest.mark.parametrize("source", ["../secret", "images/../../secret", "../data2/b.png", "{}/secret", "{}/data2/b.png",
                                    "file://{}/secret", "file://{}/data/../secret"])  # fmt: skip
def test_a_path_does_not_leave_the_folder_unless_allowed(rows: Path, source: str) -> None:
    source = source.format(rows.parent.parent)
    with pytest.raises(RowError, match=r"outside of .*data: set data\.media\.folder .* or data\.media\.allow_outside"):
        read(source, rows)
    assert read(source, rows, OUTSIDE) in (b"secret", b"neighbour")


def test_a_link_does_not_lead_out_of_the_folder_unless_allowed(rows: Path) -> None:
    (rows.parent / "link.png").symlink_to("../secret")
    (rows.parent / "up").symlink_to("..")
    (rows.parent / "inside.png").symlink_to("images/a.png")
    for source in ("link.png", "up/secret"):
        with pytest.raises(RowError, match="outside of"):
            read(source, rows)
        with pytest.raises(RowError, match="outside of"):
            read(source, rows, MediaSpec(folder=f"file://{rows.parent}"))
        assert read(source, rows, OUTSIDE) == b"secret"
    assert read("inside.png", rows) == b"picture"


def test_a_name_that_fsspec_would_take_for_a_chain_of_urls_is_a_name(rows: Path) -> None:
    (rows.parent / "link").symlink_to("../secret")
    with pytest.raises(RowError, match="does not exist"):
        read("link::x", rows)
    (rows.parent / "a::b.png").write_bytes(b"colons")
    assert read("a::b.png", rows) == b"colons"


def test_a_linked_folder_of_data_is_its_own_place(rows: Path) -> None:
    (rows.parent.parent / "linked").symlink_to("data")
    assert read("images/a.png", rows.parent.parent / "linked" / "rows.jsonl") == b"picture"


def test_the_folder_can_be_named(rows: Path) -> None:
    for folder in (f"{rows.parent.parent}/data2", f"{rows.parent.parent}/data2/"):
        assert read("b.png", rows, MediaSpec(folder=folder)) == b"neighbour"
    with pytest.raises(RowError, match="outside of"):
        read("../secret", rows, MediaSpec(folder=str(rows.parent)))


@pytest.mark.parametrize(("source", "reason"), [
    ("images/none.png", "has the image images/none.png, which does not exist"),
    ("none/a.png", "which does not exist"),
    ("images", "has the image images, which cannot be read: it is no file"),
    ("images/a.png/b", "which cannot be read"),
    ("empty.png", "has an empty image"),
])  # fmt: skip
def test_what_cannot_be_read_is_named(rows: Path, source: str, reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        read(source, rows)


def test_a_pipe_is_not_waited_for(rows: Path) -> None:
    os.mkfifo(rows.parent / "pipe.png")
    with pytest.raises(RowError, match="it is no file"):
        read("pipe.png", rows)


def test_a_large_file_is_refused_by_its_size_and_not_read(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (rows.parent / "large.png").open("wb") as file:
        file.truncate(1 << 40)  # a hole: reading it would fill the memory

    def opened(*_: Any) -> Any:
        raise AssertionError("it was opened")

    monkeypatch.setattr("builtins.open", opened)
    with pytest.raises(RowError, match=rf"has an image of {1 << 40} bytes or more, over data\.media\.max_bytes=100"):
        read("large.png", rows, MediaSpec(max_bytes=100))


def test_the_bound_is_the_last_size_that_is_read(rows: Path) -> None:
    assert read("images/a.png", rows, MediaSpec(max_bytes=7)) == b"picture"
    for source in ("images/a.png", b"picture", f"data:;base64,{base64.b64encode(b'picture').decode()}"):
        with pytest.raises(RowError, match=r"over data\.media\.max_bytes=6"):
            read(source, rows, MediaSpec(max_bytes=6))


def test_a_data_uri_is_its_own_file(rows: Path) -> None:
    body = base64.b64encode(b"picture").decode()
    assert read(f"data:image/png;base64,{body}", rows) == b"picture"
    assert read(f"data:;base64,{body}", rows) == b"picture"


@pytest.mark.parametrize(("uri", "reason"), [
    ("data:image/png,abc", "not base64"), ("data:image/png;base64", "not base64"),
    ("data:image/png;base64,a*b=", "not base64"), ("data:image/png;base64,abc", "not base64"),
    ("data:image/png;base64,", "has an empty image"),
])  # fmt: skip
def test_a_bad_data_uri_is_refused(rows: Path, uri: str, reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        read(uri, rows)


def test_bytes_of_the_row_are_taken_as_they_are(rows: Path) -> None:
    assert read(b"picture", rows) == b"picture"
    with pytest.raises(RowError, match="has an empty image"):
        read(b"", rows)


@pytest.fixture
def remote() -> Iterator[str]:
    """A folder in another file system than the local one."""
    memory = fsspec.filesystem("memory")
    memory.pipe({"/media/data/a.png": b"picture", "/media/data/deep/b.png": b"deeper", "/media/secret": b"secret"})
    yield "memory://media/data"
    memory.rm("/media", recursive=True)


def test_a_remote_dataset_is_read_from_its_own_folder(remote: str) -> None:
    rows = f"{remote}/rows.jsonl"
    assert read("a.png", rows) == b"picture"
    assert read(f"{remote}/deep/../deep/b.png", rows) == b"deeper"
    assert read("b.png", rows, MediaSpec(folder=f"{remote}/deep/")) == b"deeper"
    for source in ("../secret", "deep/../../secret", "memory://media/secret", f"{remote}/../secret", "%2e%2e/secret"):
        with pytest.raises(RowError, match=f"outside of {remote}"):
            read(source, rows)
    assert read("../secret", rows, OUTSIDE) == b"secret"
    with pytest.raises(RowError, match=r"has the image c\.png, which does not exist"):
        read("c.png", rows)
    with pytest.raises(RowError, match=r"image of 7 bytes or more, over data\.media\.max_bytes=3"):
        read("a.png", rows, MediaSpec(max_bytes=3))


def test_a_local_dataset_reads_no_other_file_system_unless_allowed(rows: Path, remote: str) -> None:
    with pytest.raises(RowError, match="outside of"):
        read(f"{remote}/a.png", rows)
    assert read(f"{remote}/a.png", rows, OUTSIDE) == b"picture"


@pytest.fixture
def server(rows: Path) -> Iterator[str]:
    """The URL of the folder beside the data file."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(rows.parent.parent))) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_a_url_is_fetched_only_where_the_job_allows_it(rows: Path, server: str) -> None:
    with pytest.raises(RowError, match=r"names a URL, which is not fetched: .* data\.media\.allow_urls=true"):
        read(f"{server}/data/images/a.png", rows, OUTSIDE)
    assert read(f"{server}/data/images/a.png", rows, URLS) == b"picture"
    with pytest.raises(RowError, match="which cannot be found"):
        read(f"{server}/data/none.png", rows, URLS)
    with pytest.raises(RowError, match=r"over data\.media\.max_bytes=3"):
        read(f"{server}/data/images/a.png", rows, MediaSpec(allow_urls=True, max_bytes=3))


def test_a_dataset_on_the_web_has_its_media_beside_it(server: str) -> None:
    rows = f"{server}/data/rows.jsonl"
    assert read("images/a.png", rows) == b"picture"
    assert read(f"{server}/data/images/a.png", rows) == b"picture"
    for source in (f"{server}/data2/b.png", f"{server}/data/../secret", f"{server}/data/%2e%2e/secret"):
        with pytest.raises(RowError, match="names a URL, which is not fetched"):
            read(source, rows)
    for source in ("../secret", "%2e%2e/secret"):
        with pytest.raises(RowError, match="outside of"):
            read(source, rows)


def test_a_server_that_is_not_there_is_a_bad_row(rows: Path) -> None:
    with pytest.raises(RowError, match=r"which cannot be found: .*127\.0\.0\.1:9"):
        read("http://127.0.0.1:9/a.png", rows, URLS)
