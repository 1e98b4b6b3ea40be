"""What counts in the loss, proved by decoding: turns by name, parts of answers by pattern, ids as without either."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from rayswift import plugins
from rayswift.config.job import DataSpec
from rayswift.data.formats import RowError
from rayswift.data.loss_rule import LossRule, loss_rule, rule_of
from rayswift.data.prepare import prepare_chunk
from rayswift.data.rendering import render
from rayswift.data.tokenize import encode
from rayswift.data.types import Message, Sample
from rayswift.errors import ConfigError
from tests.data_cases import CHATML, LLAMA2, THINKING, TOOLS, make_sentencepiece, make_tokenizer, plan_of, write_jsonl

ROUNDS = Sample(
    (
        Message("system", "be brief"),
        Message("user", "hi"),
        Message("assistant", "yo there"),
        Message("user", "look it up"),
        Message("tool_call", '{"name": "find", "arguments": {}}'),
        Message("tool", "nothing"),
        Message("assistant", "no"),
    )
)
REACT = "Thought: I look.\nAction: find\nAction Input: {}\nObservation: 12 rows\nThought: done\nFinal Answer: twelve"


def weighed(sample: Sample, rule: LossRule, tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, float]]:
    """The decoded runs of tokens of one weight, those of weight 0 left out."""
    (found,) = encode([sample], tokenizer, max_length=4096, rendering="chat", loss=rule)
    assert not isinstance(found, RowError), found
    runs: list[tuple[list[int], float]] = []
    before = None
    for token, weight in zip(found[0].input_ids, found[0].loss_mask, strict=True):
        if weight != before:
            runs.append(([], weight))
        runs[-1][0].append(token)
        before = weight
    return [(str(tokenizer.decode(ids)), weight) for ids, weight in runs if weight]


def chat(answer: str, **settings: Any) -> Sample:
    return Sample((Message("user", "go"), Message("assistant", answer, **settings)))


def rule(chain: str = "default", **weights: Any) -> LossRule:
    return loss_rule(chain, weights.get("weights", {}))


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ("default", ["yo there<|im_end|>", '<tool_call>{"name": "find", "arguments": {}}</tool_call><|im_end|>',
                     "no<|im_end|>"]),
        ("last_round", ['<tool_call>{"name": "find", "arguments": {}}</tool_call><|im_end|>', "no<|im_end|>"]),
    ],
)  # fmt: skip
def test_the_turns_that_are_trained(turns: str, expected: list[str]) -> None:
    found = weighed(ROUNDS, rule(turns), make_tokenizer(TOOLS))
    assert [(text, 1) for text in expected] == found


def test_all_trains_every_token_but_the_first() -> None:
    tokenizer = make_tokenizer(TOOLS)
    (whole,) = render(ROUNDS, tokenizer, "text")
    assert weighed(ROUNDS, rule("all"), tokenizer) == [(whole.text.removeprefix("<|im_start|>"), 1)]


def test_a_message_says_otherwise_under_every_rule() -> None:
    turns = (
        Message("user", "hi", 1),
        Message("assistant", "yo", 0),
        Message("user", "more"),
        Message("assistant", "no", 2),
    )
    tokenizer = make_tokenizer(CHATML)
    assert weighed(Sample(turns), rule("last_round"), tokenizer) == [
        ("user\nhi<|im_end|>", 1),
        ("no<|im_end|>", 2),
    ]
    everything = dict(weighed(Sample(turns), rule("all"), tokenizer))
    assert list(everything.values()) == [1, 1, 2, 1]
    assert not any("yo" in text for text in everything)


def test_react_answers_count_as_the_table_says_and_always_end() -> None:
    found = weighed(chat(REACT), rule("react"), make_tokenizer(CHATML))
    assert found == [
        ("Thought: I look.\n", 1),
        ("Action: find\nAction Input: {}\nObservation:", 2),
        ("Thought: done\nFinal Answer: twelve<|im_end|>", 1),
    ]
    stopped = weighed(chat(REACT.partition(" 12")[0]), rule("react"), make_tokenizer(CHATML))
    assert stopped[-1] == ("<|im_end|>", 1), "the end of the turn is taught behind every delimiter"


def test_calls_as_qwen_agent_writes_them_count_as_the_table_says() -> None:
    answer = "I look.\n✿FUNCTION✿: find\n✿ARGS✿: {}\n✿RESULT✿: 12 rows\n✿RETURN✿: twelve"
    assert weighed(chat(answer), rule("qwen"), make_tokenizer(CHATML)) == [
        ("I look.\n", 1),
        ("✿FUNCTION✿: find\n✿ARGS✿: {}\n✿RESULT✿:", 2),
        ("✿RETURN✿: twelve<|im_end|>", 1),
    ]


def test_tables_follow_a_choice_of_turns_and_one_another() -> None:
    turns = (
        Message("user", "a"), Message("assistant", "<think>\n\n</think>\n\nno <tool_call>x</tool_call>"),
        Message("user", "b"), Message("assistant", "<think>\n\n</think>\n\nyes <tool_call>y</tool_call>"),
    )  # fmt: skip
    chained = rule("last_round+ignore_empty_think+hermes", weights={"yes": 0.5})
    assert weighed(Sample(turns), chained, make_tokenizer(CHATML)) == [
        ("yes", 0.5),
        (" ", 1),
        ("<tool_call>y</tool_call>", 2),
        ("<|im_end|>", 1),
    ]
    without = rule("all+ignore_think")
    texts = weighed(Sample(turns), without, make_tokenizer(CHATML))
    assert [weight for _, weight in texts] == [1, 1, 1]
    assert "think" not in "".join(text for text, _ in texts)
    assert "user\nb" in texts[1][0]


@pytest.mark.parametrize("truncation", ["right", "left", "split"])
def test_a_conversation_that_is_cut_keeps_the_weights_of_its_tokens(truncation: Any) -> None:
    tokenizer = make_tokenizer(CHATML)
    turns = tuple(
        Message(role, text, loss)
        for role, text, loss in (
            ("user", "hi there", None), ("assistant", "w " * 9, 0.5), ("user", "more", None),
            ("assistant", "no " * 9, 2),
        )
    )  # fmt: skip
    ((whole,),) = encode([Sample(turns)], tokenizer, max_length=4096, rendering="chat")  # type: ignore[misc]
    (pieces,) = encode([Sample(turns)], tokenizer, max_length=24, rendering="chat", truncation=truncation)
    assert isinstance(pieces, list)
    length = len(whole.input_ids)
    starts = {"right": [0], "left": [length - 24], "split": list(range(0, length, 24))}[truncation]
    assert len(pieces) == len(starts)
    for piece, start in zip(pieces, starts, strict=True):
        assert piece.input_ids == whole.input_ids[start : start + 24]
        assert piece.loss_mask == [0, *whole.loss_mask[start + 1 : start + 24]], "nothing predicts a first token"
    deleted, kept = (
        encode([Sample(turns)], tokenizer, max_length=size, rendering="chat", truncation="delete")[0]
        for size in (length - 1, length)
    )
    assert isinstance(deleted, RowError)
    assert isinstance(kept, list)


def test_tool_calls_count_twice() -> None:
    found = weighed(ROUNDS, rule("last_round+hermes"), make_tokenizer(TOOLS))
    assert found[0] == ('<tool_call>{"name": "find", "arguments": {}}</tool_call>', 2)
    assert found[1:] == [("<|im_end|>", 1), ("no<|im_end|>", 1)]


@pytest.mark.parametrize(
    ("chain", "answer", "expected"),
    [
        ("ignore_empty_think", "<think>\n\n</think>\n\nyes", "yes"),
        ("ignore_empty_think", "<think>\nwhy\n</think>\n\nyes", "<think>\nwhy\n</think>\n\nyes"),
        ("ignore_think", "<think>\nwhy\n</think>\n\nyes", "yes"),
        ("ignore_think", "why\n</think>\n\nyes", "yes"),
        ("ignore_think", "yes <think> no </think> yes", "yes <think> no </think> yes"),
        ("ignore_think", "<think>a</think>b<think>c</think>d", "b<think>c</think>d"),
    ],
)
def test_thoughts_are_left_out(chain: str, answer: str, expected: str) -> None:
    assert weighed(chat(answer), rule(chain), make_tokenizer(CHATML)) == [(f"{expected}<|im_end|>", 1)]


def test_the_empty_thought_of_a_template_is_left_out() -> None:
    tokenizer = make_tokenizer(THINKING)
    assert weighed(chat("yes"), rule(), tokenizer) == [("<think>\n\n</think>\n\nyes<|im_end|>", 1)]
    assert weighed(chat("yes"), rule("ignore_empty_think"), tokenizer) == [("yes<|im_end|>", 1)]


def test_factors_multiply_along_the_chain_and_with_the_message() -> None:
    mine = {"<tool_call>": 0.5, "x": [1, 3]}
    found = weighed(chat("a<tool_call>b</tool_call>x y", loss=4), rule("hermes", weights=mine), make_tokenizer(CHATML))
    assert found == [("a<tool_call>", 4), ("b</tool_call>", 8), ("x", 4), (" y", 12), ("<|im_end|>", 4)]


@pytest.mark.parametrize("kind", ["first", "always", "legacy", "never"])
def test_sentencepiece_tokens_are_weighed_where_they_stand(kind: str) -> None:
    tokenizer = make_sentencepiece(kind, LLAMA2)
    answers = ("z 12 z", "34 z")  # no word that the tokenizer has merged with its neighbours
    turns = [Message(role, text) for text in answers for role, text in (("user", "hi"), ("assistant", text))]
    found = weighed(Sample(tuple(turns)), loss_rule("default", {"12": 3, "34": 2}), tokenizer)
    assert [text.strip() for text, weight in found if weight == 3] == ["12"]
    assert [text.strip() for text, weight in found if weight == 2] == ["34"]


@pytest.mark.parametrize("name", plugins.names("data.weighting"))
def test_a_table_changes_weights_and_no_ids(name: str) -> None:
    """Found by itself: every module of data/weighting has a table that reaches some of this, and compiles."""
    answer = (
        f"<think>\n\n</think>\n\n{REACT}\n<tool_call>{{}}</tool_call> ✿FUNCTION✿: f ✿ARGS✿: x ✿RESULT✿: y ✿RETURN✿: z"
    )
    for tokenizer in (make_tokenizer(CHATML), make_sentencepiece("legacy", LLAMA2)):
        plain, weighted = (
            encode([chat(answer)], tokenizer, max_length=4096, rendering="chat", loss=one)[0]
            for one in (rule(), rule(name))
        )
        assert isinstance(plain, list)
        assert isinstance(weighted, list)
        assert plain[0].input_ids == weighted[0].input_ids
        assert plain[0].loss_mask != weighted[0].loss_mask


def test_a_match_takes_its_place_from_later_ones_and_the_longest_wins() -> None:
    found = loss_rule("default", {"ab": 2, "abc": 3, "bcd": 4, "x*": 5, "^d": 6}).factors("abcd bcd", 8)
    assert found is not None
    assert found.tolist() == [3, 3, 3, 1, 1, 4, 4, 4]


def test_all_knows_no_place_for_a_turn_that_the_template_rewrites() -> None:
    sample = Sample((Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d")))
    tokenizer = make_tokenizer(THINKING)
    assert len(weighed(sample, rule("all"), tokenizer)) == 1
    with pytest.raises(RowError, match=re.escape("use data.loss=default")):
        render(sample, tokenizer, "chat", rule("all+hermes"))


@pytest.mark.parametrize(
    ("chain", "weights", "message"),
    [
        ("defualt", {}, "did you mean"),
        ("hermes+last_round", {}, "use last_round+hermes"),
        ("default+", {}, "is neither a choice of turns nor one of data.weighting"),
        ("default", {"(": 1.0}, "is no regular expression"),
    ],
)
def test_a_rule_that_means_nothing_is_refused(chain: str, weights: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        loss_rule(chain, weights)


def test_the_rule_reaches_the_stream_and_its_fingerprint(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}] * 2}]
    file, tokenizer = write_jsonl(tmp_path / "a.jsonl", rows), make_tokenizer(CHATML)
    plain, last = plan_of(file), plan_of(file, loss="last_round", loss_weights={"yo": 2})
    assert plain.fingerprint != last.fingerprint
    sums = [sum(prepare_chunk(plan, 0, tokenizer)["loss_mask"][0].as_py()) for plan in (plain, last)]
    num_answer = len(tokenizer("yo", add_special_tokens=False).input_ids)
    assert sums == [2 * (num_answer + 1), 2 * num_answer + 1]


def test_settings_are_read_from_plain_data() -> None:
    spec = DataSpec.model_validate(
        {"train": [{"path": "a"}], "loss": "last_round+hermes", "loss_weights": {"a": 2, "b": [1, 0]}}
    )
    assert loss_rule(spec.loss, spec.loss_weights).tables[-1] == (("a", (2.0,)), ("b", (1.0, 0.0)))
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        DataSpec.model_validate({"train": [{"path": "a"}], "loss_weights": {"a": -1}})


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"loss": "last_round"}, "data.loss=last_round"),
        ({"loss": "all+hermes"}, "data.loss=all+hermes"),
        ({"loss_weights": {"a": 2}}, "data.loss_weights="),
    ],
)
def test_a_method_that_trains_every_token_refuses_another_rule(settings: dict[str, Any], key: str) -> None:
    source = [{"path": "a"}]
    data = DataSpec.model_validate({"train": source, **settings})
    assert rule_of(data, everything=False).turns
    with pytest.raises(ConfigError, match=re.escape(key) + ".*is not followed by this method"):
        rule_of(data, everything=True)
    assert rule_of(DataSpec.model_validate({"train": source, "loss": "all"}), everything=True) == LossRule("all")
