"""Asks a served model through the official openai client. Knows the endpoint's URL and nothing behind it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from rayswift.errors import ServeError
from rayswift.quickstart.corpus import Fact
from rayswift.quickstart.result import Answer
from rayswift.serving.auth import VARIABLE

_CONCURRENCY = 8
_MAX_TOKENS = 96


def ask(url: str, model: str, facts: Sequence[Fact]) -> tuple[Answer, ...]:
    """The served model's answer to each fact's question, greedy, several asked at the same time.

    `url` is the endpoint's base URL, ending in `/v1`; the key is RAYSWIFT_API_KEY where one is set.
    Raises ServeError when the endpoint does not answer.
    """
    import openai

    key = os.environ.get(VARIABLE, "none-needed").strip()
    # A proxy that the environment names for the world outside does not know this machine's loopback address.
    direct = openai.DefaultHttpxClient(trust_env=False)
    with openai.OpenAI(base_url=url, api_key=key, max_retries=3, timeout=120, http_client=direct) as client:

        def one(fact: Fact) -> Answer:
            reply = client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": fact.question}],
                temperature=0,
                max_tokens=_MAX_TOKENS,
            )
            return Answer(fact.question, fact.answer, reply.choices[0].message.content or "")

        try:
            with ThreadPoolExecutor(_CONCURRENCY) as pool:
                return tuple(pool.map(one, facts))
        except openai.APIError as error:
            raise ServeError(f"the endpoint at {url} did not answer: {error}") from error
