"""What happens to every HTTP request before a route sees it: host and key are checked, errors become OpenAI bodies.

Pure ASGI. Knows nothing of models or requests' contents, and logs neither headers nor bodies.
"""

from __future__ import annotations

import logging

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from rayswift.serving import auth
from rayswift.serving.api_errors import ApiError

_OPEN_PATHS = frozenset({"/health"})
_log = logging.getLogger("rayswift.serving")


class Gate:
    """ASGI middleware: answers 401 without a right key and, on a keyless endpoint, 403 to a foreign Host header.

    A keyless endpoint on loopback is open to programs of this machine. A web page in its browser is none of them: it
    could reach the port under a name of its own (DNS rebinding), and the Host header gives that away.
    """

    def __init__(self, app: ASGIApp, key_hashes: tuple[str, ...]) -> None:
        self._app, self._key_hashes = app, key_hashes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
            return
        if scope["type"] == "http" and (error := self._refusal(scope)) is not None:
            await error_response(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        if not self._key_hashes:
            host = auth.host_of(headers.get("host", "localhost"))
            return None if auth.is_loopback(host) else _foreign_host()
        if scope["path"] in _OPEN_PATHS or auth.is_allowed(headers.get("authorization", ""), self._key_hashes):
            return None
        return _wrong_key("authorization" in headers)


def error_response(error: ApiError) -> JSONResponse:
    """The error as an HTTP response."""
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


async def on_api_error(_: Request, error: Exception) -> Response:
    """The response to an error a route raised on purpose."""
    assert isinstance(error, ApiError)
    return error_response(error)


async def on_http_error(request: Request, error: Exception) -> Response:
    """The response to a path or method that does not exist."""
    assert isinstance(error, HTTPException)
    messages = {
        404: (f"Unknown request URL: {request.method} {request.url.path[:200]}", "unknown_url"),
        405: (f"{request.method} is not allowed on {request.url.path[:200]}", "method_not_allowed"),
    }
    message, code = messages.get(error.status_code, (str(error.detail), None))
    headers = dict(error.headers or {})
    return error_response(ApiError(message, status=error.status_code, code=code, headers=headers))


def internal_error(error: BaseException) -> ApiError:
    """The 500 for a fault of ours. The client learns nothing of it, the log gets the traceback (no prompt, no key)."""
    _log.error("a request failed inside the server", exc_info=error)
    return ApiError("the server had an error while processing the request", status=500, code="internal_error")


def _wrong_key(given: bool) -> ApiError:
    message = "Incorrect API key provided" if given else "No API key provided; send Authorization: Bearer KEY"
    code = "invalid_api_key" if given else None
    return ApiError(message, status=401, code=code, kind="authentication_error", headers={"WWW-Authenticate": "Bearer"})


def _foreign_host() -> ApiError:
    message = "an endpoint without an API key answers only requests sent to localhost"
    return ApiError(message, status=403, code="foreign_host", kind="permission_error")
