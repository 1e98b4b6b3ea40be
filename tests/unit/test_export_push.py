"""Publishing an export to a hub, against a stand-in that speaks the hub's protocol for uploads."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from base64 import b64decode
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from rayswift import cli
from rayswift.errors import ConfigError, ExportError
from rayswift.export.manifest import MANIFEST
from rayswift.export.push import push
from rayswift.serving.versions import version_of
from tests.export_cases import export

# huggingface_hub 1.33 hands httpx the bytes of a large object in the older way.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")


class _Hub(ThreadingHTTPServer):
    """Repositories, large objects and commits, as far as an upload needs them."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, Any] = {}
        self.objects: dict[str, bytes] = {}
        self.files: dict[str, bytes] = {}
        self.message, self.status, self.is_public = "", 0, False
        self.branches = {"main"}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: _Hub
    protocol_version = "HTTP/1.1"

    def _reply(self, body: Any, status: int = 200, headers: Mapping[str, str] = MappingProxyType({})) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_GET(self) -> None:
        if self.server.status:
            self._reply({"error": "not for you"}, self.server.status)
            return
        if "/revision/" in self.path and self.path.rpartition("/")[2] not in self.server.branches:
            self._reply({"error": "no such revision"}, 404, {"X-Error-Code": "RevisionNotFound"})
            return
        info = {"siblings": [{"rfilename": name} for name in self.server.files], "id": "team/model", "sha": "0" * 40,
                "tags": [], "private": not self.server.is_public}  # fmt: skip
        self._reply(info if "/tree/" not in self.path else [])

    def do_PUT(self) -> None:
        content = self._body()
        self.server.objects[hashlib.sha256(content).hexdigest()] = content
        self._reply({})

    def do_POST(self) -> None:
        body, hub = self._body(), self.server
        if hub.status:
            self._reply({"error": "not for you"}, hub.status)
        elif self.path == "/api/repos/create":
            hub.repos = json.loads(body)
            self._reply({"url": f"{hub.url}/team/model"})
        elif self.path == "/api/validate-yaml":
            self._reply({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self._reply({"files": [{"path": file["path"], "shouldIgnore": False, "oid": None,
                        "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular"}
                        for file in files]})  # fmt: skip
        elif self.path.endswith("/objects/batch"):
            objects = json.loads(body)["objects"]
            self._reply({"transfer": "basic", "objects": [
                {**one, "actions": {"upload": {"href": f"{hub.url}/put/{one['oid']}", "header": {}}}}
                for one in objects]})  # fmt: skip
        elif "/branch/" in self.path:
            hub.branches.add(self.path.rpartition("/")[2])
            self._reply({})
        elif "/commit/" in self.path and self.path.rpartition("/")[2] not in hub.branches:
            self._reply({"error": "no such revision"}, 404, {"X-Error-Code": "RevisionNotFound"})
        elif "/commit/" in self.path:
            self._commit([json.loads(line) for line in body.splitlines() if line.strip()])
            self._reply({"commitUrl": f"{hub.url}/team/model/commit/{'a' * 40}", "commitOid": "a" * 40,
                         "success": True})  # fmt: skip
        else:
            self._reply({"error": self.path}, 404)

    def _commit(self, lines: list[Any]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.server.message = value["summary"]
            elif line["key"] == "file":
                self.server.files[value["path"]] = b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.files[value["path"]] = self.server.objects[value["oid"]]

    def log_message(self, *_: Any) -> None:
        return None


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Hub]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # speak of objects in plain HTTP
    monkeypatch.setenv("HF_TOKEN", "hf_for_tests")
    server = _Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def folder(tmp_path: Path, tiny_model_dir: Path) -> Path:
    export(str(tiny_model_dir), str(tmp_path / "out"))
    return tmp_path / "out"


def test_an_export_is_published_whole_and_unchanged(hub: _Hub, folder: Path) -> None:
    done = push(str(folder), "team/model", endpoint=hub.url)
    assert hub.files == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert hub.repos["name"] == "model"
    assert (hub.repos["organization"], hub.repos.get("private", hub.repos.get("visibility"))) in [
        ("team", True), ("team", "private"),
    ]  # fmt: skip
    assert (done.version, done.commit) == (version_of(folder), "a" * 40)
    assert done.version in hub.message


def test_a_branch_that_is_not_there_is_made(hub: _Hub, folder: Path) -> None:
    for _ in range(2):
        push(str(folder), "team/model", branch="team/next", endpoint=hub.url)
    assert hub.branches == {"main", "team%2Fnext"}
    assert MANIFEST in hub.files


def test_what_is_not_verified_or_has_changed_is_not_published(
    hub: _Hub, folder: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    export(str(tiny_model_dir), str(tmp_path / "unproved"), verify=False)
    with pytest.raises(ExportError, match="never verified"):
        push(str(tmp_path / "unproved"), "team/model", endpoint=hub.url)
    with pytest.raises(ExportError, match=MANIFEST):
        push(str(tiny_model_dir), "team/model", endpoint=hub.url)
    (folder / "config.json").write_text("{}")
    with pytest.raises(ExportError, match=r"config\.json"):
        push(str(folder), "team/model", endpoint=hub.url)
    with pytest.raises(ConfigError, match="ORG/NAME"):
        push(str(folder), "team/../model", endpoint=hub.url)
    assert not hub.files


def test_a_refusal_of_the_hub_is_told(hub: _Hub, folder: Path) -> None:
    hub.status = 403
    with pytest.raises(ExportError, match=r"refused by the hub \(403\).*hf auth login"):
        push(str(folder), "team/model", endpoint=hub.url)
    assert not hub.files


@pytest.mark.parametrize("name", [MANIFEST, "rayswift_adapter.json"])
def test_an_export_takes_the_place_of_an_older_one(hub: _Hub, folder: Path, name: str) -> None:
    hub.files = {".gitattributes": b"", name: b"{}", "model.safetensors": b"old"}
    push(str(folder), "team/model", endpoint=hub.url)
    assert hub.files["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_files_that_are_no_export_are_replaced_only_where_that_is_asked_for(hub: _Hub, folder: Path) -> None:
    hub.files = {".gitattributes": b"", "paper.pdf": b"years of work", "train.py": b""}
    before = dict(hub.files)
    with pytest.raises(ConfigError, match=r"REPO=team/model has 2 files .* among them paper\.pdf.*--force"):
        push(str(folder), "team/model", endpoint=hub.url)
    assert hub.files == before
    push(str(folder), "team/model", endpoint=hub.url, force=True)
    assert hub.files[MANIFEST] == (folder / MANIFEST).read_bytes()


@pytest.mark.parametrize(("is_public", "asked"), [(True, False), (True, True), (False, False)])
def test_a_repository_that_is_public_unasked_is_told_of(
    hub: _Hub, folder: Path, capsys: pytest.CaptureFixture[str], is_public: bool, asked: bool
) -> None:
    hub.is_public = is_public
    push(str(folder), "team/model", endpoint=hub.url, public=asked)
    assert ("team/model is public" in capsys.readouterr().err) == (is_public and not asked)


def test_a_hub_that_is_not_there_is_told_of(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the client of today, whose errors are httpx's own and no OSError."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", url)
        with pytest.raises(SystemExit) as caught:
            cli.main(["push", str(folder), "team/model"])
    told = capsys.readouterr().err
    assert caught.value.code == 5, told
    assert f"REPO=team/model could not be uploaded to {url}: " in told
    assert "check the network and HF_ENDPOINT" in told
