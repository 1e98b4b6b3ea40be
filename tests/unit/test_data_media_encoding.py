"""From rows with media to ids and features, for every family: those of the model's own processor, and no others."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from rayswift.data.collate import PackedSequence, collate
from rayswift.data.formats import RowError
from rayswift.data.media.decoding import decode_audio, decode_image, decode_video
from rayswift.data.media.encoder import MediaEncoder, num_placeholders
from rayswift.models.processor import load_processor
from tests.data_cases import write_jsonl
from tests.media_cases import noise, sound, video
from tests.media_families import PAIRS, PLACEHOLDERS, SPEC, Family, family, media_plan

ANSWER = "one two three"


@pytest.fixture
def of(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Family:
    return family(request.param, tmp_path_factory)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[bytes]]:
    """Three files of each kind, of different sizes."""
    folder = tmp_path_factory.mktemp("files")
    return {
        "image": [noise(1, (40, 32)), noise(2, (90, 50)), noise(3, (33, 70))],
        "audio": [sound(0.5), sound(1.25, channels=2, rate=22050), sound(0.3, level=0.2)],
        "video": [video(folder / f"{n}.mp4", frames=20, green=50 * n, size=(48 + 16 * n, 32)) for n in range(3)],
    }


def _written(folder: Path, files: dict[str, list[bytes]], rows: list[dict[str, Any]], name: str = "rows") -> Path:
    for kind, contents in files.items():
        for number, content in enumerate(contents):
            (folder / f"{kind}{number}").write_bytes(content)
    return write_jsonl(folder / f"{name}.jsonl", rows)


def _rows(kind: str) -> list[dict[str, Any]]:
    """Rows with one, two and three media, in several turns, beside text and behind it."""
    tag, column = f"<{kind}>", f"{kind}s"

    def turns(*contents: str) -> list[dict[str, str]]:
        return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]

    return [
        {"messages": turns(f"{tag}Who are they?", ANSWER), column: [f"{kind}0"]},
        {"messages": turns(f"What is {tag} in {tag}?", ANSWER), column: [f"{kind}1", f"{kind}2"]},
        {"messages": turns(f"{tag}{tag}Who?", ANSWER, f"And {tag}", "four"), column: [f"{kind}{n}" for n in range(3)]},
    ]


def _whole(of: Family, kind: str, row: dict[str, Any], files: dict[str, list[bytes]], processor: Any) -> Any:
    """What a processor makes of the whole conversation and all of its media at once."""
    taken = kind if kind in PLACEHOLDERS[of.name] else "image"
    names = [int(name.removeprefix(kind)) for name in row[f"{kind}s"]]
    if kind == "image":
        media: list[Any] = [decode_image(files[kind][n], SPEC) for n in names]
    elif kind == "audio":
        media = [decode_audio(files[kind][n], 16000, SPEC) for n in names]
    else:
        media = [decode_video(files[kind][n], SPEC) for n in names]
    chat = []
    for turn in row["messages"]:
        parts: list[dict[str, str]] = []
        for number, piece in enumerate(turn["content"].split(f"<{kind}>")):
            parts += [{"type": taken}] * (number > 0) + [{"type": "text", "text": piece}] * bool(piece)
        chat.append({"role": turn["role"], "content": parts})
    text = of.tokenizer.apply_chat_template(chat, tokenize=False)
    if taken != kind:  # frames as pictures, four of each film
        media = [frame for clip in media for frame in clip]
        text = text.replace(PLACEHOLDERS[of.name][taken], PLACEHOLDERS[of.name][taken] * 4)
        assert len(media) == 4 * len(names)
    given: dict[str, Any] = {
        "image": {"images": [media] if of.name in ("idefics3", "smolvlm") else media},
        "audio": {"audio": media, "sampling_rate": 16000},
        "video": {"videos": media, "fps": 2.0},
    }[taken]
    return processor(text=[text], return_tensors="pt", **given)


def _same(sequence: PackedSequence, whole: Any) -> None:
    assert sequence.input_ids.tolist() == whole["input_ids"][0].tolist()
    found = collate([sequence], 0).media
    assert found
    for name, tensor in found.items():
        expected = torch.as_tensor(whole[name])
        if name in ("pixel_values", "pixel_attention_mask") and tensor.ndim >= 4 and len(tensor) != len(expected):
            inner = expected.shape[2:]  # SmolVLM's films: the model flattens [rows, pictures] first of all
            tensor, expected = tensor.reshape(-1, *inner), expected.reshape(-1, *inner)
        assert (tensor.shape, tensor.dtype) == (expected.shape, expected.dtype), name
        assert torch.equal(tensor, expected), name


@pytest.mark.parametrize(("of", "kind"), PAIRS, indirect=["of"])
def test_ids_and_features_are_those_of_the_processor_given_the_whole(
    of: Family, kind: str, files: dict[str, list[bytes]], tmp_path: Path
) -> None:
    plan = media_plan(_written(tmp_path, files, _rows(kind)), packing=False, shuffle=False)
    processor = load_processor(str(of.folder))
    found = of.sequences(plan)
    for sequence, row in zip(found, _rows(kind), strict=True):
        with processor.heard():
            whole = _whole(of, kind, row, files, processor)
        _same(sequence, whole)
        _as_many_as_the_model_takes(of, sequence)


def _as_many_as_the_model_takes(of: Family, sequence: PackedSequence) -> None:
    """The model itself raises for features that are more or fewer than placeholders."""
    ids = set(of.encoder_ids())
    places = int(np.isin(sequence.input_ids, list(ids)).sum())
    assert places == sum(num_placeholders(one) for one in sequence.media) > 0
    assert not np.isin(sequence.input_ids[np.asarray(sequence.loss_mask) > 0], list(ids)).any()
    of.alone(sequence)
    for features in sequence.media:
        if "feature_attention_mask" in features:  # Qwen2.5-Omni takes what it gets: its audio tower halves twice
            heard = (int(features["feature_attention_mask"].sum()) - 1) // 2 + 1
            assert num_placeholders(features) == (heard - 2) // 2 + 1


@pytest.mark.parametrize("of", ["llava", "idefics3", "qwen2_audio"], indirect=True)
def test_transformers_own_class_makes_the_same(of: Family, files: dict[str, list[bytes]], tmp_path: Path) -> None:
    """Built by hand, without RaySwift's loading."""
    ours = load_processor(str(of.folder))
    tokenizer = transformers.AutoTokenizer.from_pretrained(of.folder)
    if of.name == "llava":
        image = transformers.CLIPImageProcessorPil.from_pretrained(of.folder)
        own = transformers.LlavaProcessor(image, tokenizer, patch_size=8, vision_feature_select_strategy="default",
                                          image_token="<image>", num_additional_image_tokens=1)  # fmt: skip
    elif of.name == "idefics3":
        own = transformers.Idefics3Processor(type(ours.image_processor).from_pretrained(of.folder), tokenizer,
                                             image_seq_len=4)  # fmt: skip
    else:
        audio = transformers.WhisperFeatureExtractor.from_pretrained(of.folder)
        own = transformers.Qwen2AudioProcessor(feature_extractor=audio, tokenizer=tokenizer)
    kind = "audio" if of.name == "qwen2_audio" else "image"
    plan = media_plan(_written(tmp_path, files, _rows(kind)), packing=False, shuffle=False)
    for sequence, row in zip(of.sequences(plan), _rows(kind), strict=True):
        _same(sequence, _whole(of, kind, row, files, own))


@pytest.mark.parametrize("of", ["llava", "qwen2_5_vl", "idefics3", "qwen2_5_omni"], indirect=True)
def test_kinds_mixed_in_one_message_keep_their_places(
    of: Family, files: dict[str, list[bytes]], tmp_path: Path
) -> None:
    row = {"query": "<video>a<image>b", "response": ANSWER, "images": ["image0"], "videos": ["video0"]}
    if of.name == "qwen2_5_omni":
        row |= {"query": "<audio><video>a<image>b", "audios": ["audio0"]}
    (sequence,) = of.sequences(media_plan(_written(tmp_path, files, [row])))
    encoder = of.encoder(media_plan(tmp_path / "rows.jsonl"))
    assert encoder is not None
    kinds = ("audio", "video", "image") if of.name == "qwen2_5_omni" else ("video", "image")
    expected = [encoder.encode_one(kind, files[kind][0]) for kind in kinds]
    for one, features in zip(expected, sequence.media, strict=True):
        for name, values in one.features.items():
            assert np.array_equal(features[name], values)
    text = of.tokenizer.decode(sequence.input_ids)
    places = [text.index(one.text) for one in expected]
    assert places == sorted(places)
    of.alone(sequence)


def _bare(of: Family) -> MediaEncoder:
    """An encoder that knows no model, only its processor."""
    tokens = PLACEHOLDERS[of.name]
    return MediaEncoder(load_processor(str(of.folder)), tokens, dict.fromkeys(tokens.values(), 1), SPEC)


def test_every_size_of_a_picture_has_its_channels_last(tmp_path_factory: pytest.TempPathFactory) -> None:
    """One or three rows of pixels look like channels to a guess."""
    from PIL import Image

    from tests.media_cases import saved

    for name in ("llava", "qwen2_5_vl", "idefics3", "internvl"):
        of = family(name, tmp_path_factory)
        encoder = _bare(of)
        red = encoder.encode_one("image", saved(Image.new("RGB", (64, 64), (255, 0, 0)))).features["pixel_values"]
        for size in ((1, 1), (3, 3), (3, 1), (1, 3), (2, 3), (40, 3), (3, 40), (1, 40)):
            found = encoder.encode_one("image", saved(Image.new("RGB", size, (255, 0, 0)))).features["pixel_values"]
            assert set(np.unique(found.round(4))) - {0} == set(np.unique(red.round(4))) - {0}, (name, size)


def test_a_picture_that_the_processor_refuses_is_a_row_error(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    of = family("qwen2_5_vl", tmp_path_factory)
    rows = [{"query": "<image>?", "response": ANSWER, "images": [f"image{n}"]} for n in range(2)]
    path = _written(tmp_path, {"image": [noise(1), noise(1, (600, 2))]}, rows)
    (bad,) = of.table(media_plan(path, shuffle=False))["bad"].to_pylist()[0]
    assert "aspect ratio must be smaller than 200" in bad


def test_a_sound_beyond_what_the_model_hears_is_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    of = family("qwen2_audio", tmp_path_factory)
    encoder = _bare(of)
    with pytest.raises(RowError, match=r"has audio of 8\.5 s, and the model hears 8 s at once"):
        encoder.encode_one("audio", sound(8.5))
    with pytest.raises(RowError, match="has an image, which the model does not take"):
        encoder.encode_one("image", noise(1))
    with pytest.raises(RowError, match="has a video, which the model does not take"):
        encoder.encode_one("video", noise(1))


def test_threads_share_a_processor(tmp_path_factory: pytest.TempPathFactory) -> None:
    of = family("qwen2_5_vl", tmp_path_factory)
    encoder = _bare(of)
    pictures = [noise(seed, (40 + 30 * (seed % 4), 40)) for seed in range(24)]
    expected = [encoder.encode_one("image", one).text for one in pictures]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda one: encoder.encode_one("image", one).text, pictures))
    assert found == expected
    assert len(set(expected)) == 4
    assert type(encoder.processor.tokenizer) is type(of.tokenizer)
