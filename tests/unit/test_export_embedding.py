"""Exports of embedding models: copied, read back, and signed; nothing that would change their vectors is taken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rayswift.errors import ConfigError, ExportError
from rayswift.export import embedding
from rayswift.export.manifest import MANIFEST, read_valid
from rayswift.export.terms import QuantizeSpec
from tests.embedding_cases import TEXTS, expected, make_bert, make_qwen3
from tests.export_cases import export


@pytest.fixture
def minilm(tmp_path: Path, tiny_text: Path) -> Path:
    (folder := tmp_path / "minilm").mkdir()
    return make_bert(folder, tiny_text)


def test_an_export_gives_the_vectors_of_its_source(tmp_path: Path, minilm: Path) -> None:
    (minilm / "pytorch_model.bin").write_bytes(b"a pickle")
    (minilm / "README.md").write_text("the source's own card")
    output = tmp_path / "out"
    manifest = export(str(minilm), str(output), engine="auto")
    assert manifest.vectors is not None
    assert manifest.is_verified
    assert (manifest.vectors.num_dims, manifest.dtype, manifest.verify) == (64, "float32", None)
    assert read_valid(output) == manifest
    assert {"modules.json", "1_Pooling/config.json", "sentence_bert_config.json"} <= set(manifest.files)
    assert "pytorch_model.bin" not in manifest.files
    np.testing.assert_array_equal(expected(output, TEXTS, "mean"), expected(minilm, TEXTS, "mean"))
    assert "the same vectors of 64 numbers" in (output / "README.md").read_text()


def test_a_causal_model_of_embeddings_and_an_export_again(tmp_path: Path, tiny_text: Path) -> None:
    (folder := tmp_path / "qwen3").mkdir()
    first = export(str(make_qwen3(folder, tiny_text)), str(tmp_path / "one"))
    second = export(str(tmp_path / "one"), str(tmp_path / "two"))
    assert first.base_sha256 == second.base_sha256
    assert (first.base, second.base) == (str(folder), str(tmp_path / "one"))
    np.testing.assert_array_equal(expected(tmp_path / "two", TEXTS, "last"), expected(folder, TEXTS, "last"))


def test_a_pooling_folder_of_any_name_goes_with_it(tmp_path: Path, minilm: Path) -> None:
    (minilm / "1_Pooling").rename(minilm / "pooling")
    modules = (minilm / "modules.json").read_text()
    (minilm / "modules.json").write_text(modules.replace("1_Pooling", "pooling"))
    assert "pooling/config.json" in export(str(minilm), str(tmp_path / "out")).files
    with pytest.raises(ConfigError, match="none of auto, vllm, local and none"):
        export(str(minilm), str(tmp_path / "other"), engine="vlm")


@pytest.mark.parametrize(
    "options", [{"dtype": "bfloat16"}, {"engine": "vllm"}, {"quantize": QuantizeSpec(name="int8")}]
)
def test_what_would_change_its_vectors_is_refused(tmp_path: Path, minilm: Path, options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="exported as it is"):
        export(str(minilm), str(tmp_path / "out"), **options)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_a_copy_with_other_vectors_is_not_signed(tmp_path: Path, minilm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = embedding.copy

    def changed(base: Path, stage: Path) -> None:
        copy(base, stage)
        (stage / "1_Pooling/config.json").write_text('{"pooling_mode_cls_token": true}')

    monkeypatch.setattr(embedding, "copy", changed)
    with pytest.raises(ExportError, match="other vectors"):
        export(str(minilm), str(tmp_path / "out"))
    assert not (tmp_path / "out" / MANIFEST).exists()
