"""A tiny Qwen3 that calls tools as Hermes and Qwen2.5 do, because a few conversations were learnt by heart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from rayswift.data.templates import chat_text
from rayswift.models.adapters import load_base
from rayswift.models.init import init_model
from rayswift.models.loading import load_tokenizer

_TEMPLATE = Path(__file__).parent / "chat_templates/qwen2_5.jinja"
_STEPS, _GOOD_LOSS = 600, 5e-3


def _tool(name: str, **parameters: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": parameters, "required": [*parameters], "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": f"What is {name}?", "parameters": schema}}


TOOLS = [
    _tool(
        "get_weather",
        city={"type": "string", "enum": ["Rome", "Oslo"]},
        days={"type": "integer", "minimum": 1, "maximum": 7},
    ),
    _tool("get_time", city={"type": "string", "enum": ["Rome", "Oslo"]}),
]


def written(name: str, arguments: dict[str, Any]) -> str:
    """A call as the model writes it."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def asked(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def answered(text: str, number: str, name: str, arguments: str, result: str) -> list[dict[str, Any]]:
    """A conversation in which a tool was called and has answered."""
    call = {"id": number, "type": "function", "function": {"name": name, "arguments": arguments}}
    return [
        *asked(text),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": number, "content": result},
    ]


WEATHER = {"city": "Rome", "days": 3}
_ROWS: list[tuple[list[dict[str, Any]], bool, str]] = [
    (asked("weather in Rome?"), True, written("get_weather", WEATHER)),
    (asked("time in Oslo?"), True, written("get_time", {"city": "Oslo"})),
    (
        asked("time in Rome and Oslo?"), True,
        "Both at once.\n" + written("get_time", {"city": "Rome"}) + "\n" + written("get_time", {"city": "Oslo"}),
    ),
    (asked("hello"), True, "Hello to you."),
    (asked("weather in Rome?"), False, "I cannot know."),
    (answered("weather in Rome?", "a", "get_weather", json.dumps(WEATHER), "12 degrees"), True, "It is 12 there."),
]  # fmt: skip
"""What is said, whether the tools are told, and the answer."""


def make_caller(folder: Path, text: Path) -> Path:
    """The folder of the model. `text` is what its tokenizer has learnt beside the conversations."""
    words = folder.parent / "conversations.txt"
    lines = [json.dumps(TOOLS), _TEMPLATE.read_text(), *(f"{json.dumps(chat)} {answer}" for chat, _, answer in _ROWS)]
    words.write_text("\n".join(lines * 50))  # so that they are few tokens
    init_model(
        str(folder), arch="qwen3", layers=2, hidden_size=128, heads=4, kv_heads=2, vocab_size=640, max_length=1024,
        train_tokenizer_files=[str(words), str(text)], seed=0,
    )  # fmt: skip
    tokenizer, model = load_tokenizer(str(folder)), load_base(str(folder)).train()
    tokenizer.chat_template = _TEMPLATE.read_text()
    rows = [_ids(tokenizer, *row) for row in _ROWS]
    length = max(len(ids) for ids, _ in rows)
    ids_BT, labels_BT = torch.zeros(len(rows), length, dtype=torch.long), torch.full((len(rows), length), -100)
    for row, (ids, num_prompt) in enumerate(rows):
        ids_BT[row, : len(ids)] = torch.tensor(ids)
        labels_BT[row, num_prompt : len(ids)] = torch.tensor(ids[num_prompt:])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(_STEPS):
        optimizer.zero_grad()
        loss = model(input_ids=ids_BT, labels=labels_BT).loss
        loss.backward()
        optimizer.step()
        if loss.item() < _GOOD_LOSS:
            break
    assert loss.item() < _GOOD_LOSS, "it does not know its answers"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _ids(tokenizer: Any, chat: list[dict[str, Any]], has_tools: bool, answer: str) -> tuple[list[int], int]:
    """All tokens of a row and how many of them are its prompt."""
    turns = [turn | {"tool_calls": [_parsed(call) for call in turn["tool_calls"]]} if "tool_calls" in turn else turn
             for turn in chat]  # fmt: skip
    prompt = tokenizer(chat_text(tokenizer, turns, TOOLS if has_tools else (), generation_prompt=True),
                       add_special_tokens=False)["input_ids"]  # fmt: skip
    return prompt + tokenizer(answer + "<|im_end|>", add_special_tokens=False)["input_ids"], len(prompt)


def _parsed(call: dict[str, Any]) -> dict[str, Any]:
    return call | {"function": call["function"] | {"arguments": json.loads(call["function"]["arguments"])}}
