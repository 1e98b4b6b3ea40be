"""Chat templates of well-known models, written out from their documented formats, and what each answer must be.

The templates are the files of `chat_templates/`. Here is what a reader of a model's card would say of it: its special
tokens, the kind of its tokenizer, what it refuses, and the very text that the model has to write for an answer.
"""

# ruff: noqa: RUF001 - DeepSeek's special tokens are written with wide bars
from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

FOLDER = Path(__file__).parent / "chat_templates"
WORDS = (
    "be brief hi there yo what is the weather in Paris Look it up no more 42 I wonder. "
    "The find_weather tool says sunny <think>\n\n</think>\n\n user assistant system model "
    "USER: ASSISTANT: [INST] [/INST] <tool_call> functions.find"
)


@dataclass(frozen=True)
class Family:
    """A model family. In `answer`, `thought` and `call`, SAID THOUGHT NAME ARGUMENTS ID stand for a turn's own.

    `thought` None: the template drops thoughts, so that rows with some are refused; `call` and tools likewise.
    """

    answer: str
    special: str
    bos: str = ""
    eos: str = ""
    kind: Literal["bytes", "first", "legacy", "never"] = "bytes"
    system: bool = True
    thought: str | None = None
    call: str | None = None
    after_tool: str | None = None
    """`answer` behind what a tool answered, where it is another."""

    def words(self, said: str, thought: str = "", *, after_tool: bool = False) -> str:
        """What the model has to write for an answer, the token that ends it included."""
        form = self.thought if thought and self.thought else self.answer
        form = self.after_tool if after_tool and self.after_tool else form
        return form.replace("SAID", said).replace("THOUGHT", thought)

    def called(self, name: str, arguments: str, number: str) -> str:
        """What it has to write to call a tool."""
        assert self.call is not None
        return self.call.replace("NAME", name).replace("ARGUMENTS", arguments).replace("ID", number)


_CHATML = "<|im_start|> <|im_end|> <|endoftext|>"
_HERMES = '<tool_call>\n{"name": "NAME", "arguments": ARGUMENTS}\n</tool_call>'
_DEEPSEEK = (
    "<｜begin▁of▁sentence｜> <｜end▁of▁sentence｜> <｜User｜> <｜Assistant｜> <｜tool▁calls▁begin｜> "
    "<｜tool▁calls▁end｜> <｜tool▁call▁begin｜> "
    "<｜tool▁call▁end｜> <｜tool▁sep｜> <｜tool▁outputs▁begin｜> <｜tool▁outputs▁end｜> "
    "<｜tool▁output▁begin｜> <｜tool▁output▁end｜>"
)
_DEEPSEEK_CALL = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\n```json\nARGUMENTS\n```<｜tool▁call▁end｜>"
    "<｜tool▁calls▁end｜><｜end▁of▁sentence｜>"
)
_MISTRAL = "<s> </s> [INST] [/INST] [TOOL_CALLS] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS]"
_GEMMA = "<bos> <eos> <pad> <start_of_turn> <end_of_turn>"
_PHI = "<|end|> <|endoftext|> <|system|> <|user|> <|assistant|>"

FAMILIES: dict[str, Family] = {
    "llama2": Family(" SAID </s>", "<s> </s>", "<s>", "</s>", "legacy"),
    "llama3_1": Family(
        "SAID<|eot_id|>", "<|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|end_of_text|>",
        "<|begin_of_text|>", "<|eot_id|>", call='{"name": "NAME", "parameters": ARGUMENTS}<|eot_id|>',
    ),
    "qwen2_5": Family("SAID<|im_end|>", _CHATML, eos="<|im_end|>", call=f"{_HERMES}<|im_end|>"),
    "qwen3": Family(
        "<think>\n\n</think>\n\nSAID<|im_end|>", _CHATML, eos="<|im_end|>",
        thought="<think>\nTHOUGHT\n</think>\n\nSAID<|im_end|>", call=f"<think>\n\n</think>\n\n{_HERMES}<|im_end|>",
    ),
    "qwen3_thinking": Family(
        "\n</think>\n\nSAID<|im_end|>", _CHATML, eos="<|im_end|>", thought="THOUGHT\n</think>\n\nSAID<|im_end|>",
        call=f"\n</think>\n\n{_HERMES}<|im_end|>",
    ),
    "mistral_v1": Family(" SAID</s>", "<s> </s>", "<s>", "</s>", "legacy", system=False),
    "mistral_v3": Family(
        " SAID</s>", _MISTRAL, "<s>", "</s>", "first",
        call='[TOOL_CALLS] [{"name": "NAME", "arguments": ARGUMENTS, "id": "ID"}]</s>',
    ),
    "mistral_tekken": Family(
        "SAID</s>", _MISTRAL, "<s>", "</s>",
        call='[TOOL_CALLS][{"name": "NAME", "arguments": ARGUMENTS, "id": "ID"}]</s>',
    ),
    "gemma2": Family("SAID<end_of_turn>", _GEMMA, "<bos>", "<eos>", "never", system=False),
    "gemma3": Family("SAID<end_of_turn>", _GEMMA, "<bos>", "<eos>", "never"),
    "phi3": Family("SAID<|end|>", _PHI, "<s>", "<|endoftext|>", "legacy"),
    "phi4": Family("SAID<|im_end|>", f"{_CHATML} <|im_sep|>", eos="<|im_end|>"),
    "phi4_mini": Family("SAID<|end|>", f"{_PHI} <|tool|> <|/tool|>", eos="<|endoftext|>"),
    "deepseek_v3": Family(
        "SAID<｜end▁of▁sentence｜>", _DEEPSEEK, "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", call=_DEEPSEEK_CALL
    ),
    "deepseek_r1": Family(
        "\n</think>\n\nSAID<｜end▁of▁sentence｜>", _DEEPSEEK, "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>",
        thought="THOUGHT\n</think>\n\nSAID<｜end▁of▁sentence｜>", call="\n</think>\n\n" + _DEEPSEEK_CALL,
        after_tool="SAID<｜end▁of▁sentence｜>",
    ),
    "chatml": Family("SAID<|im_end|>", _CHATML, eos="<|im_end|>"),
    "zephyr": Family("SAID</s>", "<s> </s>", "<s>", "</s>", "first"),
    "vicuna": Family(" SAID</s>", "<s> </s>", "<s>", "</s>", "legacy"),
    "command_r": Family(
        "SAID<|END_OF_TURN_TOKEN|>",
        "<BOS_TOKEN> <|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|> <|SYSTEM_TOKEN|> <|USER_TOKEN|> <|CHATBOT_TOKEN|>",
        "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>",
    ),
    "internlm2": Family("SAID<|im_end|>", "<s> </s> <|im_start|> <|im_end|>", "<s>", "</s>", "first"),
    "glm4": Family(
        "\nSAID<|endoftext|>",
        "[gMASK] <sop> <|system|> <|user|> <|assistant|> <|observation|> <|endoftext|>", eos="<|endoftext|>",
        call="NAME\nARGUMENTS<|endoftext|>",
    ),
    "gpt_oss": Family(
        "<|channel|>final<|message|>SAID<|return|>",
        "<|start|> <|message|> <|channel|> <|end|> <|return|> <|call|> <|endoftext|>", eos="<|return|>",
        thought="<|channel|>analysis<|message|>THOUGHT<|end|><|start|>assistant<|channel|>final<|message|>SAID<|return|>",
        call=" to=functions.NAME<|channel|>commentary json<|message|>ARGUMENTS<|call|>",
    ),
    "smollm3": Family(
        "SAID<|im_end|>", _CHATML, eos="<|im_end|>",
        call='<tool_call>\n{"name": "NAME", "arguments": ARGUMENTS}\n</tool_call><|im_end|>',
    ),
    "granite": Family(
        "SAID<|end_of_text|>", "<|start_of_role|> <|end_of_role|> <|end_of_text|> <|tool_call|>",
        eos="<|end_of_text|>", call='<|tool_call|>[{"name": "NAME", "arguments": ARGUMENTS}]<|end_of_text|>',
    ),
    "tulu3": Family("SAID<|endoftext|>", "<|endoftext|>", eos="<|endoftext|>"),
}  # fmt: skip


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """A tokenizer of the family's kind with its special tokens and template, trained on a few words."""
    family = FAMILIES[name]
    tokenizer = Tokenizer.from_str(_trained(family.kind))
    ends = {"eos_token": family.eos} | ({"bos_token": family.bos} if family.bos else {})
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends)
    added = [AddedToken(token, special=True, normalized=False) for token in family.special.split()]
    fast.add_special_tokens({"additional_special_tokens": added})  # type: ignore[dict-item]
    fast.chat_template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    return fast


@cache
def _trained(kind: str) -> str:
    byte_level = kind == "bytes"
    tokenizer = Tokenizer(models.BPE() if byte_level else models.BPE(byte_fallback=True, unk_token="<unk>"))
    if byte_level:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        if kind == "legacy":
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    fallback = [] if byte_level else ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=fallback, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if byte_level else [],
    )  # fmt: skip
    tokenizer.train_from_iterator([WORDS] * 20, trainer)
    return str(tokenizer.to_str())


def arguments_of(content: str) -> str:
    """The JSON of a call's arguments, as templates write it."""
    return json.dumps(json.loads(content)["arguments"])
