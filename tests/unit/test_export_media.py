"""The export of a model with towers computes what was trained when it is shown an image or a sound, or is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rayswift.config.job import AdapterSpec, DataSpec
from rayswift.data.media.features import model_inputs
from rayswift.errors import ExportError
from rayswift.evaluation.target import load, opened
from rayswift.export import pipeline
from rayswift.export.rows import read_rows_of
from rayswift.export.shown import encoder_of, shown
from rayswift.export.source import Source
from rayswift.export.terms import QuantizeSpec
from rayswift.models.adapters import add_lora, load_base
from rayswift.models.loading import load_tokenizer
from tests.data_cases import write_jsonl
from tests.export_cases import export, shake, write_run
from tests.media_cases import picture
from tests.multimodal_models import FAMILIES, make

torch.set_num_threads(1)


def logits(model: torch.nn.Module, folder: Path) -> list[torch.Tensor]:
    """After a prompt with each kind of media that the folder's own processor makes."""
    found = shown(encoder_of(folder))
    assert found
    with torch.no_grad():
        return [model.eval()(**model_inputs(one), use_cache=False).logits for one in found.values()]


def tower_of(folder: Path) -> list[str]:
    """Names of weights that only media go through."""
    return [name for name in load_file(folder / "model.safetensors") if "vision" in name or "audio" in name
            or "visual" in name]  # fmt: skip


@pytest.mark.parametrize("adapter", [None, AdapterSpec(rank=4)], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_trained_is_exported_towers_included(tmp_path: Path, family: str, adapter: AdapterSpec | None) -> None:
    base = make(family, tmp_path / "base")
    model = load_base(str(base)) if adapter is None else add_lora(load_base(str(base)), adapter, seed=0)
    weights = {name: tensor for name, tensor in model.state_dict().items() if adapter is None or "lora_" in name}
    shake(weights, 0.03)
    write_run(tmp_path / "run", base, weights, adapter)
    manifest = export(str(tmp_path / "run"), str(tmp_path / "out"))
    assert manifest.verify is not None
    assert manifest.verify.media == tuple(shown(encoder_of(base)))
    assert manifest.verify.processor_equal
    out = tmp_path / "out"
    for found, trained, before in zip(
        logits(load_base(str(out)), out), logits(model, base), logits(load_base(str(base)), base), strict=True
    ):
        torch.testing.assert_close(found, trained, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(trained, before, atol=1e-3)
    own = {path.name for path in base.iterdir()}
    assert {path.name for path in out.iterdir()} == own | {"rayswift.json", "README.md"}
    for name in own - {"model.safetensors", "config.json"}:
        assert (out / name).read_bytes() == (base / name).read_bytes()
    assert load_file(out / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()
    config = json.loads((out / "config.json").read_text())
    assert config.get("use_cache", True) is config["text_config"].get("use_cache", True) is True


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_every_config_inside_the_config_says_the_type_that_was_written(tmp_path: Path, family: str) -> None:
    """Which an engine that builds a tower by itself goes by."""
    export(str(make(family, tmp_path / "base")), str(tmp_path / "out"), dtype="bfloat16")
    config = json.loads((tmp_path / "out/config.json").read_text())
    inner = [config, *(one for one in config.values() if isinstance(one, dict) and "model_type" in one)]
    assert len(inner) == 3
    assert {one["dtype"] for one in inner} == {"bfloat16"}


def test_strangers_load_the_export(tmp_path: Path) -> None:
    """transformers alone reads model and processor."""
    from transformers import AutoModelForImageTextToText

    base = make("llava", tmp_path / "base")
    export(str(base), str(tmp_path / "out"), dtype="bfloat16")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert logits(model.float(), tmp_path / "out")[0].isfinite().all()


def _lose_the_tower(stage: Path) -> None:
    tensors = load_file(stage / "model.safetensors")
    for name in tower_of(stage):
        tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, stage / "model.safetensors", metadata={"format": "pt"})


def _scale_otherwise(stage: Path) -> None:
    file = stage / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_mean": [0.1, 0.2, 0.3]}))


def _count_otherwise(stage: Path) -> None:
    file = stage / "processor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_additional_image_tokens": 0}))


def _lose_the_processor(stage: Path) -> None:
    (stage / "preprocessor_config.json").unlink()
    (stage / "processor_config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_lose_the_tower, "log-probabilities differ by up to"),
        (_scale_otherwise, "the processor makes other features"),
        (_count_otherwise, "the processor makes other features"),
        (_lose_the_processor, "the processor makes other features"),
    ],
)
def test_a_lost_tower_or_processor_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None], message: str
) -> None:
    base, write = make("llava", tmp_path / "base"), pipeline.write_model

    def damaged(*args: Any) -> None:
        write(*args)
        damage(args[-1])

    monkeypatch.setattr(pipeline, "write_model", damaged)
    with pytest.raises(ExportError, match=message):
        export(str(base), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_processor_that_cannot_be_loaded_leaves_the_proof_to_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make("llava", tmp_path / "base")
    file = base / "processor_config.json"
    file.write_text(json.dumps({"processor_class": "UnheardOfProcessor"}))
    manifest = export(str(base), str(tmp_path / "out"))
    assert manifest.verify is not None
    assert manifest.verify.media == ()
    assert "proved with text alone" in capsys.readouterr().err


def test_a_chat_template_in_the_older_file_is_found_and_kept(tmp_path: Path) -> None:
    """Processors were saved with a chat_template.json, which transformers' tokenizers do not read."""
    base = make("llava", tmp_path / "base")
    template = (base / "chat_template.jinja").read_text()
    (base / "chat_template.jinja").unlink()
    (base / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert load_tokenizer(str(base)).chat_template == template
    export(str(base), str(tmp_path / "out"))
    assert load_tokenizer(str(tmp_path / "out")).chat_template == template


def test_a_quantized_export_is_evaluated_in_float32(tmp_path: Path) -> None:
    """All of it, as it was proved: of towers beside quantized layers transformers keeps the dtype that is stored."""
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"query": f"say {i}", "response": f"{i}"} for i in range(20)])
    asked = QuantizeSpec("int8", calibration=str(rows), num_calibration=4, num_held_out=4)
    export(str(make("llava", tmp_path / "base")), str(tmp_path / "out"), quantize=asked)
    model, _ = load(opened(str(tmp_path / "out"))[0])
    tensors = (*model.parameters(), *model.buffers())
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.float32}


def test_kinds_of_media_that_a_job_names_are_those_of_its_own_rows_alone(tmp_path: Path) -> None:
    """A job names them where the first rows have none; another file is looked at."""
    base = make("llava", tmp_path / "base")
    (tmp_path / "a.png").write_bytes(picture(size=(32, 32)))
    texts = [{"query": f"what does {i} print?", "response": f"it prints {i * 7}"} for i in range(100)]
    rows = [*texts, {"query": "<image>Who?", "response": "I", "images": ["a.png"]}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    data = DataSpec.model_validate(
        {"train": [{"path": str(path)}], "media": {"kinds": ["image"]}, "max_length": 512, "shuffle": False}
    )
    again = write_jsonl(tmp_path / "again.jsonl", rows)
    for given, got in ((None, 101), (str(path), 101), (str(again), 100)):
        _, judged = read_rows_of(
            Source(base=str(base), rendering="chat", data=data), load_tokenizer(str(base)), path=given,
            num_calibration=0, num_held_out=101, max_length=None,
        )  # fmt: skip
        assert len(judged.examples) == got
        assert sum(len(example.media) for example in judged.examples) == got - 100
