"""The chat page that an endpoint shows at `/`: the files beside this one, and the headers that fence them in.

Knows files and headers. The page asks the routes of the API like any client, so it is open to everybody: it holds no
name of a model and no key.
"""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_FILES = {
    "/": ("index.html", "text/html"),
    "/page/chat.css": ("chat.css", "text/css"),
    "/page/chat.js": ("chat.js", "text/javascript"),
    "/page/api.js": ("api.js", "text/javascript"),
    "/page/column.js": ("column.js", "text/javascript"),
    "/page/icon.svg": ("icon.svg", "image/svg+xml"),
}
PATHS = frozenset(_FILES)
"""What is answered without a key."""
# Nothing from elsewhere, nothing inline: text of a model that became markup by a mistake would still not run.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def routes() -> list[Route]:
    """A GET route for each file of the page; the files are read now."""
    return [_route(path, *described) for path, described in _FILES.items()]


def _route(path: str, file: str, media_type: str) -> Route:
    content = (Path(__file__).parent / file).read_bytes()

    async def show(_: Request) -> Response:
        return Response(content, media_type=media_type, headers=_HEADERS)

    return Route(path, show, methods=["GET"])
