"""The files of the chat page: who gets them, with which headers; nothing in them is inline or from elsewhere."""

from __future__ import annotations

import asyncio
import re
from importlib.resources import files
from typing import Any

import httpx
import pytest

from rayswift.serving import auth, page
from rayswift.serving.admission import Admission
from rayswift.serving.engine import FakeEngine
from rayswift.serving.http import build_asgi
from rayswift.serving.served import ServedModel
from rayswift.serving.spec import ServeSpec

_KEY = "a-key-for-tests-0123"
_POLICY = {"default-src 'none'", "script-src 'self'", "style-src 'self'", "connect-src 'self'", "img-src 'self'",
           "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"}  # fmt: skip


def ask(path: str, method: str = "GET", host: str = "localhost", **spec: Any) -> httpx.Response:
    served: Any = ServedModel(FakeEngine(), None, Admission(1, 1))  # type: ignore[arg-type]  # no prompt is made
    app = build_asgi(ServeSpec(models={"m": "unused"}, **spec), {"m": served})

    async def once() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=f"http://{host}") as client:
            return await client.request(method, path)

    return asyncio.run(once())


@pytest.mark.parametrize("keyed", [False, True])
@pytest.mark.parametrize("path", sorted(page.PATHS))
def test_a_file_is_shown_to_everybody_and_fenced_in(path: str, keyed: bool) -> None:
    response = ask(path, api_key_sha256=(auth.fingerprint(_KEY),) if keyed else ())
    assert response.status_code == 200
    assert set(response.headers["content-security-policy"].split("; ")) == _POLICY
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"
    kinds = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
    assert response.headers["content-type"].split(";")[0] == kinds.get(path.rpartition(".")[2], "text/html")
    assert "set-cookie" not in response.headers
    assert not [name for name in response.headers if name.startswith("access-control")]


@pytest.mark.parametrize("path", sorted(page.PATHS))
def test_without_a_key_a_page_of_another_name_gets_nothing(path: str) -> None:
    assert ask(path, host="evil.example").json()["error"]["code"] == "foreign_host"
    assert ask(path, "POST").status_code == 405


def test_nothing_else_lies_open() -> None:
    locked = {"api_key_sha256": (auth.fingerprint(_KEY),)}
    for path in ("/page", "/page/", "/page/__init__.py", "/page/../http.py", "/page/%2e%2e/http.py", "/page/chat.js/"):
        assert ask(path).status_code in (307, 404)
        assert ask(path, **locked).status_code == 401


def test_every_file_is_shown_and_there_is_no_other() -> None:
    there = {file.name for file in files(page).iterdir() if not file.name.startswith("__")}
    assert there == {path.rpartition("/")[2] or "index.html" for path in page.PATHS}


def test_nothing_is_inline_or_comes_from_elsewhere() -> None:
    texts = {path: ask(path).text for path in page.PATHS}
    html = texts["/"]
    assert not re.search(r"\son\w+=|\sstyle=|<style|javascript:|<script(?![^>]*src=)", html)
    for used in re.findall(r'(?:src|href)="([^"]+)"', html):
        assert f"/{used}" in page.PATHS
    for path, text in texts.items():
        assert not re.findall(r"(?:https?:)?//[a-z]", text.replace("http://www.w3.org/2000/svg", "")), path
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|localStorage", text), (
            path
        )
