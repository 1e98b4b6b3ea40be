"""Loss only where it belongs, proved by decoding: the trained tokens spell the answers and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from rayswift.config.job import DataSource
from rayswift.data.blocks import local_blocks, step_inputs
from rayswift.data.detect import normalise
from rayswift.data.formats import RowError
from rayswift.data.ledger import Ledger
from rayswift.data.rendering import Rendering, render
from rayswift.data.sources import index_sources, read_rows
from rayswift.data.tokenize import Truncation, encode
from rayswift.data.types import Example, Message, Sample
from rayswift.errors import ConfigError
from tests.data_cases import (
    CHATML,
    LLAMA2,
    LLAMA3,
    MARKED,
    PLAIN,
    R1,
    REASONING,
    THINKING,
    TOOLS,
    UNMARKED,
    make_tokenizer,
    plan_of,
    write_jsonl,
)  # fmt: skip

CHAT = Sample(
    (
        Message("system", "be brief"),
        Message("user", "hi"),
        Message("assistant", "yo there"),
        Message("user", "more"),
        Message("assistant", "no"),
    )
)


def examples(sample: Sample, tokenizer: PreTrainedTokenizerFast, rendering: str = "chat") -> list[Example]:
    (found,) = encode([sample], tokenizer, max_length=4096, rendering=rendering)  # type: ignore[arg-type]
    assert not isinstance(found, RowError), found
    return found


def trained_runs(example: Example, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The decoded text of each unbroken run of trained tokens."""
    runs: list[list[int]] = []
    before = 0
    for token, mask in zip(example.input_ids, example.loss_mask, strict=True):
        if mask and not before:
            runs.append([])
        if mask:
            runs[-1].append(token)
        before = mask
    return [str(tokenizer.decode(run)) for run in runs]


@pytest.mark.parametrize(
    ("template", "eos", "expected"),
    [
        (CHATML, "<|im_end|>", ["yo there<|im_end|>", "no<|im_end|>"]),
        (LLAMA2, "</s>", [" yo there </s>", " no </s>"]),
        (LLAMA3, "<|eot_id|>", ["yo there<|eot_id|>", "no<|eot_id|>"]),
        (R1, "<|im_end|>", ["\n</think>\n\nno<|im_end|>"]),
        (PLAIN, "</s>", ["assistant: no</s>"]),
        (MARKED, "</s>", ["no</s>"]),
        (TOOLS, "<|im_end|>", ["yo there<|im_end|>", "no<|im_end|>"]),
    ],
    ids=["chatml", "llama2", "llama3", "r1", "plain", "marked", "tools"],
)
def test_the_trained_tokens_decode_to_the_answers(template: str, eos: str, expected: list[str]) -> None:
    tokenizer = make_tokenizer(template, eos=eos)
    found = examples(CHAT, tokenizer)
    assert trained_runs(found[-1], tokenizer) == expected
    whole = str(tokenizer.apply_chat_template([vars_of(m) for m in CHAT.messages], tokenize=False)).rstrip()
    if template == R1:
        whole = "<think>\n\n</think>\n\nno".join(whole.rsplit("no", 1))  # what the prompt opens is closed
    assert str(tokenizer.decode(found[-1].input_ids)).rstrip() == whole.removesuffix(eos) + eos


def vars_of(message: Message) -> dict[str, str]:
    return {"role": message.role, "content": message.content}


@pytest.mark.parametrize("template", [CHATML, LLAMA3, THINKING, TOOLS, R1])
def test_the_ids_before_a_trained_turn_are_those_the_server_feeds(template: str) -> None:
    tokenizer = make_tokenizer(template)
    for example in examples(CHAT, tokenizer):
        start = len(example.loss_mask) - 1 - example.loss_mask[::-1].index(1)
        while example.loss_mask[start - 1]:
            start -= 1
        turn = 4 if "more" in tokenizer.decode(example.input_ids) else 2
        prompt = tokenizer.apply_chat_template(
            [vars_of(m) for m in CHAT.messages[:turn]], tokenize=True, add_generation_prompt=True, return_dict=False
        )
        assert example.input_ids[:start] == prompt


def test_a_template_that_rewrites_the_past_is_trained_turn_by_turn() -> None:
    tokenizer = make_tokenizer(THINKING)
    first, second = examples(CHAT, tokenizer)
    assert trained_runs(first, tokenizer) == ["<think>\n\n</think>\n\nyo there<|im_end|>"]
    assert trained_runs(second, tokenizer) == ["<think>\n\n</think>\n\nno<|im_end|>"]
    assert "<think>" not in str(tokenizer.decode(second.input_ids)).split("more")[0]


def test_a_template_without_prefix_and_marks_is_refused() -> None:
    with pytest.raises(RowError, match=r"neither extends the text of the turns before .* nor marks answers"):
        render(CHAT, make_tokenizer(UNMARKED, eos="</s>"), "chat")


def test_loss_per_message_overrides_the_role() -> None:
    tokenizer = make_tokenizer()
    turns = (
        Message("user", "hi", True),
        Message("assistant", "yo", False),
        Message("user", "a"),
        Message("assistant", "b"),
    )
    (example,) = examples(Sample(turns), tokenizer)
    assert trained_runs(example, tokenizer) == ["user\nhi<|im_end|>", "b<|im_end|>"]
    with pytest.raises(RowError, match="every `loss` is false"):
        render(Sample((Message("user", "hi"), Message("assistant", "yo", False))), tokenizer, "chat")


@pytest.mark.parametrize("answer", ["<think", "<a> b", "assistant", "i", "t:"])
def test_an_answer_that_goes_on_as_the_prompt_does_is_trained_whole(answer: str) -> None:
    tokenizer = make_tokenizer(R1)
    (example,) = examples(Sample((Message("user", "hi"), Message("assistant", answer))), tokenizer)
    assert trained_runs(example, tokenizer) == [f"\n</think>\n\n{answer}<|im_end|>"]


def test_answers_announced_in_other_words_are_refused() -> None:
    tokenizer = make_tokenizer(R1.replace("'<|im_start|>assistant:<think>", "'Bot: "))
    with pytest.raises(RowError, match="neither extends the text of the turns before with its own generation prompt"):
        render(CHAT, tokenizer, "chat")


def test_a_weight_per_message_is_the_weight_of_each_of_its_tokens(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "hi", "loss_scale": 3},
        {"role": "assistant", "content": "yo", "loss_scale": 0.5},
        {"role": "user", "content": "a", "loss": True, "loss_scale": 0.25},
        {"role": "assistant", "content": "b", "weight": 2},
    ]
    source = DataSource(path=str(write_jsonl(tmp_path / "a.jsonl", [{"messages": turns}])))
    tokenizer = make_tokenizer()
    (example,) = examples(normalise({"messages": turns}, "messages", source), tokenizer)
    weights: dict[float, list[int]] = {}
    for token, weight in zip(example.input_ids, example.loss_mask, strict=True):
        weights.setdefault(float(weight), []).append(token)
    said = {weight: str(tokenizer.decode(tokens)) for weight, tokens in weights.items() if weight}
    assert said == {0.5: "yo<|im_end|>", 0.25: "<|im_start|>user\na<|im_end|>", 2.0: "b<|im_end|>"}

    blocks = local_blocks(
        plan_of(source), tokenizer, data_rank=0, data_size=1, global_batch_size=1, ledger=Ledger.start("")
    )
    share = next(step_inputs(blocks, sequences_per_step=1, micro_batch_size=1, pad_id=0))
    weights_BT = share.micro_batches[0].weights_BT
    assert weights_BT[0, : len(example.loss_mask) - 1].tolist() == example.loss_mask[1:]


def test_reasoning_is_rendered_by_the_template_or_refused() -> None:
    row = {
        "messages": [
            *({"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo", "reasoning_content": "hm"}),
            *({"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning_content": "so"}),
        ]
    }
    sample = normalise(row, "messages", DataSource(path="x"))
    tokenizer = make_tokenizer(REASONING)
    first, second = examples(sample, tokenizer)
    assert trained_runs(first, tokenizer) == ["<think>hm</think>yo<|im_end|>"]
    assert trained_runs(second, tokenizer) == ["<think>so</think>b<|im_end|>"]
    renderings: tuple[Rendering, ...] = ("chat", "text")
    for rendering in renderings:
        (found,) = encode([sample], make_tokenizer(), max_length=64, rendering=rendering)
        assert "`reasoning_content`, which the tokenizer's chat template does not render" in str(found)


def test_text_is_trained_to_its_eos_and_begins_with_one_bos() -> None:
    tokenizer = make_tokenizer()
    (example,) = examples(Sample(text="the class statement"), tokenizer)
    assert example.input_ids[-1] == tokenizer.eos_token_id
    assert example.loss_mask == [0] + [1] * (len(example.input_ids) - 1)
    assert tokenizer.decode(example.input_ids) == "the class statement<|im_end|>"

    from tokenizers.processors import TemplateProcessing

    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    (example,) = examples(Sample(text="the class statement"), tokenizer)
    assert [i for i, token in enumerate(example.input_ids) if token == bos] == [0]
    tokenizer.chat_template = LLAMA2
    (example,) = examples(CHAT, tokenizer)
    assert [i for i, token in enumerate(example.input_ids) if token == bos] == [0]


def test_a_conversation_pretrained_as_text_is_trained_everywhere() -> None:
    tokenizer = make_tokenizer()
    (example,) = examples(CHAT, tokenizer, "text")
    assert example.loss_mask == [0] + [1] * (len(example.input_ids) - 1)


def test_no_template_names_the_model_and_the_fix() -> None:
    with pytest.raises(
        ConfigError, match=r"model\.path=.* has a tokenizer without a chat template; .*method\.name=pretrain"
    ):
        render(CHAT, make_tokenizer(None), "chat")


def test_a_template_that_refuses_a_row_costs_that_row() -> None:
    tokenizer = make_tokenizer("{{ raise_exception('no system here') }}")
    (found,) = encode([CHAT], tokenizer, max_length=64, rendering="chat")
    assert isinstance(found, RowError)
    assert "is refused by the chat template: no system here" in str(found)


def test_tools_are_rendered_or_refused() -> None:
    sample = Sample(
        (
            Message("user", "hi"),
            Message("tool_call", '{"name": "f", "arguments": {"x": 1}}'),
            Message("tool", "2"),
            Message("assistant", "b"),
        ),
        tools=({"type": "function", "function": {"name": "f"}},),
    )
    tokenizer = make_tokenizer(TOOLS)
    (example,) = examples(sample, tokenizer)
    call, answer = trained_runs(example, tokenizer)
    assert call.startswith("<tool_call>{")
    assert '"f"' in call
    assert answer == "b<|im_end|>"
    with pytest.raises(RowError, match="the tool 'f', which the tokenizer's chat template does not render"):
        render(sample, make_tokenizer(CHATML), "chat")
    with pytest.raises(RowError, match="the tool 'f', which the tokenizer's chat template does not render"):
        render(sample, make_tokenizer(CHATML), "text")


def test_real_conversations_with_tools(shared_data: Path) -> None:
    source = DataSource(path=str(shared_data / "llamafactory_demo" / "glaive_toolcall_en_demo.json"), limit=40)
    (file,) = index_sources([source])
    tokenizer = make_tokenizer(TOOLS)
    for _, _, row in (raw for span in file.spans for raw in read_rows(file, span)):
        sample = normalise(row, "sharegpt", source)  # type: ignore[arg-type]
        (example,) = examples(sample, tokenizer)
        said = [message for message in sample.messages if message.role in ("assistant", "tool_call")]
        runs = trained_runs(example, tokenizer)
        assert len(runs) == len(said)
        for run, message in zip(runs, said, strict=True):
            assert message.role == "tool_call" or run == message.content + "<|im_end|>"


@pytest.mark.parametrize(
    ("truncation", "lengths"),
    [("right", [16]), ("left", [16]), ("split", [16, 16, 16, 12])],
    ids=["right", "left", "split"],
)
def test_truncation(truncation: str, lengths: list[int]) -> None:
    tokenizer = make_tokenizer()
    text = " ".join(["zq"] * 20)
    (whole,) = examples(Sample(text=text), tokenizer)
    assert len(whole.input_ids) == 60
    (pieces,) = encode([Sample(text=text)], tokenizer, max_length=16, rendering="text", truncation=truncation)  # type: ignore[arg-type]
    assert isinstance(pieces, list)
    assert [len(piece.input_ids) for piece in pieces] == lengths
    assert all(piece.loss_mask[0] == 0 for piece in pieces)
    kept = [token for piece in pieces for token in piece.input_ids]
    assert kept == {"right": whole.input_ids[:16], "left": whole.input_ids[-16:], "split": whole.input_ids}[truncation]


def test_what_cannot_be_trained_is_a_bad_row_and_the_others_are_not() -> None:
    tokenizer = make_tokenizer()
    long = Sample((Message("user", "word " * 50), Message("assistant", "yo")))
    good = Sample((Message("user", "a"), Message("assistant", "b")))
    half = Sample((Message("user", "a"), Message("assistant", "b\ud800")))
    results = encode([long, good, half], tokenizer, max_length=32, rendering="chat")
    assert "no token left to train on: its" in str(results[0])
    assert isinstance(results[1], list)
    assert "half a surrogate pair" in str(results[2])
    (deleted,) = encode([long], tokenizer, max_length=32, rendering="chat", truncation="delete")
    assert "over data.max_length=32" in str(deleted)


def test_a_turn_that_is_too_long_costs_only_that_turn_where_each_is_a_text() -> None:
    tokenizer = make_tokenizer(THINKING)
    turns = (Message("user", "hi"), Message("assistant", "yo"), Message("user", "w " * 99), Message("assistant", "no"))
    truncations: tuple[Truncation, ...] = ("right", "delete")
    for truncation in truncations:
        (found,) = encode([Sample(turns)], tokenizer, max_length=64, rendering="chat", truncation=truncation)
        assert isinstance(found, list), found
        (example,) = found
        assert trained_runs(example, tokenizer) == ["<think>\n\n</think>\n\nyo<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ messages[0]['content'].nothing() }}", "is refused by the chat template: 'str object' has no attribute"),
        ("{{ 1 // (messages | length - 2) }}", "ZeroDivisionError: "),
        ("{{ messages[0]['content'].split('x')[7] + 'y' }}", "is refused by the chat template: list object has no"),
        ("{{ messages[0]['content'].index('z') }}", "is refused by the chat template: substring not found"),
        ("{{ messages[0]['content'].format() }}", "IndexError: tuple index"),
    ],
)
def test_whatever_a_template_raises_costs_the_row(template: str, reason: str) -> None:
    (found,) = encode(
        [Sample((Message("user", "{}"), Message("assistant", "b")))],
        make_tokenizer(template),
        max_length=64,
        rendering="chat",
    )
    assert isinstance(found, RowError)
    assert str(found).startswith(reason)


def test_a_row_that_the_tokenizer_refuses_costs_that_row() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"hi": 0, "yo": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    samples = [Sample(text="hi yo"), Sample(text="nobody knows"), Sample(text="yo hi yo")]
    good, bad, also_good = encode(samples, tokenizer, max_length=8, rendering="text")
    assert isinstance(good, list)
    assert isinstance(also_good, list)
    assert (good[0].input_ids, also_good[0].input_ids) == ([0, 1], [1, 0, 1])
    assert "WordLevel error" in str(bad)
