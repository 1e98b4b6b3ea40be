"""The proof of rendering: for the templates of well-known models, what is trained on is what will be served.

Of every trained answer: the ids before it are those that the server's own prompt builder makes of the same messages,
and the ids that count decode to the words that the model has to write, its end token included, and to nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerFast

from rayswift.data.formats import RowError
from rayswift.data.loss_rule import LossRule
from rayswift.data.media.parts import with_parts
from rayswift.data.rendering import _call, _chat
from rayswift.data.templates import chat_text
from rayswift.data.tokenize import encode
from rayswift.data.types import Example, Message, Sample
from rayswift.serving import messages as messages_of_api
from rayswift.serving.api_errors import ApiError
from rayswift.serving.prompts import PromptBuilder
from tests.template_cases import FAMILIES, FOLDER, Family, arguments_of, tokenizer_of

SINGLE = (Message("user", "hi there"), Message("assistant", "yo, what is 42?"))
MULTI = (*SINGLE, Message("user", "no more"), Message("assistant", "The weather."), Message("user", "Look it up"),
         Message("assistant", "I wonder. 42"))  # fmt: skip
SYSTEM = Message("system", "be brief")
THOUGHTS = (
    Message("user", "hi there"), Message("assistant", "yo", reasoning_content="I wonder"),
    Message("user", "what is it"), Message("assistant", "42", reasoning_content="The weather\nin Paris?"),
)  # fmt: skip
FIND = {
    "type": "function",
    "function": {
        "name": "find_weather", "description": "Look up the weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}  # fmt: skip
CALL = '{"name": "find_weather", "arguments": {"city": "Paris"}}'
TOOLS = Sample(
    (Message("user", "what is the weather in Paris"), Message("tool_call", CALL), Message("tool", '"sunny"'),
     Message("assistant", "The tool says sunny"), Message("user", "yo"), Message("assistant", "no more")),
    tools=(FIND,),
)  # fmt: skip
CONVERSATIONS = {"single": SINGLE, "multi": MULTI, "system": (SYSTEM, *MULTI)}
CALLING = [name for name, family in FAMILIES.items() if family.call is not None]
THINKING = [name for name, family in FAMILIES.items() if family.thought is not None]


@dataclass(frozen=True)
class Answer:
    """An answer as a client would see it: the ids that the server feeds before it, and the words of it."""

    prompt: list[int]
    words: str


def trained(sample: Sample, tokenizer: PreTrainedTokenizerFast, turns: str = "default") -> list[Example]:
    (found,) = encode(
        [sample], tokenizer, max_length=4096, rendering="chat", loss=LossRule(turns=turns)  # type: ignore[arg-type]
    )  # fmt: skip
    assert not isinstance(found, RowError), found
    return found


def runs(examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast) -> list[Answer]:
    """What counts: each unbroken run of weights, with the ids before it. Nothing else has a weight, and all have 1."""
    found = []
    for example in examples:
        assert set(example.loss_mask) <= {0, 1}
        before = 0
        for place, weight in enumerate([*example.loss_mask, 0]):
            if weight and not before:
                start = place
            if before and not weight:
                words = decoded(tokenizer, example.input_ids[:place]).removeprefix(
                    decoded(tokenizer, example.input_ids[:start])
                )
                found.append(Answer(example.input_ids[:start], words))
            before = int(weight)
    return found


def decoded(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def served(messages: Sequence[Message], tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The prompt of a conversation that a client sends; what was thought before is not among what clients send."""
    request = [messages_of_api.Message(role=m.role, content=m.content) for m in messages]  # type: ignore[arg-type]
    return list(PromptBuilder(tokenizer).chat(request).ids)


def answers(family: Family, messages: Sequence[Message], tokenizer: PreTrainedTokenizerFast) -> list[Answer]:
    """Every answer of a conversation without tools."""
    return [
        Answer(served(messages[:place], tokenizer), family.words(message.content, message.reasoning_content))
        for place, message in enumerate(messages)
        if message.role == "assistant"
    ]


@pytest.mark.parametrize("turns", ["default", "last_round"])
@pytest.mark.parametrize("kind", CONVERSATIONS)
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_trained_is_what_is_served(name: str, kind: str, turns: str) -> None:
    family, tokenizer = FAMILIES[name], tokenizer_of(name)
    messages = CONVERSATIONS[kind]
    if kind == "system" and not family.system:
        (refused,) = encode([Sample(messages)], tokenizer, max_length=4096, rendering="chat")
        assert "is refused by the chat template" in str(refused)
        with pytest.raises(ApiError, match="chat template refuses this conversation"):
            served(messages[:2], tokenizer)
        return
    wanted = answers(family, messages, tokenizer)
    found = runs(trained(Sample(messages), tokenizer, turns), tokenizer)
    assert found == (wanted if turns == "default" else wanted[-1:])


@pytest.mark.parametrize("name", FAMILIES)
def test_all_trains_one_text_that_begins_as_the_last_prompt(name: str) -> None:
    family, tokenizer = FAMILIES[name], tokenizer_of(name)
    (example,) = trained(Sample(MULTI), tokenizer, "all")
    assert example.loss_mask == [0] + [1] * (len(example.input_ids) - 1)
    last = answers(family, MULTI, tokenizer)[-1]
    assert example.input_ids[: len(last.prompt)] == last.prompt
    rest = decoded(tokenizer, example.input_ids).removeprefix(decoded(tokenizer, last.prompt))
    assert rest.startswith(last.words)
    assert not rest.removeprefix(last.words).removesuffix(family.eos).strip()


@pytest.mark.parametrize("name", FAMILIES)
def test_thoughts(name: str) -> None:
    family, tokenizer = FAMILIES[name], tokenizer_of(name)
    if name not in THINKING:
        (refused,) = encode([Sample(THOUGHTS)], tokenizer, max_length=4096, rendering="chat")
        assert "`reasoning_content`, which the tokenizer's chat template does not render" in str(refused)
        return
    found = runs(trained(Sample(THOUGHTS), tokenizer), tokenizer)
    assert found == answers(family, THOUGHTS, tokenizer)


def called(family: Family, sample: Sample, tokenizer: PreTrainedTokenizerFast, number: str) -> list[Answer]:
    """Every answer of a conversation with calls, each of which has the id `number`."""
    chat: list[dict[str, Any]] = []
    wanted = []
    prompts = PromptBuilder(tokenizer)
    for message in sample.messages:
        if message.role == "assistant":
            words = family.words(message.content, after_tool=chat[-1]["role"] == "tool")
            wanted.append(Answer(prompts.turns(chat, sample.tools), words))
        if message.role == "tool_call":
            wanted.append(
                Answer(
                    prompts.turns(chat, sample.tools),
                    family.called(json.loads(message.content)["name"], arguments_of(message.content), number),
                )
            )
            call = {"type": "function", "id": number, "function": json.loads(message.content)}
            chat.append({"role": "assistant", "content": "", "tool_calls": [call]})
        else:
            extra = {"tool_call_id": number} if message.role == "tool" else {}
            chat.append({"role": message.role, "content": message.content} | extra)
    return wanted


@pytest.mark.parametrize("name", FAMILIES)
def test_tools(name: str) -> None:
    family, tokenizer = FAMILIES[name], tokenizer_of(name)
    if name not in CALLING:
        (refused,) = encode([TOOLS], tokenizer, max_length=4096, rendering="chat")
        assert isinstance(refused, RowError)
        assert "does not render" in str(refused) or "refused by the chat template" in str(refused)
        return
    number = _call(CALL, 1)["id"]
    assert len(number) == 9
    assert number.isalnum()
    found = runs(trained(TOOLS, tokenizer), tokenizer)
    assert found == called(family, TOOLS, tokenizer, number)


@pytest.mark.parametrize("name", ["mistral_v3", "qwen3", "gpt_oss", "deepseek_v3"])
def test_tools_beside_thoughts_system_and_a_second_call(name: str) -> None:
    """Calls within one round: what was thought before a call stays in the prompt where the template keeps it."""
    family, tokenizer = FAMILIES[name], tokenizer_of(name)
    second = CALL.replace("Paris", "42")
    sample = Sample(
        (SYSTEM, Message("user", "Look it up"), Message("tool_call", CALL), Message("tool", "no"),
         Message("tool_call", second), Message("tool", "sunny"), Message("assistant", "yo")),
        tools=(FIND,),
    )  # fmt: skip
    found = runs(trained(sample, tokenizer, "last_round"), tokenizer)
    assert len(found) == 3
    first, second_number = _call(CALL, 2)["id"], _call(second, 4)["id"]
    assert first != second_number
    assert [answer.words for answer in found] == [
        family.called("find_weather", '{"city": "Paris"}', first),
        family.called("find_weather", '{"city": "42"}', second_number),
        family.words("yo", after_tool=True),
    ]


@pytest.mark.parametrize("content", ["<think>\nI wonder\n</think>\n\n42", "<think>I wonder</think>42"])
@pytest.mark.parametrize("name", ["deepseek_r1", "qwen3", "qwen3_thinking"])
def test_a_thought_written_into_the_answer_is_trained_like_one_beside_it(name: str, content: str) -> None:
    """DeepSeek-R1's template drops what stands before `</think>`, in the last answer too."""
    family, tokenizer = FAMILIES[name], tokenizer_of(name)
    (found,) = runs(trained(Sample((Message("user", "hi"), Message("assistant", content))), tokenizer), tokenizer)
    assert found.words == family.words("42", "I wonder")
    assert found.prompt == served([Message("user", "hi")], tokenizer)


@pytest.mark.parametrize("said", ["\n\n42", "  yo", "\tno", "\n"])
@pytest.mark.parametrize("name", ["chatml", "internlm2", "zephyr", "phi3", "command_r", "llama3_1", "mistral_tekken"])
def test_an_answer_that_begins_with_white_space_leaves_the_next_prompt_as_it_is_served(name: str, said: str) -> None:
    """Within one text a token would lie across the border of an earlier answer, and never in what is served."""
    tokenizer = tokenizer_of(name)
    messages = (Message("user", "hi"), Message("assistant", said + "x"), *MULTI)
    found = runs(trained(Sample(messages), tokenizer), tokenizer)
    places = [place for place, message in enumerate(messages) if message.role == "assistant"]
    assert [answer.prompt for answer in found] == [served(messages[:place], tokenizer) for place in places]


def test_an_end_of_the_text_behind_the_end_of_a_turn_is_not_trained() -> None:
    """Phi-3 puts both: the server stops at the first, and in a conversation of several turns only it is there."""
    tokenizer = tokenizer_of("phi3")
    (example,) = trained(Sample(MULTI), tokenizer)
    weights: dict[str, list[float]] = {}
    tokens = tokenizer.convert_ids_to_tokens(example.input_ids)
    for token, weight in zip(tokens, example.loss_mask, strict=True):
        weights.setdefault(token, []).append(weight)
    assert weights["<|end|>"] == [0, 1] * 3, "of the user and of the assistant"
    assert tokens[-1] == "<|endoftext|>"
    assert weights["<|endoftext|>"] == [0]


def test_every_template_is_a_family_and_every_kind_of_tokenizer_is_among_them() -> None:
    assert {path.stem for path in FOLDER.glob("*.jinja")} == FAMILIES.keys()
    assert len(FAMILIES) >= 20
    assert {family.kind for family in FAMILIES.values()} == {"bytes", "first", "legacy", "never"}
    assert len(CALLING) >= 8
    assert len(THINKING) >= 4


@pytest.mark.parametrize("generation_prompt", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_rendered_here_is_rendered_by_transformers(name: str, generation_prompt: bool) -> None:
    """vLLM, and whoever loads the export, call apply_chat_template; here the compiled template is called directly."""
    tokenizer = tokenizer_of(name)
    for sample in (Sample(SINGLE), Sample(MULTI), Sample((SYSTEM, *MULTI)), Sample(THOUGHTS), TOOLS):
        chat, _ = _chat(sample.messages)
        tools = list(sample.tools)
        try:
            wanted: Any = tokenizer.apply_chat_template(
                with_parts(tokenizer, chat), tools=tools or None, tokenize=False,
                add_generation_prompt=generation_prompt,
            )  # fmt: skip
        except (TemplateError, TypeError) as error:
            wanted = type(error)
        if wanted is TypeError:  # DeepSeek's take arguments as text: see chat_text
            continue
        try:
            found: Any = chat_text(tokenizer, chat, tools, generation_prompt=generation_prompt)
        except TemplateError as error:
            found = type(error)
        assert found == wanted
