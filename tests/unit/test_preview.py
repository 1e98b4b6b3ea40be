"""`data inspect`: what the mask says, decoded, and the figures beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from rayswift.config.load import validate
from rayswift.preview import preview
from rayswift.seen import Preview
from tests.multimodal_models import make


def look(tmp_path: Path, model: Path, lines: list[str], **data: object) -> Preview:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(lines) + "\n")
    job = {
        "name": "p",
        "model": {"path": str(model)},
        "data": {"train": [{"path": str(file)}], "max_length": 64, **data},
    }
    return preview(validate(job), num_rows=3)


def row(question: str, answer: str) -> str:
    return json.dumps({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})


def test_only_the_answer_is_marked(tmp_path: Path, tiny_model_dir: Path) -> None:
    seen = look(tmp_path, tiny_model_dir, [row("Why?", "Because it is so.")])
    (source,) = seen.sources
    trained = [piece.text for piece in source.rows[0].pieces if piece.trained]
    assert trained == ["Because it is so.<|im_end|>"]
    assert source.rows[0].num_trained_tokens < source.rows[0].num_tokens
    assert "«Because it is so.<|im_end|>»" in seen.text(colour=False)
    assert "\x1b[32mBecause it is so.<|im_end|>\x1b[0m" in seen.text(colour=True)


def test_figures_and_bad_rows(tmp_path: Path, tiny_model_dir: Path) -> None:
    lines = [row(f"Question {i}?", f"Answer {i}.") for i in range(20)]
    seen = look(tmp_path, tiny_model_dir, ["{broken", *lines])
    (source,) = seen.sources
    assert (source.num_rows, source.num_looked_at, source.num_bad) == (21, 21, 1)
    assert source.rows[0].bad is not None
    assert "rows.jsonl:1" in source.rows[0].place
    assert 0.5 < source.fill <= 1
    loose = look(tmp_path, tiny_model_dir, lines, packing=False)
    assert loose.sources[0].fill < source.fill
    assert json.loads(json.dumps(seen.to_plain()))["sources"][0]["format"] == "messages"


def test_rows_of_no_use_are_told_apart_from_bad_ones(tmp_path: Path, tiny_model_dir: Path) -> None:
    disliked = json.dumps(json.loads(row("Q?", "A.")) | {"label": False})
    seen = look(tmp_path, tiny_model_dir, [row("Q?", "A."), disliked, "{broken"])
    (source,) = seen.sources
    assert (source.num_bad, source.num_unused) == (1, 1)
    assert "1 bad, 1 of no use, " in seen.text(colour=False)


def test_lengths_are_counted(tmp_path: Path, tiny_model_dir: Path) -> None:
    seen = look(tmp_path, tiny_model_dir, [row("Q?", "A " * n) for n in (1, 1, 1, 30)])
    (source,) = seen.sources
    assert sum(source.lengths.values()) == 4
    assert source.lengths[max(source.lengths)] == 1
    assert source.max_tokens <= max(source.lengths)
    assert f"≤ {max(source.lengths):>6} tokens      1 █" in seen.text(colour=False)


@pytest.fixture(scope="module")
def vision_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("qwen2_5_vl", tmp_path_factory.mktemp("vision") / "model")


def look_at_pictures(tmp_path: Path, model: Path, *, embeddings: bool | None = None) -> Preview:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (56, 84, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    rows = [{"query": "<image>What?", "response": "This.", "images": ["a.png"]}, {"query": "No?", "response": "No."}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    job = {"name": "p", "model": {"path": str(model)}, "data": {"train": [{"path": str(tmp_path / "rows.jsonl")}]}}
    return preview(validate(job), num_rows=2, embeddings=embeddings)


def test_media_are_shown_with_their_grid_and_placeholders(tmp_path: Path, vision_model: Path) -> None:
    seen = look_at_pictures(tmp_path, vision_model)
    pictured, plain = seen.sources[0].rows
    (medium,) = pictured.media
    assert medium.grid is not None
    assert medium.num_placeholders == np.prod(medium.grid) // 4, "four patches are merged into a token"
    assert plain.media == ()
    text = seen.text(colour=False)
    assert f"{medium.num_placeholders} placeholders, grid 1x{medium.grid[1]}x{medium.grid[2]}, " in text
    assert f"<|image_pad|> x {medium.num_placeholders}<|vision_end|>" in text
    words, pictures = seen.sources[0].embeddings
    assert (words.kind, pictures.kind, pictures.num_tokens) == ("text", "<|image_pad|>", medium.num_placeholders)
    assert 0 < pictures.gap < 2
    assert look_at_pictures(tmp_path, vision_model, embeddings=False).sources[0].embeddings == ()


@pytest.mark.parametrize("factor", [1000.0, float("nan")], ids=["large", "nan"])
def test_a_projector_gone_wrong_is_seen(tmp_path: Path, vision_model: Path, factor: float) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(vision_model, folder)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("merger.mlp.2.weight"))
    save_file(weights | {name: weights[name] * factor}, folder / "model.safetensors", metadata={"format": "pt"})
    text, pictures = look_at_pictures(tmp_path, folder).sources[0].embeddings
    assert text.num_not_finite == 0
    if factor == 1000.0:
        assert pictures.std > 20 * text.std
    else:
        assert pictures.num_not_finite == pictures.num_tokens
