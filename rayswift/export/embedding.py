"""Exports of embedding models: the folder as it is, read back and asked for the same vectors.

There is nothing to merge or to round in one: it is copied so that it has a manifest, and with it a version. Knows the
files that sentence-transformers writes.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from rayswift.errors import ExportError
from rayswift.export.manifest import MANIFEST
from rayswift.export.measured import Vectors
from rayswift.models.folder import weight_files
from rayswift.models.loading import load_tokenizer
from rayswift.models.pooling import module_folders, read_pooling
from rayswift.serving.local.embedding import finished, open_encoder

_KEPT = frozenset({".json", ".jinja", ".txt", ".model", ".tiktoken"})
"""Beside the weights: no pickles, no code, and no weights of other runtimes."""


def copy(base: Path, stage: Path) -> None:
    """Everything that loading and pooling need of an embedding model's folder."""
    own = [file.name for file in base.iterdir() if file.is_file() and file.suffix in _KEPT and file.name != MANIFEST]
    modules = [f"{place}/config.json" for place in module_folders(base) if (base / place / "config.json").is_file()]
    for name in (*weight_files(base), *own, *modules):
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(base / name, stage / name)


def compare(base: Path, stage: Path, texts: Sequence[str]) -> Vectors:
    """What was proved: the same ids, and of them the same vectors, from both folders. Raises ExportError otherwise."""
    before, after = _vectors(base, texts), _vectors(stage, texts)
    if not np.array_equal(before, after):
        raise ExportError("gives other vectors than what it was copied from; nothing was left there",
                          path="OUTPUT", value=str(stage), fix="check that nobody writes to SOURCE")  # fmt: skip
    return Vectors(num_texts=len(texts), num_dims=before.shape[1])


def _vectors(folder: Path, texts: Sequence[str]) -> np.ndarray:
    """The finished vectors [texts, dims] of a folder, by its own tokenizer and pooling."""
    pooling, tokenizer = read_pooling(str(folder)), load_tokenizer(str(folder))
    if pooling is None:
        raise ExportError("lacks the pooling of what it was copied from", path="OUTPUT", value=str(folder),
                          fix="check that nobody writes to SOURCE")  # fmt: skip
    encoder = open_encoder(str(folder), pooling, None, torch.device("cpu"), None)
    ids = [tokenizer(text)["input_ids"][: encoder.max_tokens] for text in texts]
    return np.stack([finished(vector, pooling, None) for vector in encoder.vectors(ids)])
