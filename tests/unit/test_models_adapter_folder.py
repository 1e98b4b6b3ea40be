"""An adapter's folder goes on a model whole or not at all, and what is wrong with it is told by name and size."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rayswift import cli
from rayswift.config.job import AdapterSpec
from rayswift.errors import ConfigError
from rayswift.export import merge
from rayswift.models.adapter_folder import attach_adapter, check_sizes_fit
from rayswift.models.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, add_lora, load_base, save_adapter
from rayswift.models.init import init_model

torch.set_num_threads(1)
Spoil = Callable[[Path], None]


def write_adapter(folder: Path, base: Path, rank: int) -> Path:
    save_adapter(add_lora(load_base(str(base)), AdapterSpec(rank=rank), seed=0), folder, base=str(base))
    return folder


@pytest.fixture
def adapter(tmp_path: Path, tiny_model_dir: Path) -> Path:
    return write_adapter(tmp_path / "adapter", tiny_model_dir, 4)


def change_config(folder: Path, **values: object) -> None:
    file = folder / ADAPTER_CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def of_another_model(folder: Path) -> None:
    """The tensors of a wider model whose modules have the same names."""
    base = folder.parent / "wide"
    text = folder.parent / "t.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 40)
    init_model(
        str(base), arch="qwen3", layers=2, hidden_size=64, heads=4, kv_heads=2, vocab_size=300,
        train_tokenizer_files=[str(text)], seed=0,
    )  # fmt: skip
    shutil.copyfile(write_adapter(folder.parent / "wide-adapter", base, 4) / ADAPTER_WEIGHTS, folder / ADAPTER_WEIGHTS)


def one_of_another_size(folder: Path) -> None:
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    name = max(tensors)
    save_file(tensors | {name: tensors[name][:-1].contiguous()}, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def cut_short(folder: Path) -> None:
    (folder / ADAPTER_WEIGHTS).write_bytes((folder / ADAPTER_WEIGHTS).read_bytes()[:-5])


def as_pickle(folder: Path) -> None:
    torch.save(load_file(folder / ADAPTER_WEIGHTS), folder / "adapter_model.bin")
    (folder / ADAPTER_WEIGHTS).unlink()


SPOILED: dict[str, tuple[Spoil, str]] = {
    "another model": (
        of_another_model,
        r"has \S+lora_A\.weight of shape \[4, \d+\] in adapter_model.safetensors, where its adapter_config.json of "
        r"rank 4 and the layers of \S+ want \[4, \d+\]; use the",
    ),
    "another rank": (
        lambda folder: change_config(folder, r=8),
        r"has .* of shape \[4, 128\] .* rank 8 .* \[8, 128\]",
    ),
    "one tensor": (one_of_another_size, r"has \S+v_proj\.lora_B\.weight of shape \[15, 4\] .* want \[16, 4\]"),
    "cut short": (cut_short, r"has no usable adapter_model.safetensors: it has \d+ bytes of \d+; copy it again"),
    "pickle": (as_pickle, "has no usable adapter_model.safetensors: it is not there, and pickles can run code"),
    "another kind": (lambda folder: change_config(folder, peft_type="IA3"), "has IA3 as peft_type .* use a LoRA"),
    "no layers": (lambda folder: change_config(folder, target_modules=["c_attn"]), "cannot be put on .*c_attn"),
    "bad value": (lambda folder: change_config(folder, r="eight"), "cannot be put on the model: "),
}


@pytest.mark.parametrize("name", SPOILED)
def test_what_does_not_fit_is_refused_by_headers_and_on_the_model(
    name: str, adapter: Path, tiny_model_dir: Path
) -> None:
    check_sizes_fit(str(tiny_model_dir), str(adapter))
    spoil, rule = SPOILED[name]
    spoil(adapter)
    for put in (check_sizes_fit, lambda base, folder: attach_adapter(load_base(base), folder)):
        with pytest.raises(ConfigError, match=rf"^adapter={adapter} {rule}"):
            put(str(tiny_model_dir), str(adapter))


def test_a_tensor_that_is_missing_is_found_by_the_loading(adapter: Path, tiny_model_dir: Path) -> None:
    """Names may be those of an older transformers: headers alone do not tell."""
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    name = min(tensors)
    del tensors[name]
    save_file(tensors, adapter / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    check_sizes_fit(str(tiny_model_dir), str(adapter))
    with pytest.raises(ConfigError, match=rf"^adapter={adapter} lacks 1 tensors, among them "):
        attach_adapter(load_base(str(tiny_model_dir)), str(adapter))


@pytest.mark.parametrize("command", ["export", "adapter-only", "eval"])
def test_commands_end_with_code_2_before_a_model_is_loaded(
    command: str, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        json.dumps({"messages": [{"role": role, "content": "Hi"} for role in ("user", "assistant")]}) + "\n"
    )
    args = {
        "export": ["export", str(adapter), str(tmp_path / "out"), "--engine", "none"],
        "adapter-only": ["export", str(adapter), str(tmp_path / "out"), "--adapter-only"],
        "eval": ["eval", str(adapter), "--rows", str(rows), "--max-new-tokens", "0"],
    }  # fmt: skip
    one_of_another_size(adapter)
    monkeypatch.setattr(merge, "load_in_float32", lambda _: pytest.fail("the base was loaded"))
    with pytest.raises(SystemExit) as caught:
        cli.main(args[command])
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert f"error: adapter={adapter} has base_model.model." in error
    assert "of shape [15, 4] in adapter_model.safetensors" in error
    assert not (tmp_path / "out").exists()
