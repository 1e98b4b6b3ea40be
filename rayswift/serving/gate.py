"""What happens to every HTTP request before a route sees it: host, key and the key's limits are checked.

Also how errors become OpenAI bodies. Pure ASGI. Knows nothing of models but the names a key may ask, and nothing of
requests' contents; logs neither headers nor bodies.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rayswift.serving import auth, page
from rayswift.serving.api_errors import ApiError
from rayswift.serving.limits import KeyLimits, KeyPlace
from rayswift.serving.spec import ApiKey

_OPEN_PATHS = frozenset({"/health"}) | page.PATHS
_MODELS = "rayswift.models"  # where in a request's scope stands what its key may ask
_log = logging.getLogger("rayswift.serving")


class Gate:
    """ASGI middleware: 401 without a right key, 429 over its limits, and without keys 403 to a foreign Host header.

    A keyless endpoint on loopback is open to programs of this machine. A web page in its browser is none of them: it
    could reach the port under a name of its own (DNS rebinding), and the Host header gives that away.

    A request holds its key's place until the app has returned: after the last byte, or when the client has gone.
    """

    def __init__(
        self,
        app: ASGIApp,
        key_hashes: Sequence[str],
        keys: Sequence[ApiKey] = (),
        now_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        # Keys with limits come first: a key that is known both ways is limited.
        self._app, self._keys, self._hashes = app, keys, (*(key.sha256 for key in keys), *key_hashes)
        self._limits = [
            KeyLimits(key.requests_per_minute, key.max_concurrency, now_ns) if key.is_limited else None for key in keys
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            place = self._enter(scope)
        except ApiError as error:
            await error_response(error)(scope, receive, send)
            return
        if place is None:
            await self._app(scope, receive, send)
            return
        with place:
            await self._app(scope, receive, _with_headers(send, place.headers))

    def _enter(self, scope: Scope) -> KeyPlace | None:
        """The place of a request whose key has limits, None for any other that may pass. Raises ApiError."""
        headers = Headers(scope=scope)
        if not self._hashes:
            if not auth.is_loopback(auth.host_of(headers.get("host", "localhost"))):
                raise _foreign_host()
            return None
        if scope["path"] in _OPEN_PATHS:
            return None
        found = auth.matching(headers.get("authorization", ""), self._hashes)
        if found is None:
            raise _wrong_key("authorization" in headers)
        if found >= len(self._keys):
            return None
        scope[_MODELS] = self._keys[found].models
        limits = self._limits[found]
        return None if limits is None else limits.enter()


def may_ask(request: Request, model: str) -> bool:
    """Whether the key of a request that the gate has let in may ask this model."""
    models = request.scope.get(_MODELS)
    return models is None or model in models


def _with_headers(send: Send, headers: Mapping[str, str]) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(headers)
        await send(message)

    return sending


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
    return ApiError(message, status=401, code=code, headers={"WWW-Authenticate": "Bearer"})


def _foreign_host() -> ApiError:
    message = "an endpoint without an API key answers only requests sent to localhost"
    return ApiError(message, status=403, code="foreign_host", kind="permission_error")
