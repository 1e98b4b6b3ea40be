"""What a tokenizer's OWN chat template makes of a chat, what of it is dropped, and the tokens that end turns.

Knows no loss and no turns that are trained. Loads neither torch nor transformers itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

from rayswift.data.formats import RowError
from rayswift.data.media.parts import with_parts
from rayswift.data.types import Sample
from rayswift.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_MARKS = re.compile(r"{%[-+]?\s*generation\s*[-+]?%}")


def require_chat_template(tokenizer: PreTrainedTokenizerBase, *, path: str = "model.path") -> None:
    """Raises ConfigError when conversations cannot be rendered."""
    if not tokenizer.chat_template:
        raise ConfigError(
            "has a tokenizer without a chat template",
            path=path,
            value=tokenizer.name_or_path,
            fix="add chat_template.jinja to the folder, or train plain text with method.name=pretrain",
        )


def chat_text(
    tokenizer: PreTrainedTokenizerBase, chat: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] = (), *,
    generation_prompt: bool,
) -> str:  # fmt: skip
    """The chat as one text, in training and in serving alike. Raises whatever the template does.

    Arguments of tool calls are objects, as transformers documents them, and JSON texts, as in OpenAI's API, for a
    template that joins them as texts (DeepSeek's).
    """
    chat = with_parts(tokenizer, chat)
    given = list(tools) or None
    render = _renderer(tokenizer, tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None)
    return str(_as_it_takes_calls(chat, lambda messages: render(messages, given, generation_prompt)))


@lru_cache(maxsize=8)
def _renderer(tokenizer: PreTrainedTokenizerBase, template: str | None) -> Callable[[Any, Any, bool], Any]:
    """(messages, tools, generation prompt) -> text, as `apply_chat_template` renders them.

    For a template of text, transformers' compiled one is called directly, which takes a third of the time: what is
    saved is listing the special tokens, and jinja2's copy of the template's globals, which are a ChainMap. Kept per
    tokenizer object.
    """
    from transformers import PreTrainedTokenizerBase as Base
    from transformers.utils import chat_template_utils

    if template is None or type(tokenizer).apply_chat_template is not Base.apply_chat_template:
        return lambda messages, tools, generation_prompt: tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=generation_prompt
        )
    compiled = cast(Any, chat_template_utils)._compile_jinja_template(template)
    compiled.globals = dict(compiled.globals)
    special = dict(tokenizer.special_tokens_map)
    return lambda messages, tools, generation_prompt: compiled.render(
        messages=messages, tools=tools, documents=None, add_generation_prompt=generation_prompt, **special
    )


def _as_it_takes_calls(chat: Sequence[dict[str, Any]], render: Callable[[list[dict[str, Any]]], Any]) -> Any:
    try:
        return render(list(chat))
    except TypeError:
        written = [_with_written_arguments(message) for message in chat]
        if written == list(chat):
            raise
        return render(written)


def _with_written_arguments(message: dict[str, Any]) -> dict[str, Any]:
    calls = message.get("tool_calls") or []
    written = [
        call | {"function": call["function"] | {"arguments": json.dumps(arguments, ensure_ascii=False)}}
        for call in calls
        if not isinstance(arguments := call["function"].get("arguments"), str)
    ]
    return message | {"tool_calls": written} if written else message


def apply(
    tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, Any]], sample: Sample, generation_prompt: bool
) -> str:
    """The chat as one text. Raises RowError where the template refuses it, ConfigError where there is none."""
    from jinja2.exceptions import TemplateError

    if not tokenizer.chat_template:
        require_chat_template(tokenizer)
    try:
        return chat_text(tokenizer, chat, sample.tools, generation_prompt=generation_prompt)
    except (TemplateError, TypeError, ValueError) as error:
        raise RowError(f"is refused by the chat template: {error}") from error


def generation_spans(
    tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, Any]], sample: Sample
) -> list[tuple[int, int]]:
    """What the template itself marks as generated, by transformers' own rendering of `{% generation %}`."""
    template = tokenizer.chat_template
    if not isinstance(template, str) or not _MARKS.search(template):
        return []
    from transformers.utils.chat_template_utils import render_jinja_template

    settings: Any = {
        "tools": list(sample.tools) or None, "chat_template": template, "return_assistant_tokens_mask": True,
        **cast(Any, tokenizer.special_tokens_map),
    }  # fmt: skip
    rendered = _as_it_takes_calls(chat, lambda given: render_jinja_template([given], **settings))
    spans = rendered[1]
    return [(int(start), int(stop)) for start, stop in spans[0]] if spans else []


def check_tools(sample: Sample, chat: list[dict[str, Any]], text: str) -> None:
    """Raises RowError for a tool the template drops.

    A template that knows no tools drops them silently; the model would learn calls it was never offered.
    """
    for name in _tool_names(sample, chat):
        if name not in text:
            raise RowError(f"has the tool {name!r}, which the tokenizer's chat template does not render")


def check_reasoning(chat: Sequence[dict[str, Any]], text: str) -> None:
    """Raises RowError for thoughts the template drops.

    Of several turns the last is enough: a template may drop what was thought earlier.
    """
    thoughts = [message["reasoning_content"].strip() for message in chat if "reasoning_content" in message]
    if thoughts and thoughts[-1] not in text:
        raise RowError("has `reasoning_content`, which the tokenizer's chat template does not render")


def _tool_names(sample: Sample, chat: list[dict[str, Any]]) -> Iterator[str]:
    for tool in sample.tools:
        yield str(tool.get("function", {}).get("name", ""))
    for message in chat:
        for call in message.get("tool_calls", ()):
            yield str(call["function"]["name"])


@lru_cache(maxsize=8)
def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The texts of all special tokens.

    Kept per tokenizer object: listing the 256 added tokens of Llama 3 costs more than rendering a row.
    """
    added = tokenizer.added_tokens_decoder.values()
    return tuple({*tokenizer.all_special_tokens, *(token.content for token in added if token.special)})
