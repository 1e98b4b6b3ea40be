"""The names that LLaVA's tower of images has on the hub: `vision_tower.vision_model.…`.

transformers 5.17 reads folders with and without the `vision_model`, keeps it when it writes what it read, and leaves it
out of a model that was made from its config. vLLM 0.32 reads the hub's names alone.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rayswift.models.folder import INDEX, read_header, read_json, weight_files

_TOWER, _INNER = "vision_tower.", "vision_tower.vision_model."
_TOWERS = ("clip_vision_model", "siglip_vision_model")


def has_hub_names(folder: Path) -> bool:
    """Whether the weights of a LLaVA's tower have the names that vLLM reads; true of other models."""
    if not _is_llava(folder):
        return True
    return not any(_renamed(read_header(folder / name)) for name in weight_files(folder))


def write_hub_names(folder: Path) -> None:
    """Give the tower's weights in a folder the hub's names, file by file; nothing to do for other models."""
    if not _is_llava(folder):
        return
    for name in weight_files(folder):
        if names := _renamed(header := read_header(folder / name)):
            _rewrite(folder / name, {names.get(key, key): value for key, value in header.items()})
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX, field="models")
        names = _renamed(index["weight_map"])
        index["weight_map"] = {names.get(key, key): value for key, value in index["weight_map"].items()}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _is_llava(folder: Path) -> bool:
    config = read_json(folder / "config.json", field="models")
    return config.get("model_type") == "llava" and config.get("vision_config", {}).get("model_type") in _TOWERS


def _renamed(names: Mapping[str, Any]) -> dict[str, str]:
    """The names that are not the hub's, and what those are."""
    return {
        name: name.replace(_TOWER, _INNER, 1)
        for name in names if name.startswith(_TOWER) and not name.startswith(_INNER)
    }  # fmt: skip


def _rewrite(file: Path, header: dict[str, Any]) -> None:
    """The same tensors under another header: they are copied as bytes, and their offsets count from its end."""
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    new = file.with_suffix(".renamed")
    with open(file, "rb") as before, open(new, "wb") as after:
        before.seek(8 + struct.unpack("<Q", before.read(8))[0])
        after.write(struct.pack("<Q", len(text)) + text)
        shutil.copyfileobj(before, after, 1 << 24)
    os.replace(new, file)
