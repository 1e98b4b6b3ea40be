"""An export is a Hugging Face folder that computes what was trained, proved and signed, or nothing at all."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayswift.config.job import AdapterSpec, Job
from rayswift.errors import CheckpointError, ConfigError, ExportError, RaySwiftError
from rayswift.export import pipeline
from rayswift.export.manifest import MANIFEST, read_valid
from rayswift.export.terms import Bounds
from rayswift.models.adapters import adapter_state, add_lora, load_base, save_adapter, weights_sha256
from rayswift.models.init import init_model
from rayswift.training import checkpoint
from tests.export_cases import export, shake, write_run

IDS_BT = torch.tensor([[5, 6, 7, 8, 9]])


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found = model.eval()(input_ids=IDS_BT, use_cache=False).logits
    assert isinstance(found, torch.Tensor)
    return found


def exported_logits(folder: Path) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


@pytest.fixture
def full_run(tmp_path: Path, tiny_model_dir: Path) -> tuple[Path, torch.Tensor]:
    """A finished full fine-tuning, and what the trained model computes."""
    model = load_base(str(tiny_model_dir))
    weights = dict(model.state_dict())
    shake(weights, 0.05)
    write_run(tmp_path / "runs" / "full", tiny_model_dir, weights, None)
    return tmp_path / "runs" / "full", logits(model)


@pytest.fixture
def lora_run(tmp_path: Path, tiny_model_dir: Path) -> tuple[Path, torch.Tensor]:
    """A finished LoRA run under the names of the model's own state dict, and what the trained model computes."""
    spec = AdapterSpec(rank=4)
    model = add_lora(load_base(str(tiny_model_dir)), spec, seed=0)
    weights = {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}
    shake(weights, 0.2)
    write_run(tmp_path / "runs" / "lora", tiny_model_dir, weights, spec)
    return tmp_path / "runs" / "lora", logits(model)


def test_model_folder_comes_out_the_same(tmp_path: Path, tiny_model_dir: Path) -> None:
    out = tmp_path / "out"
    manifest = export(str(tiny_model_dir), str(out))
    assert manifest == read_valid(out)
    assert (manifest.method, manifest.adapter, manifest.quantizer, manifest.merge) == (None, None, "none", None)
    assert manifest.base_sha256 == weights_sha256(tiny_model_dir)
    assert manifest.verify is not None
    assert manifest.verify.logprobs.max_abs == 0
    assert manifest.verify.top1_agreement == 1
    assert set(manifest.files) == {p.name for p in out.iterdir()} - {MANIFEST}
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (tiny_model_dir / name).read_bytes()
    assert torch.equal(exported_logits(out), exported_logits(tiny_model_dir))


def test_code_and_pickles_beside_the_tokenizer_are_left_behind(tmp_path: Path, tiny_model_dir: Path) -> None:
    base = Path(shutil.copytree(tiny_model_dir, tmp_path / "base"))
    data = ("tokenizer.model.v3", "tokenizer.model.v11m1", "vocab.txt", "tokenizer.tiktoken")
    run = ("tokenizer.py", "tokenizer_utils.py", "tokenizer.pkl", "vocab.pkl", "chat_template.py", "tokenizer.bin")
    for name in (*data, *run):
        (base / name).write_text("a b\n")
    export(str(base), str(tmp_path / "out"), verify=False)
    there = {path.name for path in (tmp_path / "out").iterdir()}
    assert (there & {*data, *run}) == {*data}


@pytest.mark.parametrize("said", [{"temperature": 0.9, "top_p": 0.6}, {"early_stopping": True, "eos_token_id": [1, 2]}])
def test_generation_settings_that_contradict_are_those_of_the_base(
    tmp_path: Path, tiny_model_dir: Path, said: dict[str, Any]
) -> None:
    """transformers reads them with a warning, and refuses to write them."""
    base = Path(shutil.copytree(tiny_model_dir, tmp_path / "base"))
    (base / "generation_config.json").write_text(json.dumps(said))
    export(str(base), str(tmp_path / "out"), dtype="bfloat16")
    assert (tmp_path / "out/generation_config.json").read_bytes() == (base / "generation_config.json").read_bytes()


def test_of_generation_settings_in_an_old_config_those_that_contradict_are_left_out(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    base = Path(shutil.copytree(tiny_model_dir, tmp_path / "base"))
    (base / "generation_config.json").unlink()
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"temperature": 0.9, "eos_token_id": [1, 2]}))
    export(str(base), str(tmp_path / "out"))
    written = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert (written["eos_token_id"], written.get("temperature")) == ([1, 2], None)


def test_cache_is_on_again_after_training(full_run: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    """Training turns it off for packing; a served model without it is many times slower."""
    export(str(full_run[0]), str(tmp_path / "out"))
    assert json.loads((tmp_path / "out/config.json").read_text()).get("use_cache", True) is True


def test_full_run_exports_the_trained_weights(full_run: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    run, expected = full_run
    manifest = export(str(run), str(tmp_path / "out"))
    assert torch.allclose(exported_logits(tmp_path / "out"), expected, atol=1e-5)
    assert (manifest.method, manifest.checkpoint_step, manifest.adapter) == ("sft", 7, None)
    assert manifest.job_hash == checkpoint.read_manifest(checkpoint.newest(str(run))).job_hash
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


@pytest.mark.parametrize(
    ("arch", "extra"),
    [
        ("gpt2", {}),
        ("llama", {}),
        ("mixtral", {"num_local_experts": 4}),
        ("qwen2_moe", {"num_experts": 4, "num_experts_per_tok": 2}),
        ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2}),
    ],
)
@pytest.mark.parametrize("adapter", [None, AdapterSpec(rank=4)])
def test_architectures_export_what_was_trained(
    tmp_path: Path, tiny_text: Path, arch: str, extra: dict[str, Any], adapter: AdapterSpec | None
) -> None:
    """gpt2 stores matrices transposed, llama is untied here, mixtral's experts are fused in memory only."""
    base = tmp_path / "base"
    init_model(
        base, arch=arch, layers=2, hidden_size=32, heads=4, vocab_size=300, tie_embeddings=arch == "gpt2",
        train_tokenizer_files=[tiny_text], extra=extra,
    )  # fmt: skip
    model = load_base(str(base)) if adapter is None else add_lora(load_base(str(base)), adapter, seed=0)
    weights = {name: tensor for name, tensor in model.state_dict().items() if adapter is None or "lora_" in name}
    shake(weights, 0.1)
    write_run(tmp_path / "run", base, weights, adapter)
    export(str(tmp_path / "run"), str(tmp_path / "out"))
    assert torch.allclose(exported_logits(tmp_path / "out"), logits(model), atol=1e-4)
    assert not torch.allclose(exported_logits(base), logits(model), atol=1e-2)


def test_checkpoint_directory_is_a_source(full_run: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    manifest = export(checkpoint.newest(str(full_run[0])), str(tmp_path / "out"), verify=False)
    assert manifest.verify is None
    assert torch.allclose(exported_logits(tmp_path / "out"), full_run[1], atol=1e-5)


def test_lora_run_is_merged_and_the_merge_is_measured(lora_run: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    run, expected = lora_run
    manifest = export(str(run), str(tmp_path / "out"))
    assert torch.allclose(exported_logits(tmp_path / "out"), expected, atol=1e-4)
    assert manifest.merge is not None
    assert 0 < manifest.merge.max_abs < 1e-4
    assert manifest.adapter is not None
    assert (manifest.adapter["name"], manifest.adapter["rank"]) == ("lora", 4)


def test_adapter_folder_is_a_source_bound_to_its_base(tmp_path: Path, tiny_model_dir: Path) -> None:
    base = Path(shutil.copytree(tiny_model_dir, tmp_path / "base"))
    model = add_lora(load_base(str(base)), AdapterSpec(rank=4), seed=0)
    shake(adapter_state(model), 0.2)
    save_adapter(model, tmp_path / "adapter", base=str(base))
    export(str(tmp_path / "adapter"), str(tmp_path / "out"))
    assert torch.allclose(exported_logits(tmp_path / "out"), logits(model), atol=1e-4)
    shutil.rmtree(base)
    init_model(base, like=str(tiny_model_dir), seed=5)
    with pytest.raises(ExportError, match=r"has changed since .* was trained on it"):
        export(str(tmp_path / "adapter"), str(tmp_path / "other"))


def test_dtype_is_rounded_once_and_bounded(full_run: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    manifest = export(str(full_run[0]), str(tmp_path / "out"), dtype="bfloat16")
    assert manifest.verify is not None
    assert 0 < manifest.verify.logprobs.max_abs < manifest.verify.logprobs.bound_max_abs
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16
    with pytest.raises(ExportError, match="did not verify: log-probabilities differ"):
        export(str(full_run[0]), str(tmp_path / "strict"), dtype="bfloat16", bounds=Bounds(1e-6, 1e-6))
    with pytest.raises(ExportError, match=r"and \S+ on average \(bound 1e-06\)"):
        export(str(full_run[0]), str(tmp_path / "strict"), dtype="bfloat16", max_difference=1e-6)
    wide = export(str(full_run[0]), str(tmp_path / "wide"), dtype="bfloat16", max_difference=0.2).verify
    assert wide is not None
    assert (wide.logprobs.bound_mean_abs, wide.logprobs.bound_max_abs) == (0.2, 2.0)
    with pytest.raises(ConfigError, match="--dtype=int3 is not a dtype"):
        export(str(full_run[0]), str(tmp_path / "strict"), dtype="int3")
    assert not (tmp_path / "strict").exists()


def _damage_weights(stage: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(stage / "model.safetensors")
    tensors["model.norm.weight"] *= -1
    save_file(tensors, stage / "model.safetensors", metadata={"format": "pt"})


def _damage_with_nan(stage: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(stage / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, stage / "model.safetensors", metadata={"format": "pt"})


def _damage_template(stage: Path) -> None:
    template = (stage / "chat_template.jinja").read_text()
    (stage / "chat_template.jinja").write_text(template.replace("'\\n' +", "' ' +"))


def _damage_tokenizer(stage: Path) -> None:
    tokenizer = json.loads((stage / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:10]
    (stage / "tokenizer.json").write_text(json.dumps(tokenizer))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_damage_weights, "log-probabilities differ by up to"),
        (_damage_with_nan, "log-probabilities differ by up to inf"),
        (_damage_template, "the chat template renders another text"),
        (_damage_tokenizer, "the tokenizer gives other ids"),
    ],
)
def test_what_does_not_verify_is_not_left_behind(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, damage: Any, message: str
) -> None:
    write = pipeline.write_model

    def damaged(*args: Any) -> None:
        write(*args)
        damage(args[-1])

    monkeypatch.setattr(pipeline, "write_model", damaged)
    with pytest.raises(ExportError, match=message) as caught:
        export(str(tiny_model_dir), str(tmp_path / "out"))
    assert caught.value.exit_code == 5
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", ["flip", "cut", "remove", "manifest", "add", "link"])
def test_changed_export_is_not_valid(tmp_path: Path, tiny_model_dir: Path, change: str) -> None:
    out = tmp_path / "out"
    export(str(tiny_model_dir), str(out), verify=False)
    file = out / "model.safetensors"
    content = file.read_bytes()
    if change == "flip":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif change == "cut":
        file.write_bytes(content[:-1])
    elif change == "remove":
        file.unlink()
    elif change == "manifest":
        (out / MANIFEST).unlink()
    elif change == "add":
        (out / "adapter_config.json").write_text("{}")  # transformers would load the adapter it names
    else:
        (out / "additional_chat_templates").symlink_to(tmp_path)
    message = {
        "flip": "another sha256", "cut": "bytes instead of", "remove": "lacks model", "manifest": "has no ray",
        "add": "holds adapter_config.json, which its manifest does not list", "link": "holds additional_chat_templates",
    }  # fmt: skip
    with pytest.raises(ExportError, match=message[change]):
        read_valid(out)
    if change in ("flip", "add"):
        with pytest.raises(ExportError, match=message[change]):
            export(str(out), str(tmp_path / "again"))


def test_existing_output_needs_force_and_force_replaces_only_exports(tmp_path: Path, tiny_model_dir: Path) -> None:
    out = tmp_path / "out"
    export(str(tiny_model_dir), str(out), verify=False)
    (out / "note").write_text("mine")
    with pytest.raises(ConfigError, match=r"OUTPUT=.* exists; name another folder, or replace it with --force"):
        export(str(tiny_model_dir), str(out))
    assert (out / "note").exists()
    export(str(tiny_model_dir), str(out), verify=False, force=True)
    assert not (out / "note").exists()
    (tmp_path / "home").mkdir()
    for name, text in (("thesis", "years"), ("config.json", '{"my": "app"}'), (MANIFEST, '{"my": "app"}')):
        (tmp_path / "home" / name).write_text(text)
        with pytest.raises(ConfigError, match="is not an earlier export"):
            export(str(tiny_model_dir), str(tmp_path / "home"), force=True)
    for target in (out, tmp_path):
        with pytest.raises(ConfigError, match="would overwrite what is exported"):
            export(str(out), str(target), force=True)
    assert (tmp_path / "home" / "thesis").exists()
    with pytest.raises(ConfigError, match=r"OUTPUT=.*half lies in .*out, which would hold what is not its own"):
        export(str(out), str(out / "deep" / "half"))
    read_valid(out)


@pytest.mark.parametrize("force", [False, True])
def test_what_came_to_the_output_during_the_proof_is_kept_and_so_is_the_export(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    out, write = tmp_path / "out", pipeline.write_model
    if force:
        export(str(tiny_model_dir), str(out), verify=False)

    def slow(*args: Any) -> None:
        write(*args)
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        (out / "thesis").write_text("years")

    monkeypatch.setattr(pipeline, "write_model", slow)
    with pytest.raises(RaySwiftError, match=r"folder=.*is not replaced.*; what was made is whole and stays in") as told:
        export(str(tiny_model_dir), str(out), verify=False, force=force)
    assert (out / "thesis").read_text() == "years"
    read_valid(str(told.value).rpartition(" ")[2])


def test_an_output_that_cannot_be_made_is_told_before_any_work(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "check_base", lambda *_: pytest.fail("the weights were read"))
    (tmp_path / "file").touch()
    rule = rf"OUTPUT=\S+/file/out cannot be made: {tmp_path}/file is no folder; name another one"
    with pytest.raises(ConfigError, match=rule):
        export(str(tiny_model_dir), str(tmp_path / "file/out"))
    monkeypatch.setattr("os.access", lambda path, _: Path(path) != tmp_path)  # root may write everywhere
    with pytest.raises(ConfigError, match=rf"cannot be written: {tmp_path} is not yours to write in"):
        export(str(tiny_model_dir), str(tmp_path / "deep/er/out"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_of_runs_names_the_run_that_was_meant(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "runs" / name / "checkpoints").mkdir(parents=True)
    with pytest.raises(ConfigError, match=rf"SOURCE=\S+ is neither .*; did you mean {tmp_path}/runs/a or \S+/runs/b\?"):
        export(str(tmp_path / "runs"), str(tmp_path / "out"))
    with pytest.raises(ConfigError, match=rf"did you mean {tmp_path}/runs/a\?"):
        export(str(tmp_path / "runs/a/checkpoints"), str(tmp_path / "out"))


def test_wrong_sources_are_config_errors(tmp_path: Path, tiny_model_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"SOURCE=.* does not exist"):
        export(str(tmp_path / "nowhere"), str(tmp_path / "out"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="is neither a run, a checkpoint, an adapter nor"):
        export(str(tmp_path / "empty"), str(tmp_path / "out"))
    (tmp_path / "empty" / "job.yaml").write_text("name: a\n")
    with pytest.raises(CheckpointError, match="holds no valid checkpoint"):
        export(str(tmp_path / "empty"), str(tmp_path / "out"))
    copy = Path(shutil.copytree(tiny_model_dir, tmp_path / "copy"))
    (copy / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"tokenizer.json is missing"):
        export(str(copy), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_damaged_checkpoint_and_wrong_base_are_refused(full_run: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    run, _ = full_run
    job = Job.model_validate(checkpoint.read_manifest(checkpoint.newest(str(run))).job)
    init_model(tmp_path / "base", like=job.model.path, layers=3)
    manifest = Path(checkpoint.newest(str(run)), checkpoint.MANIFEST)
    record = json.loads(manifest.read_text())
    record["job"]["model"]["path"] = str(tmp_path / "base")
    manifest.write_text(json.dumps(record))
    with pytest.raises(ExportError, match=r"checkpoint does not fit: .* among them model.layers.2"):
        export(str(run), str(tmp_path / "out"))
    shard = next(manifest.parent.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="bytes instead of"):
        export(str(manifest.parent), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_damaged_newer_checkpoint_is_passed_over_aloud(
    full_run: tuple[Path, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from rayswift import cli

    run, _ = full_run
    newer = Path(shutil.copytree(run / checkpoint.folder_name(7), run / checkpoint.folder_name(99)))
    shard = next(newer.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    (run / checkpoint.folder_name(100)).mkdir()
    with pytest.raises(SystemExit):
        cli.main(["export", str(run), str(tmp_path / "out"), "--engine", "none"])
    out, err = capsys.readouterr()
    assert "from step 7; the run was finished" in out
    warnings_told = [line for line in err.splitlines() if line.startswith("warning: passed over a newer checkpoint: ")]
    assert ["step-00000100 has no manifest" in warnings_told[0], "bytes instead of" in warnings_told[1]] == [True] * 2
    assert len(warnings_told) == 2
    assert read_valid(tmp_path / "out").run_finished is True
    record = json.loads((run / checkpoint.folder_name(7) / checkpoint.MANIFEST).read_text())
    (run / checkpoint.folder_name(7) / checkpoint.MANIFEST).write_text(json.dumps(record | {"finished": False}))
    with pytest.raises(SystemExit):
        cli.main(["export", str(run), str(tmp_path / "again"), "--engine", "none"])
    assert "from step 7; the run was not finished" in capsys.readouterr().out


def test_no_room_is_said_before_anything_is_written(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ExportError, match="of which 1000 B are free; make room"):
        export(str(tiny_model_dir), str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_disk_that_fills_up_while_writing_leaves_nothing(tmp_path: Path, tiny_model_dir: Path) -> None:
    """A real refusal of the file system, brought about by a limit on file size in a process of its own."""
    code = (
        "import sys, resource; from rayswift.export.pipeline import export; from rayswift.errors import ExportError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "try: export(sys.argv[1], sys.argv[2], verify=False)\n"
        "except ExportError as error: print(error)\n"
    )
    assert (tiny_model_dir / "model.safetensors").stat().st_size > 50_000
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny_model_dir), str(tmp_path / "out")],
        capture_output=True, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert "could not be written: " in done.stdout, done.stderr
    assert "File too large" in done.stdout
    assert not list(tmp_path.iterdir())
