"""Asks a served model through the official openai client. Knows the endpoint's URL and nothing behind it."""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayswift.errors import ServeError
from rayswift.quickstart.result import Answer
from rayswift.serving.auth import VARIABLE

_CONCURRENCY = 8
_MAX_TOKENS = 96


@dataclass(frozen=True)
class Question:
    """What is asked, about a picture where there is one, and the answer that is right."""

    text: str
    expected: str
    image: Path | None = None

    def content(self) -> Any:
        """The content of the message: text, or typed parts with the picture as a data URI."""
        if self.image is None:
            return self.text
        encoded = base64.b64encode(self.image.read_bytes()).decode()
        picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}}
        return [picture, {"type": "text", "text": self.text}]


def ask(url: str, model: str, questions: Sequence[Question], *, max_tokens: int = _MAX_TOKENS) -> tuple[Answer, ...]:
    """The served model's answer to each question, greedy, several asked at the same time.

    `url` is the endpoint's base URL, ending in `/v1`; the key is RAYSWIFT_API_KEY where one is set.
    Raises ServeError when the endpoint does not answer.
    """
    import openai

    key = os.environ.get(VARIABLE, "none-needed").strip()
    # A proxy that the environment names for the world outside does not know this machine's loopback address.
    direct = openai.DefaultHttpxClient(trust_env=False)
    with openai.OpenAI(base_url=url, api_key=key, max_retries=3, timeout=120, http_client=direct) as client:

        def one(question: Question) -> Answer:
            reply = client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": question.content()}],
                temperature=0,
                max_tokens=max_tokens,
            )
            return Answer(question.text, question.expected, reply.choices[0].message.content or "")

        try:
            with ThreadPoolExecutor(_CONCURRENCY) as pool:
                return tuple(pool.map(one, questions))
        except openai.APIError as error:
            raise ServeError(f"the endpoint at {url} did not answer: {error}") from error
