"""A stand-in for the hubs that speaks their protocols over HTTP: datasets with commits, branches and large files.

What it answers is what Hugging Face's hub and ModelScope answer to the requests of their own clients; the tests of
`rayswift.data.hubs` and of sources on hubs talk to it.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from rayswift.data import hub_copies, paths


@dataclass
class HubDataset:
    """A dataset of a hub. `large` files are kept outside of git; `lies` are what is sent instead of what is there."""

    commits: dict[str, dict[str, bytes]]
    branches: dict[str, str]
    large: tuple[str, ...] = (".parquet", ".tar")
    gated: bool = False
    knows_commits: bool = True
    lies: dict[str, bytes] = field(default_factory=dict)

    def commit(self, revision: str) -> str | None:
        """The commit of a branch, or a commit itself."""
        return self.branches.get(revision, revision if revision in self.commits else None)


def commit_name(number: int) -> str:
    """40 hexadecimal digits."""
    return hashlib.sha1(b"%d" % number).hexdigest()


def git_sha1(content: bytes) -> str:
    """As `git hash-object` has it."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Hub(BaseHTTPRequestHandler):
    datasets: ClassVar[dict[str, HubDataset]]
    requests: ClassVar[list[str]]

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> None:
        url = urlsplit(self.path)
        self.requests.append(self.path)
        path, query = url.path.strip("/"), {key: one[0] for key, one in parse_qs(url.query).items()}
        if path.startswith("api/v1/datasets/"):
            self._modelscope(path.removeprefix("api/v1/datasets/"), query)
        else:
            self._hugging_face(path.removeprefix("api/").removeprefix("datasets/"), api=path.startswith("api/"))

    def _hugging_face(self, path: str, *, api: bool) -> None:
        parts = [unquote(part) for part in path.split("/")]  # a revision may have slashes of its own
        repo, rest = "/".join(parts[:2]), parts[2:]
        dataset = self.datasets.get(repo)
        if dataset is None:
            return self._refuse(401, "RepoNotFound")
        revision = rest[1] if len(rest) > 1 else "main"
        commit = dataset.commit(revision)
        if commit is None:
            return self._refuse(404, "RevisionNotFound")
        files = dataset.commits[commit]
        if api and rest[:1] == ["tree"]:
            if dataset.gated:
                return self._refuse(403, "GatedRepo")
            return self._json([self._entry(dataset, name, files[name]) for name in sorted(files)])
        if api:
            return self._json({"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in files]})
        name = "/".join(rest[2:])
        if name not in files:
            return self._refuse(404, "EntryNotFound")
        large = name.endswith(dataset.large)
        etag = hashlib.sha256(files[name]).hexdigest() if large else git_sha1(files[name])
        self._send(dataset.lies.get(name, files[name]), {"X-Repo-Commit": commit, "ETag": f'"{etag}"'})

    @staticmethod
    def _entry(dataset: HubDataset, name: str, content: bytes) -> dict[str, Any]:
        entry = {"type": "file", "path": name, "size": len(content), "oid": git_sha1(content)}
        lfs = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return entry | ({"lfs": lfs} if name.endswith(dataset.large) else {})

    def _modelscope(self, path: str, query: dict[str, str]) -> None:
        parts = [unquote(part) for part in path.split("/")]
        names = sorted(self.datasets)
        repo = names[int(parts[0])] if parts[0].isdigit() else "/".join(parts[:2])
        rest = parts[1:] if parts[0].isdigit() else parts[2:]
        dataset = self.datasets.get(repo)
        if dataset is None or (dataset.gated and "m_session_id=good" not in self.headers.get("Cookie", "")):
            return self._json({"Code": 10010205001, "Message": "no such dataset"}, 403 if dataset else 404)
        if not rest:
            return self._json({"Code": 200, "Data": {"Id": names.index(repo), "Type": 1}})
        revision = query.get("Ref") or query.get("Revision") or "master"
        commit = dataset.commit(revision)
        if commit is None or (revision in dataset.commits and not dataset.knows_commits):
            return self._json({"Code": 10010202007, "Message": f"no revision {revision}"}, 404)
        files = dataset.commits[commit]
        if rest == ["commits"]:
            return self._json({"Code": 200, "Data": {"Commit": [{"Id": commit}]}, "TotalCount": 1})
        if rest == ["repo", "tree"]:
            folders = {name.rpartition("/")[0] for name in files} - {""}
            entries = [{"Type": "tree", "Path": folder, "Name": folder, "Size": 0} for folder in sorted(folders)]
            entries += [
                {"Type": "blob", "Path": name, "Size": len(content), "Sha256": hashlib.sha256(content).hexdigest()}
                for name, content in sorted(files.items())
            ]
            size, page = int(query["PageSize"]), int(query["PageNumber"])
            return self._json({"Code": 200, "Data": {"Files": entries[(page - 1) * size : page * size]}})
        name = query["FilePath"]
        return self._send(dataset.lies.get(name, files[name]), {})

    def _json(self, content: Any, status: int = 200) -> None:
        self._send(json.dumps(content).encode(), {"Content-Type": "application/json"}, status)

    def _refuse(self, status: int, code: str) -> None:
        self._send(b"", {"X-Error-Code": code}, status)

    def _send(self, content: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Silence: the requests are asserted on."""


@dataclass(frozen=True)
class StandIn:
    """A hub that runs: its address, the requests it got, and its datasets, which may be changed."""

    url: str
    requests: list[str]
    datasets: dict[str, HubDataset]


@contextmanager
def serve_hub(datasets: dict[str, HubDataset]) -> Iterator[StandIn]:
    """A stand-in for both hubs with these datasets, until the block is left."""
    handler = type("Hub", (_Hub,), {"datasets": datasets, "requests": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield StandIn(f"http://127.0.0.1:{server.server_address[1]}", handler.requests, datasets)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def point_at(monkeypatch: pytest.MonkeyPatch, url: str, folder: Path, *, offline: bool = False) -> None:
    """As a new process would begin: with a hub at `url`, caches below `folder`, and nothing remembered."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", url)
    monkeypatch.setenv("RAYSWIFT_CACHE", str(folder / "ours"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "theirs"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    hub_copies.tree_of.cache_clear()
    paths._filesystem.cache_clear()
