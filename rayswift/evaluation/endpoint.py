"""Asks an OpenAI-compatible endpoint the questions of rows, through the official client. Knows nothing behind its URL.

An endpoint for chats gives no log-probabilities of prompts, so there is no loss of it. How to reach one is known by
`serving/client.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from rayswift.evaluation.answers import Reply
from rayswift.evaluation.rows import Question
from rayswift.serving.client import models_of, reason

if TYPE_CHECKING:
    import openai

NO_LOSS = "an endpoint for chats gives no log-probabilities of prompts"
_CONCURRENCY = 8
_READS_FOLDERS = ("rayswift", "vllm")
_NO_PENALTIES = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0}


def ask(client: openai.OpenAI, model: str, questions: Sequence[Question], max_new_tokens: int) -> list[Reply | str]:
    """The endpoint's greedy answer to each question, several at the same time, or why it refuses that one."""
    penalties = _no_penalties(client, model)
    with ThreadPoolExecutor(_CONCURRENCY) as pool:
        asked = [pool.submit(_ask, client, model, question, max_new_tokens, penalties) for question in questions]
        try:
            return [one.result() for one in asked]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # the others would fail one by one in the same way
            raise


def _no_penalties(client: openai.OpenAI, model: str) -> Mapping[str, float]:
    """What has an endpoint answer as the folder is measured, where that has penalties in its generation config.

    Only for servers that read it: others refuse fields that OpenAI does not have.
    """
    import openai

    try:
        served = models_of(client).get(model)
    except (openai.APIError, AttributeError, TypeError, ValueError):
        # It lists none, or nothing that the client can read; what else is wrong with it the first question will tell.
        return {}
    return _NO_PENALTIES if served is not None and served.owned_by in _READS_FOLDERS else {}


def _ask(
    client: openai.OpenAI, model: str, question: Question, max_new_tokens: int, penalties: Mapping[str, float]
) -> Reply | str:
    import openai

    if question.tools or any(set(turn) & {"tool_calls", "tool_call_id"} for turn in question.chat):
        return "has tools, which are not sent to an endpoint"
    if question.num_media:
        return "has media, which are not sent to an endpoint"
    messages: Any = [{"role": turn["role"], "content": turn["content"]} for turn in question.chat]
    try:
        reply = client.chat.completions.create(
            model=model, messages=messages, temperature=0, max_tokens=max_new_tokens, extra_body=dict(penalties)
        )
    except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
        return f"is refused by the endpoint: {reason(error)}"
    if not reply.choices:
        return "got no answer from the endpoint"
    return Reply(reply.choices[0].message.content or "", cut=reply.choices[0].finish_reason == "length")
