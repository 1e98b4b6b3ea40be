"""`model init` makes an ordinary Hugging Face folder for any text architecture, the same one for the same seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayswift.errors import ConfigError
from rayswift.models.init import InitReport, init_model
from rayswift.models.loading import check_folder

TINY: dict[str, Any] = {"layers": 2, "hidden_size": 32, "heads": 4, "vocab_size": 300}


def make(directory: Path, text: Path, **options: Any) -> InitReport:
    return init_model(directory, **{**TINY, "train_tokenizer_files": [text], **options})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("qwen3", {"kv_heads": 2}),
        ("llama", {"kv_heads": 1, "tie_embeddings": False}),
        ("gpt2", {}),
        ("gpt_neox", {}),
        ("gpt_neo", {}),
        ("gptj", {}),
        ("bloom", {}),
        ("opt", {}),
        ("falcon", {"kv_heads": 2}),
        ("gemma3_text", {"kv_heads": 2}),
        ("mamba", {"heads": None}),
        ("mixtral", {"kv_heads": 2, "extra": {"num_local_experts": 4}}),
        ("qwen3_moe", {"kv_heads": 2, "extra": {"num_experts": 4, "num_experts_per_tok": 2}}),
    ],
)
def test_folder_loads_and_computes(tmp_path: Path, tiny_text: Path, arch: str, options: dict[str, Any]) -> None:
    report = make(tmp_path / "m", tiny_text, arch=arch, **options)
    config = check_folder(str(tmp_path / "m"), chat_template=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    batch = tokenizer("Hello", return_tensors="pt")
    logits = model(**batch).logits
    assert torch.isfinite(logits).all()
    assert logits.shape[-1] == report.vocab_size == 300
    assert report.num_params == sum(p.numel() for p in model.parameters()) < 2e6
    assert report.arch == config["model_type"] == arch
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert config["eos_token_id"] == tokenizer.eos_token_id
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_folder_has_the_ordinary_files(tiny_model_dir: Path) -> None:
    assert {path.name for path in tiny_model_dir.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }


def test_issue_command_has_the_documented_size(tmp_path: Path, tiny_text: Path) -> None:
    report = make(
        tmp_path / "m", tiny_text, arch="qwen3", layers=4, hidden_size=128, heads=4, kv_heads=2, vocab_size=4096
    )
    assert 1e6 <= report.num_params <= 4e6
    assert report.tokenizer_vocab_size < 4096
    assert "embedding rows are padding" in report.notes[0]


def test_seed_decides_the_weights_and_torch_is_left_alone(tmp_path: Path, tiny_text: Path) -> None:
    torch.manual_seed(123)
    expected = torch.rand(1)
    torch.manual_seed(123)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make(tmp_path / name, tiny_text, seed=seed)
    assert torch.rand(1) == expected
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


def test_dtype_rounds_the_same_weights(tmp_path: Path, tiny_text: Path) -> None:
    make(tmp_path / "a", tiny_text)
    make(tmp_path / "b", tiny_text, dtype="bfloat16")
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(a[name].bfloat16(), b[name]) for name in a)
    assert json.loads((tmp_path / "b/config.json").read_text())["dtype"] == "bfloat16"


def test_like_takes_shape_and_tokenizer(tmp_path: Path, tiny_model_dir: Path) -> None:
    report = init_model(tmp_path / "m", like=str(tiny_model_dir), layers=1, seed=7)
    old, new = (json.loads((d / "config.json").read_text()) for d in (tiny_model_dir, tmp_path / "m"))
    assert {**old, **{k: new[k] for k in ("num_hidden_layers", "layer_types", "max_window_layers") if k in new}} == new
    assert new["num_hidden_layers"] == 1
    assert report.tokenizer_vocab_size == 512
    same = [(d / "tokenizer.json").read_text() for d in (tiny_model_dir, tmp_path / "m")]
    assert json.loads(same[0])["model"] == json.loads(same[1])["model"]
    assert not torch.equal(
        weights(tiny_model_dir)["model.embed_tokens.weight"], weights(tmp_path / "m")["model.embed_tokens.weight"]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "qwen33"}, "--arch=qwen33 is not an architecture .* did you mean qwen3"),
        ({"arch": "gemma3"}, "--arch=gemma3 .* use gemma3_text"),
        ({"heads": 5}, "--heads=5 does not divide --hidden-size=32; use 1, 2, 4, 8, 16 or 32"),
        ({"kv_heads": 3}, "--kv-heads=3 does not divide --heads=4; use 1, 2 or 4"),
        ({"arch": "gpt2", "kv_heads": 2}, "--kv-heads=2 is not possible: gpt2 has no grouped"),
        ({"arch": "mamba"}, "--heads=4 cannot be set: the config of mamba"),
        ({"layers": 0}, "--layers=0 is not positive"),
        ({"vocab_size": 100}, "--vocab-size=100 is too small"),
        ({"train_tokenizer_files": []}, "--train-tokenizer is needed"),
        (
            {"arch": "qwen3_moe", "extra": {"num_experts": 4, "num_experts_per_tok": 8}},
            "--arch=qwen3_moe cannot be built",
        ),
    ],
)
def test_bad_sizes_name_the_option_and_leave_nothing(
    tmp_path: Path, tiny_text: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make(tmp_path / "m", tiny_text, **options)
    assert not list(tmp_path.iterdir())


def test_like_refuses_another_arch_and_a_smaller_vocabulary(tmp_path: Path, tiny_model_dir: Path) -> None:
    with pytest.raises(ConfigError, match="--arch=llama is not the architecture of --like"):
        init_model(tmp_path / "m", like=str(tiny_model_dir), arch="llama")
    with pytest.raises(ConfigError, match="--vocab-size=400 is less than the 512 tokens"):
        init_model(tmp_path / "m", like=str(tiny_model_dir), vocab_size=400)
    with pytest.raises(ConfigError, match=r"--like=.* is not a folder"):
        init_model(tmp_path / "m", like=str(tmp_path / "nowhere"))


def test_existing_folder_is_refused_and_an_empty_one_is_used(tmp_path: Path, tiny_text: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/keep").write_text("x")
    with pytest.raises(ConfigError, match="exists and is not an empty folder"):
        make(tmp_path / "full", tiny_text)
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["keep"]
    (tmp_path / "empty").mkdir()
    make(tmp_path / "empty", tiny_text)
    check_folder(str(tmp_path / "empty"))
