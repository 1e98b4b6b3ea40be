"""A loaded model, and an endpoint, as models of the lm-evaluation-harness. Needs the extra `harness` to be imported.

Knows how prompts are made: those of a chat are what serving and training make of it. Knows no task and no result.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI
from lm_eval.models.utils import postprocess_generated_text

from rayswift.data.templates import chat_text
from rayswift.errors import ConfigError, ServeError
from rayswift.evaluation.harness import heard
from rayswift.serving.auth import VARIABLE

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_CONCURRENCY, _MAX_STOPS = 8, 4


class Loaded(HFLM):  # type: ignore[misc]
    """A loaded model, decoded by transformers. The text of a chat is tokenized as serving does: nothing is put before
    it that its template does not say."""

    is_chat: bool

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The chat as it is served. The harness' own way where an answer is begun, or the template refuses a system
        turn: it is then left out, which the harness warns of."""
        from jinja2 import TemplateError

        if add_generation_prompt:
            try:
                return chat_text(self.tokenizer, chat_history, generation_prompt=True)
            except TemplateError:
                pass
        return str(super().apply_chat_template(chat_history, add_generation_prompt))


class Chat(LocalChatCompletion):  # type: ignore[misc]
    """An endpoint's /chat/completions. Stop texts beyond the four that the API takes end an answer here."""

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The answers, in the order of the requests."""
        return _cut(super().generate_until(requests, disable_tqdm), requests)

    async def get_batched_requests(self, *args: Any, **kwargs: Any) -> Any:
        """Asks several at a time. The first failure is raised."""
        _print_no_others()
        return await super().get_batched_requests(*args, **kwargs)


class Completions(LocalCompletionsAPI):  # type: ignore[misc]
    """An endpoint's /completions. Otherwise as `Chat`."""

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The answers, in the order of the requests."""
        return _cut(super().generate_until(requests, disable_tqdm), requests)

    async def get_batched_requests(self, *args: Any, **kwargs: Any) -> Any:
        """Asks several at a time. The first failure is raised."""
        _print_no_others()
        return await super().get_batched_requests(*args, **kwargs)

    def _create_payload(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        payload = dict(super()._create_payload(*args, **kwargs))
        return payload | {"stop": payload["stop"][:_MAX_STOPS]}


def loaded(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    is_chat: bool,
    max_length: int | None,
    batch_size: int,
) -> Loaded:
    """The harness' model of a loaded one; `max_length` None is what its config says.

    Where nothing is a chat, texts begin as the tokenizer begins them.
    """
    with heard():  # it warns of models that are given loaded
        made = Loaded(
            pretrained=model, tokenizer=tokenizer, backend="causal", max_length=max_length, batch_size=batch_size,
            add_bos_token=False if is_chat else None,
        )  # fmt: skip
    made.is_chat = is_chat
    return made


def endpoint(base_url: str, model: str, key: str, *, is_chat: bool, retries: int) -> Chat | Completions:
    """The harness' model of an endpoint: chats where its template is to be applied, else plain texts.

    The key goes along as a header: the harness itself would send OPENAI_API_KEY.
    """
    kind, path = (Chat, "chat/completions") if is_chat else (Completions, "completions")
    with heard():
        return kind(
            base_url=f"{base_url}/{path}", model=model, header={"Authorization": f"Bearer {key}"},
            tokenizer_backend=None, tokenized_requests=False, num_concurrent=_CONCURRENCY, max_retries=retries,
        )  # fmt: skip


@contextmanager
def told(url: str) -> Iterator[None]:
    """Makes what a request of the harness raises a ConfigError or ServeError, which do not show the key."""
    import aiohttp

    try:
        yield
    except aiohttp.ClientResponseError as error:
        if error.status in (401, 403):
            raise ConfigError(f"is not set, or is refused by {url} ({error.status})", path=VARIABLE,
                              fix="set it to a key of that endpoint") from None  # fmt: skip
        said = [note for note in getattr(error, "__notes__", ()) if "Response text" in note]
        raise ServeError(f"refuses to answer: {said[-1] if said else error}", path="TARGET", value=url,
                         fix="leave out the task that it refuses") from None  # fmt: skip
    except (aiohttp.ClientError, TimeoutError) as error:
        raise ServeError(f"does not answer: {type(error).__name__} {error}", path="TARGET", value=url,
                         fix="check that it runs") from None  # fmt: skip


def _print_no_others() -> None:
    """asyncio prints the failures beside the one that is raised, as exceptions that nobody asked for."""
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)


def _cut(answers: Sequence[str], requests: Sequence[Any]) -> list[str]:
    return [
        str(postprocess_generated_text(answer, stop=request.args[1].get("until"), think_end_token=None))
        for answer, request in zip(answers, requests, strict=True)
    ]
