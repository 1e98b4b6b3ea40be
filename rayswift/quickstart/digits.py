"""The corpus of the vision quickstart: the real handwritten digits that scikit-learn ships, and questions on them."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rayswift.errors import ConfigError

QUESTION = "Which digit is this?"
NUM_HELD_OUT = 297
_SCALE = 4


@dataclass(frozen=True)
class Digit:
    """A picture, a PNG file, and what it shows."""

    image: Path
    label: int


@dataclass(frozen=True)
class Digits:
    """The files that were written, and the pictures that are kept from training."""

    train: Path
    held_out_rows: Path
    text: Path
    num_train: int
    held_out: tuple[Digit, ...]


def write_digits(folder: Path) -> Digits:
    """Pictures of 32x32 pixels with rows that ask about them, below `folder`; a seeded part of them is held out.

    Raises ConfigError without scikit-learn.
    """
    import numpy as np
    from PIL import Image

    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError("needs scikit-learn, which has the pictures", path="kind", value="vision",
                          fix="pip install 'rayswift[quickstart]'") from error  # fmt: skip
    (folder / "images").mkdir(parents=True, exist_ok=True)
    found = load_digits()
    digits = []
    for number, (pixels, label) in enumerate(zip(found.images, found.target, strict=True)):
        grey = (pixels * (255 / 16)).astype(np.uint8)
        path = folder / "images" / f"{number:04d}.png"
        Image.fromarray(grey).resize((8 * _SCALE, 8 * _SCALE), Image.Resampling.BICUBIC).save(path)
        digits.append(Digit(path, int(label)))
    random.Random(0).shuffle(digits)
    train, held_out = digits[NUM_HELD_OUT:], digits[:NUM_HELD_OUT]
    text = folder / "text.txt"
    text.write_text("\n".join(f"user\n{QUESTION}\nassistant\n{label}" for label in range(10)) + "\n", encoding="utf-8")
    return Digits(
        _write(folder / "train.jsonl", train), _write(folder / "held_out.jsonl", held_out), text, len(train),
        tuple(held_out),
    )  # fmt: skip


def _write(path: Path, digits: Sequence[Digit]) -> Path:
    rows = (
        {
            "messages": [
                {"role": "user", "content": f"<image>{QUESTION}"},
                {"role": "assistant", "content": str(digit.label)},
            ],
            "images": [f"images/{digit.image.name}"],
        }
        for digit in digits
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
