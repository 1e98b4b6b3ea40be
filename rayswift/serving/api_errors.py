"""What a client is told when it does not get an answer: OpenAI error bodies with their HTTP status.

Knows status codes and words; knows no HTTP library, and never repeats what a client sent beyond a name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rayswift.errors import ServeError


class ApiError(ServeError):
    """An error a client is told, with the HTTP status and the four fields of an OpenAI error body."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        kind: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.kind = kind or ("server_error" if status >= 500 else "invalid_request_error")
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


def too_large(max_bytes: int) -> ApiError:
    """The 413 for a body, or for the text in it."""
    return ApiError(f"the body is larger than {max_bytes} bytes", status=413, code="request_too_large")


def gone() -> ApiError:
    """What ends the work for a client that has closed its connection; nobody reads it."""
    return ApiError("the client closed the connection", status=499)


def too_long(what: str, room: int, place: str = "messages") -> ApiError:
    """The 400 for a conversation or text that does not fit into the model's context."""
    message = f"This model's maximum context length is {room} tokens: {what}"
    return ApiError(message, param=place, code="context_length_exceeded")


def unknown_model(name: str) -> ApiError:
    """The 404 for a model nobody serves here."""
    message = f"The model `{_shown(name)}` does not exist; GET /v1/models lists those that do"
    return ApiError(message, status=404, param="model", code="model_not_found")


def unknown_version() -> ApiError:
    """The 404 for a version of a model that is not served now."""
    message = "This version of the model is not served; leave X-RaySwift-Version out for the one that is"
    return ApiError(message, status=404, param="X-RaySwift-Version", code="version_not_found")


def model_not_allowed(name: str) -> ApiError:
    """The 403 for a model that a key may not ask, whether it is served here or not: the key's owner is not told."""
    message = f"This API key may not use the model `{_shown(name)}`; GET /v1/models lists those it may"
    return ApiError(message, status=403, param="model", code="model_not_allowed", kind="permission_error")


def overloaded(retry_after_s: int) -> ApiError:
    """The 429 of a full queue. Clients of the official library wait as told and ask again."""
    return over_limit("the server is at its limit of waiting requests; try again shortly", retry_after_s)


def over_limit(message: str, retry_after_s: int, headers: Mapping[str, str] | None = None) -> ApiError:
    """The 429 of any limit, with the seconds after which to ask again."""
    return ApiError(
        message,
        status=429,
        code="rate_limit_exceeded",
        kind="requests",
        headers={"Retry-After": str(retry_after_s), **(headers or {})},
    )


def _shown(name: str) -> str:
    return name if len(name) <= 80 else name[:79] + "…"
