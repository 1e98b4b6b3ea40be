"""ModelScope, or another under MODELSCOPE_ENDPOINT or MODELSCOPE_DOMAIN, by the HTTP interface that its client uses.

    GET /api/v1/datasets/ORG/NAME                                the dataset and its number
    GET /api/v1/datasets/ORG/NAME/commits?Ref=REVISION           its commits, the newest first
    GET /api/v1/datasets/NUMBER/repo/tree?Revision=...           its files, by pages
    GET /api/v1/datasets/ORG/NAME/repo?Revision=...&FilePath=... the bytes of a file

Its client asks for branches and tags only. So a commit is asked for first; where the hub does not know it by its hash,
the branch is, as long as that still stands at the commit. Files are checked by their sha256 either way,
one that the hub lists without by its size.
"""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any, ClassVar
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

from rayswift.data.hubs import HubError, HubFile, Pin, check, keep, listed, records, ref

_PAGE = 100
_TIMEOUT_S = 60
_BLOCK_BYTES = 1 << 20


class _Refused(Exception):
    """The hub answered, and not with what was asked for. `code` is of HTTP, which the answer may only say inside."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Ms:
    """Files lie below `RAYSWIFT_CACHE`, laid out as huggingface_hub lays them out."""

    default_revision: ClassVar[str] = "master"

    def commit(self, repo: str, revision: str) -> str:
        """As `Hub.commit`."""
        path = ref(records("ms", repo), revision or self.default_revision)
        try:
            found = _head(repo, revision or self.default_revision)
        except (OSError, HTTPException, ValueError) as error:
            if path.exists():
                return path.read_text()
            raise _unreachable(error) from error
        with suppress(OSError):  # a cache that cannot be written to is found out where files must go
            keep(path, found.encode())
        return found

    def files(self, repo: str, pin: Pin) -> list[HubFile]:
        """As `Hub.files`."""
        try:
            return listed(records("ms", repo), pin.commit, lambda: self._tree(repo, pin))
        except (OSError, HTTPException, ValueError) as error:
            raise _unreachable(error) from error

    def download(self, repo: str, pin: Pin, file: HubFile) -> str:
        """As `Hub.download`."""
        local = records("ms", repo) / "snapshots" / pin.commit / file.path
        if local.exists():
            return str(local)
        try:
            self._fetch(repo, pin, file, local)
        except (OSError, HTTPException) as error:
            raise _unreachable(error) from error
        return str(local)

    def _tree(self, repo: str, pin: Pin) -> list[HubFile]:
        number = _dataset(repo)["Id"]
        try:
            return _pages(number, pin.commit)
        except _Refused as error:
            return _pages(number, self._standing(repo, pin, error))

    def _fetch(self, repo: str, pin: Pin, file: HubFile, local: Path) -> None:
        query = {"Source": "SDK", "FilePath": file.path, "View": "False"}
        try:
            answer = _open(f"{repo}/repo", {"Revision": pin.commit} | query)
        except _Refused as error:
            answer = _open(f"{repo}/repo", {"Revision": self._standing(repo, pin, error)} | query)
        local.parent.mkdir(parents=True, exist_ok=True)
        with answer, tempfile.NamedTemporaryFile(dir=local.parent, prefix=".", delete=False) as stream:
            while block := answer.read(_BLOCK_BYTES):
                stream.write(block)
        try:
            check(file, stream.name, f"{repo}/{file.path}")
        except Exception:
            os.remove(stream.name)
            raise
        os.replace(stream.name, local)

    def _standing(self, repo: str, pin: Pin, refused: _Refused) -> str:
        """The name of the branch or tag of a pin. Raises HubError when it stands somewhere else by now."""
        name = pin.name or self.default_revision
        if name == pin.commit or _head(repo, name) != pin.commit:
            rule = f"stood at the commit {pin.commit}, which the hub does not give any more: {refused}"
            raise HubError(rule, "name a revision that it has, or local files, in a new run") from refused
        return name


def _head(repo: str, revision: str) -> str:
    """The newest commit of a branch or tag. Raises HubError for a dataset or revision that the hub does not have."""
    _dataset(repo)
    try:
        answer = _json(f"{repo}/commits", {"Ref": revision, "PageNumber": 1, "PageSize": 1})
        return str((answer or {})["Commit"][0]["Id"])
    except (_Refused, LookupError, TypeError) as error:
        raise HubError(f"has no revision {revision} on ModelScope", "check the part behind @") from error


def _dataset(repo: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = _json(repo, {})
    except _Refused as error:
        if error.code in (401, 403):
            raise HubError(
                "is private or gated on ModelScope", "accept its terms there and set MODELSCOPE_API_TOKEN"
            ) from error
        raise HubError(f"is no dataset on ModelScope ({error})", "check the spelling") from error
    return found


def _pages(number: Any, revision: str) -> list[HubFile]:
    found: list[HubFile] = []
    page, more = 1, True
    while more:
        query = {"Revision": revision, "Root": "/", "Recursive": "True", "PageNumber": page, "PageSize": _PAGE}
        entries = (_json(f"{number}/repo/tree", query) or {}).get("Files") or []
        files = [file for file in entries if file.get("Type") != "tree"]
        if outside := [str(file["Path"]) for file in files if {"..", ""} & set(str(file["Path"]).split("/"))]:
            raise HubError(f"has the file {outside[0]}, which would lie outside of it", "use another dataset")
        found += [HubFile(file["Path"], int(file["Size"]), file.get("Sha256") or None) for file in files]
        page, more = page + 1, len(entries) == _PAGE
    return found


def _json(path: str, query: dict[str, Any]) -> Any:
    """The data in an answer, whose code counts as HTTP's does."""
    with _open(path, query) as answer:
        content = json.load(answer)
    if content.get("Code") != 200:
        raise _Refused(int(content.get("Code") or 0), str(content.get("Message") or "no reason given"))
    return content.get("Data")


def _open(path: str, query: dict[str, Any]) -> Any:
    """The open answer. Raises _Refused where the hub answers with an error, and OSError where nobody answers."""
    token = os.environ.get("MODELSCOPE_API_TOKEN")
    url = f"{_endpoint()}/api/v1/datasets/{path}{'?' if query else ''}{urlencode(query)}"
    request = Request(url, headers={"User-Agent": "rayswift"} | ({"Cookie": f"m_session_id={token}"} if token else {}))
    try:
        return urlopen(request, timeout=_TIMEOUT_S)
    except HTTPError as error:
        if error.code >= 500:
            raise
        with error:
            raise _Refused(error.code, _message(error.read(10_000)) or str(error.reason)) from error


def _message(content: bytes) -> str:
    try:
        return str(json.loads(content).get("Message") or "")
    except (ValueError, AttributeError):
        return ""


def _endpoint() -> str:
    given = os.environ.get("MODELSCOPE_ENDPOINT") or os.environ.get("MODELSCOPE_DOMAIN") or "www.modelscope.cn"
    return (given if "://" in given else f"https://{given}").rstrip("/")


def _unreachable(error: Exception) -> HubError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    rule = f"is not in the cache, and cannot be had from ModelScope: {reason}"
    return HubError(rule, "check the network and MODELSCOPE_ENDPOINT, or name a local file")
