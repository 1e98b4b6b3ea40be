"""Asks an OpenAI-compatible endpoint the questions of rows, through the official client. Knows nothing behind its URL.

An endpoint for chats gives no log-probabilities of prompts, so there is no loss of it. The key is RAYSWIFT_API_KEY.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rayswift.errors import ConfigError, ServeError
from rayswift.evaluation.answers import Reply
from rayswift.evaluation.rows import Question
from rayswift.serving.auth import VARIABLE, is_loopback

if TYPE_CHECKING:
    import openai

NO_LOSS = "an endpoint for chats gives no log-probabilities of prompts"
_CONCURRENCY = 8
_RETRIES, _TIMEOUT_S = 3, 300


def is_url(target: str) -> bool:
    """Whether a target is an endpoint."""
    return target.startswith(("http://", "https://"))


@contextmanager
def connected(url: str) -> Iterator[openai.OpenAI]:
    """A client of the endpoint. What it raises inside becomes a ConfigError or ServeError that never shows the key."""
    import openai

    host = _checked(url)
    key = os.environ.get(VARIABLE, "").strip() or "none-needed"
    # A proxy that the environment names for the world outside does not know this machine's loopback address.
    http_client = openai.DefaultHttpxClient(trust_env=not is_loopback(host))
    with openai.OpenAI(
        base_url=url, api_key=key, max_retries=_RETRIES, timeout=_TIMEOUT_S, http_client=http_client
    ) as client:
        try:
            yield client
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            given = "is refused" if os.environ.get(VARIABLE) else "is not set, and a key is asked for"
            raise ConfigError(
                f"{given} by {url} ({error.status_code})", path=VARIABLE, fix="set it to a key of that endpoint"
            ) from error
        except openai.NotFoundError as error:
            raise ConfigError(
                f"answers 404: {_reason(error)}", path="TARGET", value=url,
                fix="give the base URL, which ends in /v1, and the name of a model it serves as --model",
            ) from error  # fmt: skip
        except openai.APIError as error:
            raise ServeError(
                f"does not answer: {_reason(error)}", path="TARGET", value=url, fix="check that it runs, and the URL"
            ) from error


def model_of(client: openai.OpenAI, url: str, asked: str | None) -> str:
    """The model to ask: as asked for, else the only one. Raises ConfigError where there are several or none."""
    if asked is not None:
        return asked
    served = sorted(model.id for model in client.models.list())
    if len(served) == 1:
        return served[0]
    raise ConfigError(
        f"is needed: {url} serves {', '.join(served[:10]) or 'no model'}", path="--model",
        fix=f"write --model {served[0]}" if served else "serve one",
    )  # fmt: skip


def ask(client: openai.OpenAI, model: str, questions: Sequence[Question], max_new_tokens: int) -> list[Reply | str]:
    """The endpoint's greedy answer to each question, several at the same time, or why it refuses that one."""
    with ThreadPoolExecutor(_CONCURRENCY) as pool:
        asked = [pool.submit(_ask, client, model, question, max_new_tokens) for question in questions]
        try:
            return [one.result() for one in asked]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # the others would fail one by one in the same way
            raise


def _ask(client: openai.OpenAI, model: str, question: Question, max_new_tokens: int) -> Reply | str:
    import openai

    if question.tools or any(set(turn) & {"tool_calls", "tool_call_id"} for turn in question.chat):
        return "has tools, which are not sent to an endpoint"
    if question.num_media:
        return "has media, which are not sent to an endpoint"
    messages: Any = [{"role": turn["role"], "content": turn["content"]} for turn in question.chat]
    try:
        reply = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=max_new_tokens)
    except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
        return f"is refused by the endpoint: {_reason(error)}"
    if not reply.choices:
        return "got no answer from the endpoint"
    return Reply(reply.choices[0].message.content or "", cut=reply.choices[0].finish_reason == "length")


def _checked(url: str) -> str:
    """The host of the URL. Raises ConfigError for one without, or with a password, which reports would repeat."""
    parts = urlsplit(url)
    if not parts.hostname:
        raise ConfigError("has no host", path="TARGET", value=url, fix="write http://HOST:PORT/v1")
    if parts.username or parts.password:
        raise ConfigError("carries a user name or password", path="TARGET", fix=f"leave it out, and set {VARIABLE}")
    return parts.hostname


def _reason(error: Exception) -> str:
    body = getattr(error, "body", None)
    said = body.get("message") if isinstance(body, dict) else None
    return " ".join(str(said or error).split())[:300]
