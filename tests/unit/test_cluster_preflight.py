"""Bad input ends at once: before a cluster is started, before a file is written, with path, value, rule and fix."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from rayswift import api
from rayswift.cluster import preflight
from rayswift.cluster.preflight import prepare
from rayswift.config.job import Job
from rayswift.errors import ConfigError, DataError, PlanError, RaySwiftError
from rayswift.models.cutting import model_plan
from rayswift.planning.model_plan import ModelPlan
from tests.multimodal_models import make

Spoil = Callable[[Path, dict[str, Any]], None]


def missing_file(folder: Path, job: dict[str, Any]) -> None:
    job["data"]["train"][0]["path"] = str(folder / "row.jsonl")


def empty_dataset(folder: Path, job: dict[str, Any]) -> None:
    (folder / "rows.jsonl").write_text("\n\n")


def no_json(folder: Path, job: dict[str, Any]) -> None:
    (folder / "rows.jsonl").write_text('{"query": "q"\nhello\n')


def rows_without_messages(folder: Path, job: dict[str, Any]) -> None:
    (folder / "rows.jsonl").write_text('{"messages": []}\n{"messages": null}\n')


def unknown_columns(folder: Path, job: dict[str, Any]) -> None:
    (folder / "rows.jsonl").write_text('{"zig": "a", "zag": "b"}\n')


def missing_eval_file(folder: Path, job: dict[str, Any]) -> None:
    job["data"]["eval"] = [{"path": str(folder / "held_out.jsonl")}]


def no_model(folder: Path, job: dict[str, Any]) -> None:
    job["model"]["path"] = str(folder / "nowhere")


def no_tokenizer(folder: Path, job: dict[str, Any]) -> None:
    _copy_model(folder, job)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "model" / name).unlink()


def no_chat_template(folder: Path, job: dict[str, Any]) -> None:
    _copy_model(folder, job)
    (folder / "model" / "chat_template.jinja").unlink()


def cut_off_weights(folder: Path, job: dict[str, Any]) -> None:
    _copy_model(folder, job)
    weights = folder / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def a_source_of_no_rows(folder: Path, job: dict[str, Any]) -> None:
    job["data"]["train"].append({"path": str(folder / "rows.jsonl"), "weight": 0.01})


def a_share_of_no_rows(folder: Path, job: dict[str, Any]) -> None:
    job["data"]["train"].append({"path": str(folder / "rows.jsonl"), "weight": 0.01})
    job["data"]["mixing"] = {"stopping": "first_exhausted"}


def an_endless_epoch(folder: Path, job: dict[str, Any]) -> None:
    job["data"]["train"].append({"path": str(folder / "rows.jsonl"), "weight": 1e-4})
    job["data"]["mixing"] = {"stopping": "all_exhausted"}


def no_positions_for_the_length(folder: Path, job: dict[str, Any]) -> None:
    _copy_model(folder, job)
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_positions": 64}
    (folder / "model" / "config.json").write_text(json.dumps(config))
    job["data"]["max_length"] = 128


def a_config_that_cannot_be(folder: Path, job: dict[str, Any]) -> None:
    _copy_model(folder, job)
    config = json.loads((folder / "model" / "config.json").read_text())
    (folder / "model" / "config.json").write_text(json.dumps(config | {"num_attention_heads": 0}))


def unknown_method(folder: Path, job: dict[str, Any]) -> None:
    job["method"] = {"name": "stf"}


def nothing_to_continue(folder: Path, job: dict[str, Any]) -> None:
    job["train"] = {"resume": "must"}


def output_is_a_file(folder: Path, job: dict[str, Any]) -> None:
    (folder / "runs").write_text("not a folder")


def unknown_engine(folder: Path, job: dict[str, Any]) -> None:
    job["parallel"] = {"engine": "fsdp"}


def heads_that_do_not_divide(folder: Path, job: dict[str, Any]) -> None:
    job["parallel"] = {"tp": 3}


def no_experts_to_spread(folder: Path, job: dict[str, Any]) -> None:
    job["parallel"] = {"ep": 2}


def more_stages_than_layers(folder: Path, job: dict[str, Any]) -> None:
    job["parallel"] = {"pp": 2, "schedule": "zbv"}


def an_architecture_that_cannot_be_cut(folder: Path, job: dict[str, Any]) -> None:
    _copy_model(folder, job)
    config = json.loads((folder / "model" / "config.json").read_text())
    (folder / "model" / "config.json").write_text(
        json.dumps(config | {"model_type": "stablelm", "architectures": ["StableLm"]})
    )
    job["parallel"] = {"tp": 2}


def a_deepspeed_json_that_contradicts(folder: Path, job: dict[str, Any]) -> None:
    (folder / "ds.json").write_text('{"zero_optimization": {"stage": 2}}')
    job["parallel"] = {"deepspeed": str(folder / "ds.json"), "zero_stage": 3}


def pictures_for_a_model_of_text(folder: Path, job: dict[str, Any]) -> None:
    rows = [{"query": "<image>What?", "response": "This.", "images": ["a.png"]}] * 20
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")


def a_tower_that_would_be_cut(folder: Path, job: dict[str, Any]) -> None:
    job["model"]["path"] = str(make("llava", folder / "llava"))
    job["parallel"] = {"tp": 2}


def pictures_for_a_model_that_hears(folder: Path, job: dict[str, Any]) -> None:
    _copy_model(folder, job)
    config = json.loads((folder / "model" / "config.json").read_text())
    (folder / "model" / "config.json").write_text(json.dumps(config | {"audio_config": {"d_model": 8}}))
    pictures_for_a_model_of_text(folder, job)


def _copy_model(folder: Path, job: dict[str, Any]) -> None:
    shutil.copytree(job["model"]["path"], folder / "model")
    job["model"]["path"] = str(folder / "model")


BAD_INPUT: list[tuple[Spoil, type[RaySwiftError], str]] = [
    (missing_file, ConfigError, r"data\.train\.0\.path=.*row\.jsonl .*rows\.jsonl"),
    (missing_eval_file, ConfigError, r"data\.eval\.0\.path=.*held_out\.jsonl"),
    (empty_dataset, ConfigError, r"data\.train\.0\.path=.*rows\.jsonl has no rows"),
    (no_json, DataError, r"rows\.jsonl:1: is not JSON.*rows\.jsonl:2: is not JSON"),
    (rows_without_messages, DataError, r"rows\.jsonl:1: .*messages.*rows\.jsonl:2: "),
    (unknown_columns, ConfigError, r"zag.*zig"),
    (no_model, ConfigError, r"model\.path=.*nowhere"),
    (no_tokenizer, ConfigError, r"model\.path=.*model has no tokenizer"),
    (no_chat_template, ConfigError, r"model\.path=.*model .*chat template"),
    (cut_off_weights, ConfigError, r"model\.path=.*model\.safetensors"),
    (a_source_of_no_rows, ConfigError, r"data\.train\.1\.weight=0\.01 gives none of the 20 rows .*use at least 0\.055"),
    (a_share_of_no_rows, ConfigError,
     r"data\.train\.1\.weight=0\.01 gives none .* the first source is used up; raise it"),
    (an_endless_epoch, ConfigError,
     r"data\.mixing\.stopping=all_exhausted makes 200020 rows .*raise data\.train\.1\.w"),
    (no_positions_for_the_length, ConfigError,
     r"^data\.max_length=128 is more than the 64 positions of GPT2LMHeadModel; use 64$"),
    (a_config_that_cannot_be, ConfigError, r"model\.path=.*num_attention_heads=0 is not a positive number"),
    (unknown_method, ConfigError, r"method\.name=stf .*did you mean sft\?"),
    (unknown_engine, ConfigError, r"parallel\.engine=fsdp .*did you mean fsdp2\?"),
    (heads_that_do_not_divide, PlanError, r"^parallel\.tp=3 does not divide num_kv_heads=2 of .*; use 1 or 2$"),
    (no_experts_to_spread, PlanError, r"^parallel\.ep=2 has nothing to spread"),
    (more_stages_than_layers, PlanError, r"^parallel\.pp=2 makes 4 stages \(2 on each worker .*; use at most 1$"),
    (an_architecture_that_cannot_be_cut, PlanError, r"^parallel\.tp=2 has no way to cut StableLm: "),
    (pictures_for_a_model_of_text, ConfigError, r"model\.path=.* takes text alone, and rows have image"),
    (a_tower_that_would_be_cut, PlanError, r"^parallel\.tp=2 cuts only the language model of llava, which has a v"),
    (pictures_for_a_model_that_hears, ConfigError, r"takes text and audio, and rows have image: it has no"),
    (nothing_to_continue, ConfigError, r"train\.resume=must .*no valid checkpoint"),
    (output_is_a_file, ConfigError, r"output=.*runs cannot be written to"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "error", "message"), BAD_INPUT, ids=[case[0].__name__ for case in BAD_INPUT])
def test_bad_input_ends_at_once_with_one_message(
    tmp_path: Path, plain: dict[str, Any], spoil: Spoil, error: type[RaySwiftError], message: str
) -> None:
    spoil(tmp_path, plain)
    with pytest.raises(error, match=message) as raised:
        api.run(Job.model_validate(plain))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "runs" / "run").exists(), "nothing is left behind"
    assert not ray.is_initialized(), "no cluster was started"


def test_the_driver_checks_a_job_without_loading_torch_or_ray(tmp_path: Path, plain: dict[str, Any]) -> None:
    import subprocess
    import sys

    job = tmp_path / "job.json"
    job.write_text(json.dumps(plain))
    code = (
        "import json, sys; from rayswift.config.job import Job; from rayswift.cluster.preflight import prepare;"
        f"prepare(Job.model_validate(json.load(open({str(job)!r}))));"
        "print([m for m in ('torch', 'ray', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_tilde_is_the_home_of_the_user(
    tmp_path: Path, plain: dict[str, Any], tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(tiny_model_dir, tmp_path / "base")
    plain |= {"output": "~/out", "model": {"path": "~/base"}, "data": {"train": [{"path": "~/rows.jsonl"}]}}
    job = prepare(Job.model_validate(plain)).job
    assert job.output == str(tmp_path / "out")
    assert job.model.path == str(tmp_path / "base")
    assert job.data.train[0].path == str(tmp_path / "rows.jsonl")


def test_the_smallest_weight_offered_is_enough(plain: dict[str, Any]) -> None:
    plain["data"]["train"][0]["weight"] = 0.055
    assert prepare(Job.model_validate(plain)).train_stream.num_rows_total == 1


def test_a_deepspeed_json_that_contradicts_the_job_is_told_and_a_good_one_is_found_from_anywhere(
    tmp_path: Path, plain: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    a_deepspeed_json_that_contradicts(tmp_path, plain)
    with pytest.raises(ConfigError, match=r"stage=2 contradicts parallel\.zero_stage=3"):
        prepare(Job.model_validate(plain))
    monkeypatch.chdir(tmp_path)
    plain["parallel"] = {"deepspeed": "ds.json"}
    assert prepare(Job.model_validate(plain)).job.parallel.deepspeed == str(tmp_path / "ds.json")
    plain["parallel"] = {"deepspeed": "zero3"}
    assert prepare(Job.model_validate(plain)).job.parallel.deepspeed == "zero3"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"dtype": "float8"}}, r"model\.dtype=float8 needs the package torchao, .*'rayswift\[fp8\]'"),
        ({"model": {"quantization": "nf4"}, "adapter": {}},
         r"model\.quantization=nf4 needs the package bitsandbytes, .*'rayswift\[qlora\]'"),
    ],
)  # fmt: skip
def test_a_package_that_is_missing_is_told_before_anything_starts(
    plain: dict[str, Any], changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "find_spec", lambda _: None)
    for section, values in changes.items():
        plain[section] = plain.get(section, {}) | values
    with pytest.raises(ConfigError, match=message):
        prepare(Job.model_validate(plain))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "qwen3"}, ModelPlan(tp=True, pp=True, ep=False)),
        ({"model_type": "qwen3_moe"}, ModelPlan(tp=True, pp=True, ep=True)),
        ({"model_type": "gpt2"}, ModelPlan(tp=False, pp=False, ep=False)),
        ({"model_type": "qwen2_5_vl"}, ModelPlan(tp=True, pp=True, ep=False)),  # of the language model in it
        ({"model_type": "llava", "text_config": {"model_type": "llama"}}, ModelPlan(tp=True, pp=True, ep=False)),
        ({"model_type": "surely_not_known"}, ModelPlan(tp=False, pp=False, ep=False)),
    ],
)
def test_how_a_model_can_be_cut_is_what_transformers_says(config: dict[str, Any], expected: ModelPlan) -> None:
    assert model_plan(config) == expected
