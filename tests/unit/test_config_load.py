"""Job files and overrides: what is read, and what every mistake is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayswift.config.job import Job
from rayswift.config.load import dump_job, job_schema, load_job, validate
from rayswift.errors import ConfigError

GOOD = """\
name: demo
model: {path: models/base}
data:
  train:
    - path: data/a.jsonl
train:
  lr: 1e-4  # a number although YAML 1.1 says otherwise
"""


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(GOOD)
    return path


def problem(file: Path, *overrides: str, text: str | None = None) -> str:
    """The message that a job is refused with."""
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_job(str(file), overrides)
    return str(caught.value)


def test_a_file_is_read_with_the_origin_of_every_value(job_file: Path) -> None:
    loaded = load_job(str(job_file), ["train.max_steps=7", "data.packing=false"])
    assert loaded.job.train.lr == 1e-4
    assert loaded.job.train.max_steps == 7
    assert loaded.job.data.packing is False
    assert loaded.origins["train.lr"] == f"{job_file} line 7"
    assert loaded.origins["data.train.0.path"] == f"{job_file} line 5"
    assert loaded.origins["train.max_steps"] == "command line"
    assert loaded.origins["train.epochs"] == "default"
    assert loaded.origins["adapter"] == "default"


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("train.lr=2e-5", lambda j: j.train.lr == 2e-5),
        ("train.max_steps=null", lambda j: j.train.max_steps is None),
        ("data.train.0.path=x.jsonl", lambda j: j.data.train[0].path == "x.jsonl"),
        ("data.train.0.path=*.jsonl", lambda j: j.data.train[0].path == "*.jsonl"),
        ("data.train.1.path=b.jsonl", lambda j: [s.path for s in j.data.train] == ["data/a.jsonl", "b.jsonl"]),
        ("data.eval.0.path=e.jsonl", lambda j: j.data.eval[0].path == "e.jsonl"),
        ("data.train.0.columns={question: query}", lambda j: j.data.train[0].columns == {"question": "query"}),
        ("adapter.rank=32", lambda j: j.adapter.rank == 32),
        ("adapter={name: lora}", lambda j: j.adapter.rank == 8),
        ("name=2024", lambda j: j.name == "2024"),
        ("cluster.address=null", lambda j: j.cluster.address is None),
        ("parallel.dp_shard=2", lambda j: j.parallel.dp_shard == 2),
        ("train.betas=[0.9, 0.95]", lambda j: j.train.betas == (0.9, 0.95)),
        ("method.name=pretrain", lambda j: j.method.name == "pretrain"),
        ("--train.lr=1", lambda j: j.train.lr == 1.0),
        ("train.epochs='2'", lambda j: j.train.epochs == 2),
        ("data.train.0.path=a #1.jsonl", lambda j: j.data.train[0].path == "a #1.jsonl"),
        ("data.train.0.system=# Role", lambda j: j.data.train[0].system == "# Role"),
        ("data.train.0.system=You: be brief", lambda j: j.data.train[0].system == "You: be brief"),
        ("data.train.0.system=", lambda j: j.data.train[0].system == ""),
        ("data.train.0.system=null", lambda j: j.data.train[0].system is None),
    ],
)
def test_an_override_sets_one_value(job_file: Path, override: str, read) -> None:  # type: ignore[no-untyped-def]
    assert read(load_job(str(job_file), [override]).job)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.lr=abc", ["train.lr=abc is not a number;", "0.0001", "peak learning rate", "command line"]),
        ("train.epochs=1.5", ["train.epochs=1.5 is not a whole number"]),
        ("train.lr=-1", ["train.lr=-1 is not greater than 0"]),
        ("data.packing=maybe", ["data.packing=maybe is not true or false"]),
        ("train.optimizer=adam", ["train.optimizer=adam is not one of adamw or sgd", "did you mean adamw?"]),
        ("parallel.dp_shard=many", ["parallel.dp_shard=many is not a whole number and is not one of auto"]),
        ("train.learning_rat=1", ["train.learning_rat is not a key of a job"]),
        ("train.epoch=1", ["train.epoch", "did you mean train.epochs?"]),
        ("train.warmup_step=1", ["did you mean train.warmup_steps?"]),
        ("lr=1", ["lr is not a key of a job", "did you mean train.lr?"]),
        ("max_lenght=1", ["did you mean data.max_length?"]),
        ("model.rank=1", ["did you mean adapter.rank?"]),
        ("data.train.0.pth=x", ["data.train.0.pth", "did you mean data.train.0.path?"]),
        ("train.eval_step=5", ["did you mean train.eval_every?"]),
        ("train.gradient_clipping=1", ["did you mean train.max_grad_norm?"]),
        ("max_grad_norm=1", ["did you mean train.max_grad_norm?"]),
        ("method.lr=1", ["method.lr is not an option of the method; did you mean train.lr?"]),
        ("method.num_train_epochs=1", ["did you mean train.epochs?"]),
        ("val_set_size=0.1", ["did you mean data.eval.0.path?", "files of their own"]),
        ("data.split_dataset_ratio=0.1", ["did you mean data.eval.0.path?"]),
        ("neat_packing=true", ["did you mean data.packing?"]),
        ("group_by_length=true", ["did you mean data.packing?"]),
        ("dataloader_num_workers=1", ["did you mean data.num_workers?"]),
        ("load_in_4bit=true", ["model.quantization=nf4", "adapter.name=lora"]),
        ("load_in_8bit=true", ["model.quantization=nf4", "adapter.name=lora"]),
        ("parallel.nvme=/nvme", ["parallel.nvme=/nvme takes what parallel.offload moves out", "parallel.nvme=null"]),
        ("train.deepspeed=zero3", ["did you mean parallel.deepspeed?"]),
        ("parallel.tensor_parallel_size=2", ["did you mean parallel.tp?"]),
        ("model.quantization_bit=4", ["did you mean model.quantization?"]),
        ("template=qwen", ["chat_template.jinja in the folder of model.path"]),
        ("tuner_type=lora", ["did you mean adapter.name?"]),
        ("train_type=lora", ["did you mean adapter.name?"]),
        ("output_dir=x", ["did you mean output?"]),
        ("model_name_or_path=x", ["did you mean model.path?"]),
        ("dataset=x", ["did you mean data.train.0.path?"]),
        ("lora_alpha=1", ["did you mean adapter.alpha?"]),
        ("lora_target=all", ["did you mean adapter.targets?"]),
        ("train.lr=true", ["train.lr=True is not a number"]),
        ("train.epochs=true", ["train.epochs=True is not a whole number"]),
        ("cluster.workers=true", ["cluster.workers=True is not a whole number"]),
        ("data.train.0.limit=true", ["data.train.0.limit=True is not a whole number"]),
        ("train.betas=[true, 0.9]", ["train.betas=[True, 0.9] is not a number"]),
        ("train.betas=[0.9, 1.5]", ["train.betas.1=1.5 is not less than 1"]),
        ("train.lr=.inf", ["train.lr=inf is not a finite number"]),
        ("data.train.0.weight=.nan", ["data.train.0.weight=nan is not a finite number"]),
        ("train.seed=2147483648", ["train.seed=2147483648 is not less than 2147483648"]),
        ("data.train.²=1", ["data.train is a list of 1, so it has no ²"]),
        ("zzzz=1", ["the keys there are name, output"]),
        ("learning_rate=1", ["did you mean train.lr?"]),
        ("train.num_train_epochs=1", ["did you mean train.epochs?"]),
        ("per_device_train_batch_size=1", ["did you mean train.micro_batch_size?"]),
        ("gradient-accumulation-steps=1", ["did you mean train.global_batch_size?", "follows from"]),
        ("cutoff_len=1", ["did you mean data.max_length?"]),
        ("lora_rank=1", ["did you mean adapter.rank?"]),
        ("method.name=sfft", ["method.name=sfft is not one of the methods", "did you mean sft?"]),
        ("method.beta=0.1", ["method.beta is not an option of the method"]),
        ("data.train=x.jsonl", ["data.train=x.jsonl is not a list", "data.train.0.path=FILE"]),
        ("logging.trackers=wandb", ["logging.trackers=wandb is not a list; write logging.trackers=[wandb]"]),
        ("data.train=[]", ["too few entries"]),
        ("data.train.path=x", ["data.train is a list of 1", "data.train.0.path"]),
        ("data.train.5.path=x", ["data.train has 1 entries", "data.train.1"]),
        ("name.x=1", ["name=demo is not a section"]),
        ("train=3", ["train=3 is not a section", "epochs"]),
        ("name=a/b", ["name=a/b does not match"]),
        ("model.path=null", ["model.path=None is not text"]),
        ("train.micro_batch_size=99", ["train.micro_batch_size=99 is larger than train.global_batch_size=16"]),
        ("lr", ["override=lr is not KEY=VALUE", "train.lr=2e-5"]),
    ],
)
def test_a_wrong_override_is_told_path_value_rule_and_fix(job_file: Path, override: str, parts: list[str]) -> None:
    message = problem(job_file, override)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["is empty"]),
        ("# only a comment\n", ["is empty"]),
        ("name: d\n# \x1b[0m\n", ["is not YAML in line 2", "control character U+001B"]),
        ("name: \x00\n", ["is not YAML in line 1", "control character U+0000"]),
        ("- a\n- b\n", ["holds a list"]),
        ("name: [1\nb: 2\n", ["is not YAML in line 2, column 2"]),
        ("name: x\n\ttrain: 1\n", ["is not YAML in line 2, column 1", "spaces"]),
        ("name: a\nname: b\n", ["name is written twice, in line 1 and line 2"]),
        (GOOD + "  lr: 2\n", ["train.lr is written twice, in line 7 and line 8"]),
        ("a: &x {b: *x}\nname: d\n", ["a is not a key of a job"]),
        ("name: *nothing\n", ["is not YAML in line 1", "nothing"]),
        ("name: demo\n", ["has 2 problems", "model is missing", "data is missing"]),
        (GOOD.replace("1e-4", "fast"), ["train.lr=fast is not a number", "line 7"]),
        (GOOD + "  lrr: 1\nmodle: 1\n", ["has 2 problems", "did you mean train.lr?", "did you mean model?", "line 9"]),
    ],
)
def test_a_wrong_file_is_told_file_line_and_rule(job_file: Path, text: str, parts: list[str]) -> None:
    message = problem(job_file, text=text)
    assert str(job_file) in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    "override", ["data.train.0.pth=x", "data.train.0.path=null", "data.train.0.weight=-1", "data.train=[a.jsonl]"]
)
def test_a_wrong_entry_is_one_problem(job_file: Path, override: str) -> None:
    message = problem(job_file, override)
    assert "problems" not in message
    assert "too few entries" not in message


def test_the_schema_has_the_bounds_of_every_number() -> None:
    train = job_schema()["$defs"]["TrainSpec"]["properties"]
    assert train["lr"]["exclusiveMinimum"] == 0
    assert train["seed"]["exclusiveMaximum"] == 2**31


def test_a_missing_file_suggests_the_closest(job_file: Path) -> None:
    assert f"did you mean {job_file}?" in problem(job_file.with_name("jobb.yaml"))
    assert "is a folder" in problem(job_file.parent)


def test_bytes_that_are_no_text_are_refused(job_file: Path) -> None:
    job_file.write_bytes(b"name: \xff\xfe")
    assert "is not UTF-8 text at byte 6" in problem(job_file)


def test_a_byte_order_mark_is_no_part_of_the_first_key(job_file: Path) -> None:
    job_file.write_text("\ufeff" + GOOD)
    assert load_job(str(job_file)).job.name == "demo"


@pytest.mark.parametrize(
    "body",
    [
        "from rayswift import Job\njob = Job(name='p', model={'path': 'm'}, data={'train': [{'path': 'd'}]})",
        "job = dict(name='p', model={'path': 'm'}, data={'train': [{'path': 'd'}]})",
        "def job():\n    return dict(name='p', model={'path': 'm'}, data={'train': [{'path': 'd'}]})",
        "from rayswift.config.job import DataSource\n"
        "job = dict(name='p', model={'path': 'm'}, data={'train': (DataSource(path='d'),)})",
    ],
)
def test_a_python_file_defines_a_job(tmp_path: Path, body: str) -> None:
    path = tmp_path / "job.py"
    path.write_text(body)
    loaded = load_job(str(path), ["data.train.0.limit=3"])
    assert (loaded.job.name, loaded.job.data.train[0].path, loaded.job.data.train[0].limit) == ("p", "d", 3)
    assert loaded.origins["name"] == str(path)
    assert loaded.origins["train.lr"] == "default"


@pytest.mark.parametrize(
    ("body", "parts"),
    [
        ("x = 1", ["defines no job"]),
        ("x = 1\nraise KeyError('boom')", ["fails with KeyError", "line 2"]),
        ("job = (", ["fails with SyntaxError", "line 1"]),
        ("from rayswift import Job\njob = Job(name='p', lr=1)", ["model is missing", "did you mean train.lr?"]),
    ],
)
def test_a_wrong_python_file_is_told_without_a_traceback(tmp_path: Path, body: str, parts: list[str]) -> None:
    path = tmp_path / "job.py"
    path.write_text(body)
    message = problem(path)
    for part in parts:
        assert part in message


def test_a_dumped_job_loads_back(tmp_path: Path, job_file: Path) -> None:
    job = load_job(str(job_file), ["adapter.rank=4", "data.train.0.columns={a: '1e-4', 'no': '2024-01-01'}"]).job
    again = tmp_path / "again.yaml"
    again.write_text(dump_job(job))
    assert load_job(str(again)).job == job
    assert job.data.train[0].columns == {"a": "1e-4", "no": "2024-01-01"}


def test_a_script_insists_on_its_method(job_file: Path) -> None:
    assert load_job(str(job_file), method="pretrain").job.method.name == "pretrain"
    with pytest.raises(ConfigError, match=r"method.name=sft is not the method of this script, pretrain"):
        load_job(str(job_file), ["method.name=sft"], method="pretrain")


def test_validate_takes_plain_data() -> None:
    job = validate({"name": "d", "model": {"path": "m"}, "data": {"train": [{"path": "x"}]}})
    assert isinstance(job, Job)


def test_a_number_may_be_written_as_text() -> None:
    plain = {"name": "d", "model": {"path": "m"}, "data": {"train": [{"path": "x"}]}, "train": {"lr": "2e-5"}}
    assert validate(plain).train.lr == 2e-5


def test_words_of_yaml_1_1_stay_words(job_file: Path) -> None:
    job_file.write_text(GOOD + "output: 2024-01-01\nlogging: {project: no}\n")
    job = load_job(str(job_file)).job
    assert (job.output, job.logging.project) == ("2024-01-01", "no")
