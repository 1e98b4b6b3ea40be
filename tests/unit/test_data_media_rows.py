"""What becomes of rows with media that are too long, hostile or broken: cut, or refused with a reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rayswift.config.job import MediaSpec
from rayswift.data.blocks import packed_sequences
from rayswift.data.collate import collate
from rayswift.data.media.encoder import num_placeholders
from rayswift.data.prepare import prepare_chunk
from rayswift.parallel.forward import batch_logprobs
from tests.data_cases import write_jsonl
from tests.media_cases import bomb, noise, picture, sound, video
from tests.media_families import PLACEHOLDERS, TAKES, Family, family, media_plan

ONE = {"query": "Who <image> are they?", "response": "one two three four", "images": ["image0"]}


@pytest.fixture
def of(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Family:
    return family(request.param, tmp_path_factory)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with files of each kind."""
    (tmp_path / "image0").write_bytes(noise(0))
    (tmp_path / "image1").write_bytes(noise(1, (60, 30)))
    (tmp_path / "audio0").write_bytes(sound(0.5))
    video(tmp_path / "video0.mp4")
    return tmp_path


def outcome(of: Family, folder: Path, rows: list[Any], **data: Any) -> tuple[list[Any], list[dict[str, Any]]]:
    """The sequences, unpacked and in order, and the bad rows."""
    settings = {"packing": False, "shuffle": False} | data
    plan = media_plan(write_jsonl(folder / "rows.jsonl", rows), **settings)
    table = of.table(plan)
    bad = [json.loads(one) for ones in table["bad"].to_pylist() for one in ones]
    return [one for one in packed_sequences(table) if len(one.input_ids)], bad


def _of_kind(kind: str) -> dict[str, Any]:
    name = f"{kind}0" + (".mp4" if kind == "video" else "")
    return {"query": f"Who <{kind}> are they?", "response": "one two three four five", f"{kind}s": [name]}


def _check_runs(of: Family, sequence: Any) -> None:
    """The model takes it, at the positions that it computes itself."""
    alone = of.alone(sequence)
    with torch.no_grad():
        ours = batch_logprobs(of.model, collate([sequence], 0, 1))[0]
    assert (alone - ours)[:-1].abs().max() < 2e-5


@pytest.mark.parametrize("of", TAKES, indirect=True)
def test_no_cut_goes_through_a_medium(of: Family, folder: Path) -> None:
    for kind in PLACEHOLDERS[of.name]:
        row = _of_kind(kind)
        ((whole,), _) = outcome(of, folder, [row])
        length = len(whole.input_ids)
        places = np.flatnonzero(np.isin(whole.input_ids, list(of.encoder_ids())))
        first, last = int(places[0]), int(places[-1])
        near = {length - 1, last + 1, last + 2, last + 3, first, first + 1, last}
        for how in ("right", "left"):
            sizes = near if how == "right" else {length - size for size in near} | {length - first - 1}
            for size in sorted(size for size in sizes if 2 <= size < length):
                found, bad = outcome(of, folder, [row], max_length=size, truncation=how)
                shown = range(size) if how == "right" else range(length - size, length)
                inside = sum(place in shown for place in places)
                if 0 < inside < len(places):
                    assert "would cut through an image, audio or video" in bad[0]["reason"]
                    assert f"data.max_length={size}" in bad[0]["reason"]
                elif bad:
                    assert "has no token left to train on" in bad[0]["reason"]
                else:
                    (sequence,) = found
                    assert sequence.input_ids.tolist() == [whole.input_ids[i] for i in shown]
                    assert len(sequence.media) == (1 if inside else 0)
                    assert sum(num_placeholders(one) for one in sequence.media) == inside
                    _check_runs(of, sequence)


def test_of_several_media_those_before_the_cut_are_dropped(folder: Path, tmp_path_factory: Any) -> None:
    of = family("qwen2_5_vl", tmp_path_factory)
    row = {"query": "<image>Who?" + " zero" * 20 + "<image>", "response": "one two", "images": ["image0", "image1"]}
    ((whole,), _) = outcome(of, folder, [row])
    places = np.flatnonzero(np.isin(whole.input_ids, list(of.encoder_ids())))
    second = places[num_placeholders(whole.media[0])]
    ((left,), bad) = outcome(of, folder, [row], max_length=len(whole.input_ids) - int(second) + 3, truncation="left")
    assert not bad
    assert [num_placeholders(one) for one in left.media] == [num_placeholders(whole.media[1])]
    assert np.array_equal(left.media[0]["pixel_values"], whole.media[1]["pixel_values"])
    _check_runs(of, left)


@pytest.mark.parametrize("of", TAKES, indirect=True)
def test_no_placeholder_is_ever_trained(of: Family, folder: Path) -> None:
    kinds = PLACEHOLDERS[of.name]
    rows = [_of_kind(kind) for kind in kinds]
    rows += [_of_kind(kind) | {"query": "Show", "response": f"Here: <{kind}>"} for kind in kinds]
    found, bad = outcome(of, folder, rows, loss="all")
    assert not bad
    for sequence in found:
        placeholders = np.isin(sequence.input_ids, list(of.encoder_ids()))
        assert placeholders.any()
        assert not sequence.loss_mask[placeholders].any()
        assert sequence.loss_mask[1:][~placeholders[1:]].all()
        batch = collate([sequence], 0)
        assert not batch.weights_BT[torch.isin(batch.targets_BT, torch.tensor(sorted(of.encoder_ids())))].any()


@pytest.mark.parametrize("of", TAKES, indirect=True)
def test_a_placeholder_in_the_text_of_a_row_is_refused(of: Family, folder: Path) -> None:
    tokens = [of.tokenizer.convert_ids_to_tokens(one) for one in of.encoder_ids()]
    for kind in PLACEHOLDERS[of.name]:
        for token in tokens:
            media = _of_kind(kind)
            bad_rows = [
                media | {"response": f"It is {token}"},
                media | {"query": f"{token} {media['query']}"},
                media | {"query": media["query"] + token * 3},
            ]
            if token != f"<{kind}>":  # a tag, where the row has such a column
                found, bad = outcome(of, folder, [*bad_rows, media])
                assert (len(found), len(bad)) == (1, 3), token
                assert all("stand" in one["reason"] for one in bad), bad
            text = {"query": f"What is {token}?", "response": "one"}
            found, bad = outcome(of, folder, [text, media, {"query": "Who?", "response": token}])
            assert (len(found), len(bad)) == (1, 2), token
            assert all("stand for media" in one["reason"] for one in bad), bad


def _with_template(of: Family, folder: Path, template: str) -> Family:
    shutil.copytree(of.folder, folder / "model")
    (folder / "model" / "chat_template.jinja").write_text(template)
    return Family(of.name, folder / "model")


_HEAD = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
_TAIL = "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
PLAIN = _HEAD + "{{ message['content'] }}" + _TAIL
LISTS = (
    _HEAD
    + "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}" + _TAIL
)


@pytest.mark.parametrize(("template", "text"), [
    (PLAIN, "<|im_start|>user\nWho {} are they?<|im_end|>\n<|im_start|>assistant\none two three four<|im_end|>\n"),
    (LISTS, "<|im_start|>user\n{}\nWho  are they?<|im_end|>\n<|im_start|>assistant\none two three four<|im_end|>\n"),
], ids=["plain", "lists"])  # fmt: skip
def test_templates_that_know_no_parts_or_nothing_else(
    template: str, text: str, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    of = _with_template(family("llava", tmp_path_factory), folder, template)
    only_text = {"query": "Who?", "response": "zero nine"}
    found, bad = outcome(of, folder, [ONE, only_text])
    assert not bad
    assert of.tokenizer.decode(found[0].input_ids) == text.format("<image>" * 16)
    assert of.tokenizer.decode(found[1].input_ids) == (
        "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\nzero nine<|im_end|>\n"
    )
    for sequence, answer in zip(found, ("one two three four", "zero nine"), strict=True):
        trained = of.tokenizer.decode(sequence.input_ids[np.asarray(sequence.loss_mask) > 0])
        assert trained.startswith(answer + "<|im_end|>")
        _check_runs(of, sequence)


def test_a_template_that_drops_a_medium_is_told(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    last = _HEAD + "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    last += "{% if message['role'] == 'user' and 'image' in (message['content'] | map(attribute='type') | list) %}"
    of = _with_template(family("llava", tmp_path_factory), folder, last + "{{ '<image>' }}{% endif %}" + _TAIL)
    found, bad = outcome(of, folder, [ONE, ONE | {"query": "<image>a<image>", "images": ["image0", "image1"]}])
    assert len(found) == 1
    assert bad[0]["reason"] == "has 2 media, of which the chat template renders 1"


def test_each_bad_row_is_named_and_the_good_ones_go_on(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    (folder / "half.jpg").write_bytes(picture(format="JPEG", size=(64, 64))[:400])
    (folder / "bomb.png").write_bytes(bomb(6000, 1000))
    (folder.parent / "outside.png").write_bytes(noise(5))
    (folder / "link.png").symlink_to("../outside.png")
    (folder / "empty.png").touch()
    rows: dict[str, tuple[dict[str, Any], str]] = {
        "good": (ONE, ""),
        "corrupt": (ONE | {"images": ["half.jpg"]}, "has an image that cannot be decoded"),
        "tags": (ONE | {"query": "<image><image>?"}, "has 2 places for images (<image>) and 1 images"),
        "missing": (ONE | {"images": ["none.png"]}, "has the image none.png, which does not exist"),
        "empty answer": (ONE | {"response": " "}, "response"),
        "long": (ONE | {"query": "<image>" + "zero " * 300}, "tokens are over data.max_length=200"),
        "type": (ONE | {"images": [7]}, "`images 1` is no path, URL, data URI or bytes of a file"),
        "bomb": (ONE | {"images": ["bomb.png"]}, "6000x1000 pixels, over data.media.max_pixels=5000000"),
        "outside": (ONE | {"images": ["../outside.png"]}, "which is outside of"),
        "link": (ONE | {"images": ["link.png"]}, "which is outside of"),
        "url": (ONE | {"images": ["http://host/a.png"]}, "names a URL, which is not fetched"),
        "empty": (ONE | {"images": ["empty.png"]}, "has an empty image"),
        "kind": ({"query": "<audio>?", "response": "one", "audios": ["audio0"]}, "has audio, which no row had"),
        "text": ({"query": "Who?", "response": "two"}, ""),
        "uri": (ONE | {"images": ["data:image/png;base64,AAAA"]}, "has an image that cannot be decoded"),
        "last": (ONE | {"images": ["image1"]}, ""),
    }
    for name in ("llava", "qwen3_vl"):
        of = family(name, tmp_path_factory)
        media = MediaSpec(max_pixels=5_000_000, kinds=("image",))
        given = [row for row, _ in rows.values()]
        found, bad = outcome(of, folder, given, max_length=200, media=media)
        reasons = {one["row"]: one for one in bad}
        for number, (case, (_, reason)) in enumerate(rows.items()):
            if not reason:
                assert number not in reasons, (case, reasons[number])
                continue
            one = reasons.pop(number)
            assert reason in one["reason"], (case, one["reason"])
            assert one["file"].endswith("rows.jsonl")
            assert one["line"] == number + 1
            assert len(json.dumps(one)) < 2000, "a quarantine is no copy of the data"
        assert not reasons
        assert len(found) == 3
        for sequence in found:
            _check_runs(of, sequence)


def test_a_row_of_a_text_model_cannot_have_media(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    of = family("llava", tmp_path_factory)
    plan = media_plan(write_jsonl(folder / "rows.jsonl", [ONE]))
    ((bad,),) = prepare_chunk(plan, 0, of.tokenizer, None)["bad"].to_pylist()
    assert "has media, and the model takes only text" in bad


REWRITING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}" + _TAIL
)


def test_a_text_per_turn_has_the_media_up_to_it(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    of = _with_template(family("llava", tmp_path_factory), folder, REWRITING)
    turns = [("user", "<image>Who?"), ("assistant", "one"), ("user", "And <image>?"), ("assistant", "two")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns], "images": ["image0", "image1"]}
    found, bad = outcome(of, folder, [row])
    assert not bad
    assert [len(one.media) for one in found] == [1, 2]
    assert np.array_equal(found[0].media[0]["pixel_values"], found[1].media[0]["pixel_values"])
    for sequence in found:
        _check_runs(of, sequence)


def test_a_last_turn_that_is_not_trained_may_have_media(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    of = _with_template(family("llava", tmp_path_factory), folder, REWRITING)
    turns = [("user", "<image>Who?"), ("assistant", "one"), ("user", "And <image>?"), ("assistant", "two")]
    messages = [{"role": role, "content": content} for role, content in turns]
    messages[-1]["loss"] = False  # type: ignore[assignment]
    found, bad = outcome(of, folder, [{"messages": messages, "images": ["image0", "image1"]}])
    assert not bad
    assert [len(one.media) for one in found] == [1]


def test_media_of_parquet_and_csv(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    of = family("qwen2_5_vl", tmp_path_factory)
    row = {"query": "<image>?", "response": "one"}
    parquet = [
        row | {"images": [{"bytes": noise(0), "path": None}]},
        row | {"images": [{"bytes": None, "path": "image0"}]},
    ]
    pq.write_table(pa.Table.from_pylist(parquet), folder / "rows.parquet")
    (folder / "rows.csv").write_text('query,response,images\n<image>?,one,"[""image0""]"\nWho?,two,\n')
    ((expected,), _) = outcome(of, folder, [row | {"images": ["image0"]}])
    for name, with_images in (("rows.parquet", 2), ("rows.csv", 1)):
        found = of.sequences(media_plan(folder / name, packing=False, shuffle=False))
        assert len(found) == 2
        for sequence in found[:with_images]:
            assert sequence.input_ids.tolist() == expected.input_ids.tolist()
            assert np.array_equal(sequence.media[0]["pixel_values"], expected.media[0]["pixel_values"])
