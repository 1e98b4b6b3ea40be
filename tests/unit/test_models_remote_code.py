"""No code of a model's folder is run: what asks for it is refused by file and key, before anything is loaded."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rayswift import cli
from rayswift.config.job import ModelSpec
from rayswift.errors import ConfigError
from rayswift.models.loading import check_folder, load_config, load_model, load_tokenizer
from rayswift.models.processor import load_processor
from rayswift.serving.app import build_app
from rayswift.serving.spec import ServeSpec
from tests.multimodal_models import make

_CONFIG, _TOKENIZER = "config.json", "tokenizer_config.json"
_CODE = {"AutoConfig": "trap.Config", "AutoModelForCausalLM": "trap.Model", "AutoTokenizer": ["trap.Tokenizer", None]}


@pytest.fixture
def folder(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model with code in it that leaves a file behind when it is run."""
    copy = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    _set_trap(copy)
    return copy


def _set_trap(folder: Path) -> None:
    body = (
        f"open({str(folder / 'sprung')!r}, 'w').close()\nclass Config: pass\nclass Model: pass\nclass Tokenizer: pass\n"
    )
    (folder / "trap.py").write_text(body)


def _was_sprung(folder: Path) -> bool:
    return (folder / "sprung").exists() or any("trap" in name.split(".") for name in sys.modules)


def _change(folder: Path, name: str, change: dict[str, Any]) -> None:
    file = folder / name
    found = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(found | change))


def test_the_trap_works(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told to trust the folder, transformers runs its code: what the tests below would see."""
    from transformers import AutoConfig, dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    _change(folder, _CONFIG, {"auto_map": _CODE, "model_type": "martian"})
    with pytest.raises(Exception, match=r".*"):
        AutoConfig.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
    assert (folder / "sprung").exists()
    for name in [name for name in sys.modules if "trap" in name.split(".")]:
        del sys.modules[name]


def test_the_own_class_of_transformers_is_taken_where_there_is_one(folder: Path) -> None:
    """As many models on the hub have it: an `auto_map` from the time before transformers knew them."""
    for name in (_CONFIG, _TOKENIZER):
        _change(folder, name, {"auto_map": _CODE})
    assert check_folder(str(folder))["model_type"] == "qwen3"
    assert type(load_config(str(folder))).__module__.startswith("transformers.models.qwen3.")
    assert type(load_tokenizer(str(folder))).__module__.startswith("transformers.")
    assert type(load_model(ModelSpec(path=str(folder)))).__module__.startswith("transformers.models.qwen3.")
    assert not _was_sprung(folder)


def test_the_own_processor_of_transformers_is_taken_where_there_is_one(tmp_path: Path) -> None:
    folder = make("llava", tmp_path / "llava")
    _set_trap(folder)
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).exists():
            _change(folder, name, {"auto_map": {"AutoProcessor": "trap.Model", "AutoImageProcessor": "trap.Model"}})
    assert load_processor(str(folder))
    assert not _was_sprung(folder)
    _change(folder, "preprocessor_config.json", {"auto_map": _CODE, "image_processor_type": "TrapProcessor"})
    with pytest.raises(ConfigError, match=r"asks in preprocessor_config.json \(auto_map\)"):
        load_processor(str(folder))


_ASKS: list[tuple[str, dict[str, Any], str]] = [
    (_CONFIG, {"auto_map": _CODE, "model_type": "martian"}, r"config.json \(auto_map\) for code"),
    (_CONFIG, {"text_config": {"auto_map": _CODE}}, r"config.json \(text_config.auto_map\)"),
    (_CONFIG, {"vision_config": {"auto_map": {"AutoModel": "evil/repo--trap.Model"}}}, r"\(vision_config.auto_map\)"),
    (_CONFIG, {"audio_config": {"encoder": [{"auto_map": _CODE}]}}, r"\(audio_config.encoder\[0\].auto_map\)"),
    (_CONFIG, {"a": {"b": {"c": {"d": {"e": {"auto_map": _CODE}}}}}}, r"\(a.b.c.d.e.auto_map\)"),
    (_CONFIG, {"trust_remote_code": True}, r"\(trust_remote_code\) for its own code to be trusted"),
    (_CONFIG, {"text_config": {"trust_remote_code": 1}}, r"\(text_config.trust_remote_code\)"),
    (_CONFIG, {"attn_implementation": "evil/kernel"}, r"\(attn_implementation\) for code from the hub"),
    (_CONFIG, {"text_config": {"_attn_implementation": "evil/kernel@main:f"}}, r"\(text_config._attn_implementation\)"),
    (_CONFIG, {"experts_implementation": {"": "evil/kernel"}}, r"\(experts_implementation\)"),
    (_TOKENIZER, {"auto_map": _CODE, "tokenizer_class": "TrapTokenizer"}, r"tokenizer_config.json \(auto_map\)"),
    (_TOKENIZER, {"trust_remote_code": True}, r"tokenizer_config.json \(trust_remote_code\)"),
    ("processor_config.json", {"auto_map": _CODE, "processor_class": "Trap"}, r"processor_config.json \(auto_map\)"),
    ("processor_config.json", {"image_processor": {"auto_map": _CODE}}, r"\(image_processor.auto_map\)"),
    ("preprocessor_config.json", {"auto_map": _CODE, "feature_extractor_type": "Trap"}, r"preprocessor_config.json"),
    ("video_preprocessor_config.json", {"auto_map": _CODE, "video_processor_type": "T"}, r"video_preprocessor_config"),
    ("generation_config.json", {"x": {"auto_map": _CODE}}, r"generation_config.json \(x.auto_map\)"),
]  # fmt: skip


@pytest.mark.parametrize(("file", "change", "message"), _ASKS, ids=[f"{one[0]}-{one[2]}" for one in _ASKS])
def test_what_asks_for_code_is_refused_by_file_and_key(
    folder: Path, file: str, change: dict[str, Any], message: str
) -> None:
    _change(folder, file, change)
    checks: list[Callable[[], Any]] = [
        lambda: check_folder(str(folder)),
        lambda: load_config(str(folder)),
        lambda: load_tokenizer(str(folder)),
        lambda: load_model(ModelSpec(path=str(folder))),
        lambda: build_app(ServeSpec(models={"m": str(folder)})),
    ]
    for check in checks:
        with pytest.raises(ConfigError, match=message) as caught:
            check()
        assert "which is never done" in str(caught.value)
    assert not _was_sprung(folder)


def test_a_command_ends_with_2(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _change(folder, _CONFIG, {"text_config": {"auto_map": _CODE}})
    with pytest.raises(SystemExit) as caught:
        cli.main(["serve", str(folder)])
    assert caught.value.code == 2
    assert "config.json (text_config.auto_map)" in capsys.readouterr().err.replace("\n", " ")


def test_what_asks_for_nothing_passes(folder: Path) -> None:
    _change(folder, _CONFIG, {"auto_map": {}, "trust_remote_code": False, "attn_implementation": "sdpa"})
    _change(folder, _TOKENIZER, {"auto_map": {}})
    assert check_folder(str(folder))
    assert load_model(ModelSpec(path=str(folder)))


def test_a_config_as_deep_as_can_be_is_refused(folder: Path) -> None:
    (folder / _CONFIG).write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    with pytest.raises(ConfigError, match=r"config.json that cannot be read"):
        check_folder(str(folder))


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".pkl", ".ckpt"])
def test_pickles_alone_are_refused(folder: Path, suffix: str) -> None:
    (folder / "model.safetensors").rename(folder / f"pytorch_model{suffix}")
    for check in (lambda: check_folder(str(folder)), lambda: load_model(ModelSpec(path=str(folder)))):
        with pytest.raises(ConfigError, match="only as pickles, which can run code"):
            check()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pytorch_model.bin", "names pytorch_model.bin in its model.safetensors.index.json: pickles can run code"),
        ("model.safetensors.pkl", "pickles can run code"),
        ("../other/model.safetensors", "which is not in the folder"),
        ("/etc/model.safetensors", "which is not in the folder"),
    ],
)
def test_an_index_names_safetensors_of_the_folder_and_nothing_else(folder: Path, name: str, message: str) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"pickle")  # as such it does not matter
    assert check_folder(str(folder))
    weights = {"a": "model.safetensors", "b": name}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    for check in (lambda: check_folder(str(folder)), lambda: load_model(ModelSpec(path=str(folder)))):
        with pytest.raises(ConfigError, match=message):
            check()
