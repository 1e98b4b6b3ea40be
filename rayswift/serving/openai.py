"""What a client may ask: the chat and text completion requests of the OpenAI API, and those for embeddings.

Pure functions and pydantic models. A field that would change the answer and cannot be honoured is refused, never
ignored. Knows no model and no HTTP library; how answers are written is known by `serving/replies.py`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import jiter
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from rayswift.serving.api_errors import ApiError
from rayswift.serving.formats import ResponseFormat, Strict
from rayswift.serving.messages import Message
from rayswift.serving.schema_costs import Room
from rayswift.serving.tools import MAX_TOOLS, Calling, NamedChoice, Tool, calling_of

MAX_STOP_STRINGS, MAX_STOP_CHARS, MAX_LOGPROBS = 4, 256, 20
MAX_MESSAGES, MAX_PROMPTS = 4096, 2048
MAX_COUNT = 2**31 - 1
"""Of what no server has more. A larger number would be repeated in a refusal, digit by digit."""
_SHOWN_CHARS = 80  # of a name that a client sent
DEFAULT_TEXT_TOKENS = 16
"""What /v1/completions generates when the client names no number; the API's own default."""

# Labels for the client's own bookkeeping: they change nothing in an answer.
LABELS = frozenset({"metadata", "prompt_cache_key", "safety_identifier", "service_tier", "user"})
# Options this server lacks, with the values that ask for nothing. Anything else is refused.
ABSENT_OPTIONS: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "audio": (),
    "parallel_tool_calls": (True,),
    "prediction": (),
    "reasoning_effort": (),
    "store": (False,),
    "suffix": ("",),
    "verbosity": (),
    "web_search_options": (),
}


def _stop_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _text_list(value: Any) -> Any:
    """One or several texts, each a string or a list of token ids, as a list of texts."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value and all(_is_id(item) for item in value):
        return [value]
    if isinstance(value, list) and len(value) > MAX_PROMPTS:
        raise PydanticCustomError("prompt", f"must be at most {MAX_PROMPTS} texts")
    kinds = (str, list)
    if not isinstance(value, list) or not value or not all(isinstance(item, kinds) for item in value):
        raise PydanticCustomError("prompt", "must be a string, a list of strings, or token ids")
    if not all(isinstance(item, str) or (item and all(_is_id(token) for token in item)) for item in value):
        raise PydanticCustomError("prompt", "a list of token ids must hold whole numbers from 0 on, and not be empty")
    return value


def _none_empty(texts: list[str | list[int]]) -> list[str | list[int]]:
    if "" in texts:
        raise PydanticCustomError("input", "must not hold an empty text")
    return texts


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


class StreamOptions(Strict):
    """`include_usage` asks for a last chunk with the token counts."""

    include_usage: bool = False
    include_obfuscation: bool = False


class _CommonRequest(Strict):
    model: Annotated[str, Field(min_length=1, max_length=200)]
    max_tokens: Annotated[int, Field(ge=1, le=MAX_COUNT)] | None = None
    # Where one of these is not given it is what the model's folder wishes, see `defaults.py`.
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    # These three are no fields of OpenAI's, but of vLLM's server and others.
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=1e-3, le=2)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_COUNT)] = 1
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]],
        Field(max_length=MAX_STOP_STRINGS, fail_fast=True),
        BeforeValidator(_stop_list),
    ] = Field(default_factory=list)
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> _CommonRequest:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("stream_options", "stream_options needs stream to be true")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(_CommonRequest):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_COUNT)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] = Field(default_factory=list, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None

    @model_validator(mode="after")
    def _fields_agree(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("top_logprobs", "top_logprobs needs logprobs to be true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise PydanticCustomError("max_tokens", "max_tokens and max_completion_tokens differ; give only one")
        calling = calling_of(self.tools, self.tool_choice)
        if calling is not None and self.response_format is not None and self.response_format.type != "text":
            raise PydanticCustomError("tools", "tools and a response_format of JSON exclude each other")
        return self

    @property
    def calling(self) -> Calling | None:
        """The tools that an answer may call; None where there are none."""
        return calling_of(self.tools, self.tool_choice)

    @property
    def num_choices(self) -> int:
        """How many answers are asked for."""
        return self.n

    @property
    def num_chars(self) -> int:
        """The length of all that is said, images and sounds not counted."""
        return sum(len(message.content.text) for message in self.messages)

    @property
    def wanted_tokens(self) -> int | None:
        """The longest answer the client wants; None leaves it to the server."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives per token to report; None reports no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def json_schema(self) -> str | None:
        """The schema that answers keep to, as JSON text; None for free text."""
        if (calling := self.calling) is not None:
            return calling.schema_text
        return None if self.response_format is None else self.response_format.schema_text


class TextRequest(_CommonRequest):
    """The body of /v1/completions."""

    prompt: Annotated[list[str | list[int]], BeforeValidator(_text_list)]
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @property
    def is_of_ids(self) -> bool:
        """Whether every prompt comes as token ids."""
        return not any(isinstance(prompt, str) for prompt in self.prompt)

    @property
    def num_choices(self) -> int:
        """How many answers are asked for, over all prompts."""
        return self.n * len(self.prompt)

    @property
    def wanted_tokens(self) -> int | None:
        """The longest answer the client wants."""
        return self.max_tokens or DEFAULT_TEXT_TOKENS

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives per token to report; None reports no log-probabilities."""
        return self.logprobs

    @property
    def json_schema(self) -> str | None:
        """None: text completions are free text."""
        return None

    @property
    def calling(self) -> Calling | None:
        """None: text completions call nothing."""
        return None


class EmbeddingRequest(Strict):
    """The body of /v1/embeddings."""

    model: Annotated[str, Field(min_length=1, max_length=200)]
    input: Annotated[list[str | list[int]], BeforeValidator(_text_list), AfterValidator(_none_empty)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1, le=MAX_COUNT)] | None = None


AnyRequest = TypeVar("AnyRequest", ChatRequest, TextRequest, EmbeddingRequest)


def parse(kind: type[AnyRequest], body: bytes) -> AnyRequest:
    """The request in a JSON body. Raises ApiError (400) naming the first field that is wrong."""
    try:
        # Two values for one key are read differently by whoever stands before this server.
        raw = jiter.from_json(body, allow_inf_nan=False, catch_duplicate_keys=True)
    except ValueError as error:
        raise ApiError(f"the body is not JSON: {_short(str(error))}", code="invalid_json") from None
    if not isinstance(raw, dict):
        raise ApiError("the body must be a JSON object", code="invalid_json")
    try:
        known = _known_fields(kind, raw)
        # A response_format takes what a grammar needs whatever the tools do.
        return kind.model_validate(known, context=Room(holds=known.get("tool_choice", "auto") not in ("auto", "none")))
    except ValidationError as error:
        raise _first_problem(error) from None


def _known_fields(kind: type[BaseModel], raw: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the request without nulls, labels and options that ask for nothing. ApiError for the others."""
    given = {key: value for key, value in raw.items() if value is not None and key not in LABELS}
    for key, value in list(given.items()):
        if key in kind.model_fields:
            continue
        if key not in ABSENT_OPTIONS:
            shown = _short(key)
            close = difflib.get_close_matches(shown, list(kind.model_fields), n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ApiError(f"Unrecognized request argument: {shown}{hint}", param=shown, code="unknown_parameter")
        if not any(value == neutral and type(value) in _kin(neutral) for neutral in ABSENT_OPTIONS[key]):
            raise ApiError(f"{key} is not supported by this server", param=key, code="unsupported_parameter")
        del given[key]
    return given


def _kin(neutral: Any) -> tuple[type, ...]:
    """The JSON types a neutral value may come as: `0` and `0.0` are the same number, `false` is none."""
    return (int, float) if type(neutral) is int else (type(neutral),)


def _first_problem(error: ValidationError) -> ApiError:
    details = error.errors(include_url=False, include_input=False)[0]
    kind, message = details["type"], str(details["msg"])
    param = _param(details["loc"]) or (kind if kind in ("stream_options", "top_logprobs", "max_tokens") else None)
    if kind == "missing":
        return ApiError(f"Missing required parameter: {param}", param=param, code="missing_required_parameter")
    if kind == "extra_forbidden":
        return ApiError(f"{param} is not supported by this server", param=param, code="unsupported_parameter")
    text = message[:1].lower() + message[1:]
    return ApiError(f"{param}: {text}" if param else text, param=param, code="invalid_value")


def _param(loc: tuple[str | int, ...]) -> str | None:
    """`messages[0].role` for a place in the body."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{_short(part)}" for part in loc)
    return text.removeprefix(".") or None


def _short(text: str) -> str:
    """What a client sent, as far as it is repeated."""
    return text if len(text) <= _SHOWN_CHARS else text[: _SHOWN_CHARS - 1] + "…"
