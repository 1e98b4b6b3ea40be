"""Old spellings: each means one key here, keeps its origin, and is told; two values of one are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from rayswift import cli
from rayswift.config import keys, spellings
from rayswift.config.load import LoadedJob, load_job
from rayswift.errors import ConfigError

GOOD = """\
name: demo
model: {path: models/base}
adapter: {rank: 8}
data: {train: [{path: data/a.jsonl}]}
"""


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(GOOD)
    return path


def loaded(file: Path, *overrides: str, more: str = "") -> LoadedJob:
    file.write_text(GOOD + more)
    return load_job(str(file), overrides)


MEANINGS = [
    ("tensor_parallel_size", "2", {"parallel.tp": 2}),
    ("tensor_model_parallel_size", "2", {"parallel.tp": 2}),
    ("tensor-parallel-size", "2", {"parallel.tp": 2}),
    ("pipeline_parallel_size", "4", {"parallel.pp": 4}),
    ("pipeline_model_parallel_size", "4", {"parallel.pp": 4}),
    ("context_parallel_size", "2", {"parallel.cp": 2}),
    ("sequence_parallel_size", "2", {"parallel.cp": 2}),
    ("expert_model_parallel_size", "2", {"parallel.ep": 2}),
    ("zero_stage", "2", {"parallel.zero_stage": 2}),
    ("deepspeed", "zero3", {"parallel.engine": "deepspeed", "parallel.deepspeed": "zero3"}),
    ("deepspeed", "ds/zero2.json", {"parallel.engine": "deepspeed", "parallel.deepspeed": "ds/zero2.json"}),
    ("deepspeed", "null", {"parallel.engine": "auto", "parallel.deepspeed": None}),
    ("fsdp", "full_shard auto_wrap", {"parallel.engine": "fsdp2", "parallel.offload": "none"}),
    ("fsdp", "[full_shard, auto_wrap, offload]", {"parallel.engine": "fsdp2", "parallel.offload": "parameters"}),
    ("fsdp", "true", {"parallel.engine": "fsdp2"}),
    ("fsdp", "false", {"parallel.engine": "auto"}),
    ("quantization_bit", "4", {"model.quantization": "nf4"}),
    ("quant_bits", "4", {"model.quantization": "nf4"}),
    ("load_in_4bit", "true", {"model.quantization": "nf4"}),
    ("load_in_4bit", "false", {"model.quantization": None}),
    ("loss_scale", "last_round+hermes", {"data.loss": "last_round+hermes"}),
    ("mask_history", "true", {"data.loss": "last_round"}),
    ("stopping_strategy", "all_exhausted", {"data.mixing.stopping": "all_exhausted"}),
    ("mix_strategy", "concat", {"data.mixing.stopping": "weights"}),
    ("mix_strategy", "interleave_under", {"data.mixing.stopping": "first_exhausted"}),
    ("mix_strategy", "interleave_over", {"data.mixing.stopping": "all_exhausted"}),
    ("train_on_inputs", "true", {"data.loss": "all"}),
    ("train_on_prompt", "false", {"data.loss": "default"}),
]


@pytest.mark.parametrize(("key", "typed", "meant"), MEANINGS)
def test_an_old_spelling_means_one_thing_wherever_it_is_written(
    job_file: Path, key: str, typed: str, meant: dict[str, Any]
) -> None:
    for found in (loaded(job_file, f"{key}={typed}"), loaded(job_file, more=f"{key}: {typed}\n")):
        assert {target: found.value(target) for target in meant} == meant


def test_the_origin_of_the_value_is_kept_and_the_new_key_told_once(job_file: Path) -> None:
    found = loaded(job_file, "load_in_4bit=true", "sequence_parallel_size=2", more="deepspeed: zero3\n")
    assert found.origins["parallel.deepspeed"] == f"{job_file} line 5, as deepspeed"
    assert found.origins["parallel.engine"] == f"{job_file} line 5, as deepspeed"
    assert found.origins["parallel.cp"] == "command line, as sequence_parallel_size"
    assert found.notes == (
        "deepspeed is parallel.engine and parallel.deepspeed here",
        "load_in_4bit is model.quantization here",
        "sequence_parallel_size is parallel.cp here",
    )
    assert loaded(job_file, "parallel.tp=2").notes == ()


def test_a_python_job_may_use_them_too(tmp_path: Path) -> None:
    path = tmp_path / "job.py"
    path.write_text(
        "job = dict(name='p', model={'path': 'm'}, data={'train': [{'path': 'd'}]}, tensor_parallel_size=4)"
    )
    found = load_job(str(path))
    assert found.job.parallel.tp == 4
    assert found.origins["parallel.tp"] == f"{path}, as tensor_parallel_size"


def test_the_command_line_wins_over_the_file_whatever_the_spelling(job_file: Path) -> None:
    assert loaded(job_file, "parallel.tp=8", more="tensor_parallel_size: 2\n").job.parallel.tp == 8
    assert loaded(job_file, "tensor_parallel_size=8", more="parallel: {tp: 2, pp: 2}\n").job.parallel.tp == 8
    assert loaded(job_file, "tensor_parallel_size=8", "tensor_parallel_size=4").job.parallel.tp == 4
    assert loaded(job_file, "tensor_parallel_size=8", "parallel.tp=8").job.parallel.tp == 8


@pytest.mark.parametrize(
    ("overrides", "more", "message"),
    [
        (("tensor_parallel_size=4", "parallel.tp=2"), "",
         "tensor_parallel_size=4 and parallel.tp=2 are two values of parallel.tp; keep one of the two"),
        (("parallel.tp=2", "tensor_parallel_size=4"), "",
         "parallel.tp=2 and tensor_parallel_size=4 are two values of parallel.tp; keep one of the two"),
        ((), "tensor_parallel_size: 4\nparallel: {tp: 2}\n",
         "tensor_parallel_size=4 and parallel.tp=2 are two values of parallel.tp; keep one of the two"),
        ((), "tensor_parallel_size: 4\ntensor_model_parallel_size: 2\n",
         "tensor_parallel_size=4 and tensor_model_parallel_size=2 are two values of parallel.tp; keep one of the two"),
        ((), "deepspeed: zero2\nparallel: {engine: fsdp2}\n",
         "deepspeed=zero2 and parallel.engine=fsdp2 are two values of parallel.engine; keep one of the two"),
        (("quantization_bit=8",), "",
         "quantization_bit=8 is not a base in 4 bits; use model.quantization=nf4, or null"),
        (("load_in_4bit=4",), "", "load_in_4bit=4 is not a base in 4 bits; use model.quantization=nf4, or null"),
        (("fsdp=hybrid_shard auto_wrap",), "",
         "fsdp=hybrid_shard auto_wrap has hybrid_shard, which FSDP2 has no word for; "
         "say it with parallel.dp_replicate and parallel.dp_shard"),
    ],
)  # fmt: skip
def test_what_means_two_things_or_nothing_is_refused(
    job_file: Path, overrides: tuple[str, ...], more: str, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(job_file, *overrides, more=more)
    assert str(caught.value) == message


def test_a_wrong_value_is_told_with_the_key_and_the_place_it_was_written(job_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"parallel\.tp=0 is less than 1; .*line 5, as tensor_parallel_size\)"):
        loaded(job_file, more="tensor_parallel_size: 0\n")


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--tensor_parallel_size", "2"], ["tensor_parallel_size=2"]),
        (["--tensor-parallel-size=2"], ["tensor_parallel_size=2"]),
        (["--deepspeed", "zero3", "--json"], ["deepspeed=zero3", "--json"]),
        (["--deepspeed", "conf/ds.json", "train.lr=1"], ["deepspeed=conf/ds.json", "train.lr=1"]),
        (["--load_in_4bit", "train.lr=1"], ["load_in_4bit=true", "train.lr=1"]),
        (["--load_in_4bit"], ["load_in_4bit=true"]),
        (["--load_in_4bit", "--json"], ["load_in_4bit=true", "--json"]),
        (["--learning_rate", "1e-4"], ["learning_rate=1e-4"]),
        (["--method=sft", "job.yaml", "a=b"], ["--method=sft", "job.yaml", "a=b"]),
        (["--wait", "--address", "http://host"], ["--wait", "--address", "http://host"]),
    ],
)
def test_options_of_other_trainers_become_settings(args: list[str], expected: list[str]) -> None:
    assert spellings.as_overrides(args) == expected


def test_no_option_of_this_command_line_is_taken_for_one_of_another_trainer() -> None:
    group = get_command(cli.app)
    inner = [group.commands[name] for name in ("plan", "train", "submit")]  # type: ignore[attr-defined]
    inner += group.commands["data"].commands.values()  # type: ignore[attr-defined]
    options = {name.lstrip("-").replace("-", "_") for one in inner for param in one.params for name in param.opts}
    assert not {name for name in options if spellings.is_old(name) or keys.is_foreign(name)}


def test_every_old_spelling_has_a_key_to_suggest_where_it_is_misplaced() -> None:
    for name in ("tensor_parallel_size", "context_parallel_size", "expert_model_parallel_size", "deepspeed"):
        assert keys.suggestion(("train", name)).startswith("did you mean parallel.")


def test_a_command_tells_the_new_key_on_stderr(job_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["plan", str(job_file), "--show-config", "--tensor_parallel_size", "2"])
    out, err = capsys.readouterr()
    assert caught.value.code == 0
    assert "parallel.tp = 2  (command line, as tensor_parallel_size)" in out
    assert err == "note: tensor_parallel_size is parallel.tp here\n"


def test_an_option_of_another_trainer_is_refused_with_a_suggestion(
    job_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", str(job_file), "--learning_rate", "1e-4"])
    assert caught.value.code == 2
    assert "learning_rate is not a key of a job; did you mean train.lr?" in capsys.readouterr().err
