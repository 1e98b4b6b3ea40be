"""The official client of an OpenAI-compatible endpoint, and what its errors mean to a person at a command line.

Knows nothing behind the URL. The key is RAYSWIFT_API_KEY; no error and no report shows it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from rayswift.errors import ConfigError, ServeError
from rayswift.serving.auth import VARIABLE, is_loopback

if TYPE_CHECKING:
    import openai
    from openai.types import Model

RETRIES = 3
_TIMEOUT_S = 300
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and line feed


def is_url(target: str) -> bool:
    """Whether a target is an endpoint."""
    return target.startswith(("http://", "https://"))


@contextmanager
def connected(url: str, *, argument: str = "TARGET", retries: int | None = None) -> Iterator[openai.OpenAI]:
    """A client of the endpoint. What it raises inside becomes a ConfigError or ServeError that never shows the key.

    `argument` is what the command calls the URL. One without a path is taken for the address of `rayswift serve`, whose
    API is at /v1.
    """
    import openai

    host = _checked(url, argument)
    key = os.environ.get(VARIABLE, "").strip() or "none-needed"
    # A proxy that the environment names for the world outside does not know this machine's loopback address.
    http_client = openai.DefaultHttpxClient(trust_env=not is_loopback(host))
    client = openai.OpenAI(
        base_url=f"{url.rstrip('/')}/v1" if urlsplit(url).path in ("", "/") else url,
        api_key=key,
        max_retries=RETRIES if retries is None else retries,
        timeout=_TIMEOUT_S,
        http_client=http_client,
    )
    with client, told(url, argument):
        yield client


@contextmanager
def told(url: str, argument: str = "TARGET") -> Iterator[None]:
    """Makes what the client raises inside a ConfigError or ServeError with path, value, rule and fix."""
    import openai

    try:
        yield
    except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
        given = "is refused" if os.environ.get(VARIABLE) else "is not set, and a key is asked for"
        raise ConfigError(
            f"{given} by {url} ({error.status_code})", path=VARIABLE, fix="set it to a key of that endpoint"
        ) from error
    except openai.NotFoundError as error:
        raise ConfigError(
            f"answers 404: {reason(error)}", path=argument, value=url,
            fix="give the base URL, which ends in /v1, and the name of a model it serves as --model",
        ) from error  # fmt: skip
    except openai.APIStatusError as error:
        if error.status_code >= 500:
            raise _failed(error, url, argument) from error
        fix = "wait, and ask again" if error.status_code == 429 else "shorten or change what is asked"
        raise ServeError(
            f"refuses to answer ({error.status_code}): {reason(error)}", path=argument, value=url, fix=fix
        ) from error
    except openai.APIError as error:
        raise _failed(error, url, argument) from error


def models_of(client: openai.OpenAI) -> dict[str, Model]:
    """The models that the key may ask, by name. Fields beside OpenAI's are in `model_extra`."""
    return {model.id: model for model in sorted(client.models.list(), key=lambda model: model.id)}


def model_of(client: openai.OpenAI, url: str, asked: str | None) -> str:
    """The model to ask: as asked for, else the only one. Raises ConfigError where there are several or none."""
    return asked if asked is not None else only(list(models_of(client)), url)


def only(served: list[str], url: str) -> str:
    """The one model that is served. Raises ConfigError where there are several or none."""
    if len(served) == 1:
        return served[0]
    raise ConfigError(
        f"is needed: {url} serves {printable(', '.join(served[:10])) or 'no model'}", path="--model",
        fix=f"write --model {printable(served[0])}" if served else "serve one",
    )  # fmt: skip


def reason(error: Exception) -> str:
    """What an endpoint says about an error, in one line."""
    body = getattr(error, "body", None)
    said = body.get("message") if isinstance(body, dict) else None
    return printable(" ".join(str(said or error).split()))[:300]


def printable(text: str) -> str:
    """Text of an endpoint without control characters: on a terminal they could move the cursor, or worse."""
    return _CONTROL.sub("", text)


def _failed(error: Exception, url: str, argument: str) -> ServeError:
    rule, fix = f"does not answer: {reason(error)}", "check that it runs, and the URL"
    return ServeError(rule, path=argument, value=url, fix=fix)


def _checked(url: str, argument: str) -> str:
    """The host of the URL. Raises ConfigError for one without, or with a password, which reports would repeat."""
    parts = urlsplit(url)
    if not parts.hostname:
        raise ConfigError("has no host", path=argument, value=url, fix="write http://HOST:PORT/v1")
    if parts.username or parts.password:
        raise ConfigError("carries a user name or password", path=argument, fix=f"leave it out, and set {VARIABLE}")
    return parts.hostname
