"""`data inspect`: what the mask says, decoded, and the figures beside it."""

from __future__ import annotations

import json
from pathlib import Path

from rayswift.config.load import validate
from rayswift.preview import Preview, preview


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
