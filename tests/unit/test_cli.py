"""The command line without a cluster: help, exit codes, messages, and what goes to stdout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.main import get_command

from rayswift import cli
from rayswift.errors import ConfigError, DataError, ExportError, PlanError, RaySwiftError

ROOT = Path(__file__).resolve().parents[2]
JOB = """\
name: demo
model: {path: nowhere/base}
data: {train: [{path: nowhere/a.jsonl}]}
"""


@pytest.fixture
def job(tmp_path: Path) -> str:
    path = tmp_path / "job.yaml"
    path.write_text(JOB)
    return str(path)


def call(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command run in this process."""
    with pytest.raises(SystemExit) as caught:
        cli.main(args)
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


def commands() -> list[list[str]]:
    found = []
    for name, command in get_command(cli.app).commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        default = getattr(command, "default", None)  # which is meant where none is named
        found += [[name] if one == default else [name, one] for one in inner] if inner else [[name]]
    return found


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_command_has_help_with_an_example(capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    code, out, _ = call(capsys, *command, "--help")
    assert code == 0
    assert f"Example: rayswift {' '.join(command)}" in " ".join(out.split())


def test_help_loads_nothing_heavy() -> None:
    """What help may import bounds how long it takes, on any machine: torch alone is seconds."""
    code = (
        "import sys; from rayswift import cli\n"
        "try: cli.main(['train', '--help'])\n"
        "finally: print(sorted({'torch', 'ray', 'transformers', 'pandas'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "Usage: rayswift train" in done.stdout


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "--version")[:2] == (0, "rayswift 0.1.0\n")


def test_the_schema_is_json_and_knows_every_section(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "schema")
    schema = json.loads(out)
    assert code == 0
    assert set(schema["required"]) == {"name", "model", "data"}
    assert schema["$defs"]["TrainSpec"]["properties"]["lr"]["description"] == "The peak learning rate."
    assert schema["$defs"]["MethodSpec"]["properties"]["name"]["enum"] == ["pretrain", "sft"]


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["trian"], "Did you mean 'train'"),
        (["train"], "Missing argument 'JOB'"),
        (["train", "JOB", "--jsn"], "No such option"),
        (["train", "JOB", "train.lr=abc"], "train.lr=abc is not a number"),
        (["train", "JOB", "learning_rate=1"], "did you mean train.lr?"),
        (["train", "absent.yaml"], "job=absent.yaml does not exist"),
        (["plan", "JOB", "lr"], "is not KEY=VALUE"),
        (["train", "JOB", "--method", "pretrain", "method.name=sft"], "is not the method of this script"),
        (["quickstart", "txt"], "did you mean text?"),
        (["quickstart", "text", "--output", "."], "is not the folder of a quickstart"),
        (["model", "init", "x", "more.txt"], "write --train-tokenizer before it"),
        (["submit", "JOB"], "is no dashboard URL"),
        (["train", "JOB"], "nowhere/base"),
        (["export", "nowhere", "out"], "nowhere"),
        (["export", "nowhere", "--output", "out"], "nowhere"),
        (["export", "nowhere"], "OUTPUT is missing"),
        (["export", "nowhere", "out", "-o", "other"], "is given twice: out and other"),
        *(
            (["export", "nowhere", "out", "--adapter-only", *given], f"--adapter-only does not go with {given[0]}:")
            for given in (
                ["--quantizer", "fp8"],
                ["--dtype", "float16"],
                ["--max-difference", "0"],
                ["--engine", "none"],
                ["--max-engine-difference", "0"],
                ["--bits", "4"],
                ["--group-size", "64"],
                ["--calibration", "a.jsonl"],
                ["--calibration-rows", "9"],
                ["--held-out-rows", "9"],
                ["--max-length", "9"],
                ["--max-perplexity", "1.1"],
                ["--min-agreement", "0.9"],
            )
        ),
        (["export", "nowhere", "out", "--adapter-only", "--bits", "4", "--engine", "vllm"], "with --bits, --engine:"),
        (["export", "nowhere", "out", "--adapter-only", "--engine", "auto", "--force", "--json"], "nowhere"),
        (["serve", "nowhere"], "nowhere"),
        (["data", "inspect", "JOB"], "nowhere"),
    ],
)
def test_a_bad_command_ends_with_code_2_and_one_message(
    capsys: pytest.CaptureFixture[str],
    job: str,
    args: list[str],
    part: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    code, out, err = call(capsys, *[job if arg == "JOB" else arg for arg in args])
    assert (code, out) == (2, "")
    assert "\nerror: " in f"\n{err}"  # after progress lines, where the command got that far
    assert part in err
    assert "Traceback" not in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (RaySwiftError("went wrong"), 1, "error: went wrong"),
        (ConfigError("is bad", path="a.b", value=1, fix="use 2"), 2, "error: a.b=1 is bad; use 2"),
        (PlanError("too big"), 3, "error: too big"),
        (DataError("bad rows"), 4, "error: bad rows"),
        (ExportError("differs"), 5, "error: differs"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ZeroDivisionError("a\nb"), 1, "error: unexpected ZeroDivisionError: a b"),
    ],
)
def test_exit_codes(capsys: pytest.CaptureFixture[str], raised: BaseException, code: int, message: str) -> None:
    def command() -> None:
        raise raised

    assert cli.run(command) == code
    err = capsys.readouterr().err
    assert err.startswith(message)
    assert "Traceback" not in err


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYSWIFT_DEBUG", "1")

    def command() -> None:
        raise PlanError("too big")

    assert cli.run(command) == 3
    assert "Traceback" in capsys.readouterr().err


def test_show_config_says_where_a_value_was_written(capsys: pytest.CaptureFixture[str], job: str) -> None:
    code, out, _ = call(capsys, "plan", job, "train.lr=2e-5", "--show-config", "--json")
    settings = json.loads(out)
    assert code == 0
    assert settings["train.lr"] == {"value": 2e-5, "from": "command line"}
    assert settings["name"]["from"] == f"{job} line 1"
    assert settings["train.epochs"] == {"value": 1, "from": "default"}


@pytest.mark.parametrize("command", ["schema", "--version"])
def test_a_closed_pipe_is_not_complained_about(command: str) -> None:
    """The reader has gone before anything is written, so that no buffer hides it."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "rayswift.cli", command],
            cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_serve_prints_one_object_when_it_answers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from rayswift.serving import app

    monkeypatch.setattr(app, "run", lambda spec, *, on_ready: on_ready(None))
    code, out, _ = call(capsys, "serve", f"a={tmp_path}", f"b={tmp_path}", "--port", "8123", "--json")
    assert code == 0
    assert json.loads(out) == {"url": "http://127.0.0.1:8123/v1", "models": ["a", "b"], "pid": os.getpid()}


class _Dashboard:
    """As much of Ray's job client as `submit` uses; the job ends as it is told to."""

    def __init__(self, status: str, exit_code: int | None) -> None:
        self._status, self._exit_code, self.entrypoint = status, exit_code, ""

    def get_address(self) -> str:
        return "http://cluster:8265"

    def submit_job(self, *, entrypoint: str, **_: object) -> str:
        self.entrypoint = entrypoint
        return "raysubmit_1"

    async def tail_job_logs(self, _: str) -> AsyncIterator[str]:
        yield "step 1\n"

    def get_job_info(self, _: str) -> SimpleNamespace:
        return SimpleNamespace(status=self._status, driver_exit_code=self._exit_code, message="")

    def get_job_status(self, _: str) -> str:
        return "PENDING"


@pytest.mark.parametrize(
    ("status", "driver_exit_code", "extra", "code", "told"),
    [
        ("SUCCEEDED", 0, [], 0, {"status": "SUCCEEDED", "exit_code": 0}),
        ("FAILED", 4, [], 4, {"status": "FAILED", "exit_code": 4}),
        ("RUNNING", None, ["--no-wait"], 0, {"status": "PENDING", "exit_code": None}),
    ],
)
def test_submit_prints_one_object_and_the_log_elsewhere(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    job: str,
    status: str,
    driver_exit_code: int | None,
    extra: list[str],
    code: int,
    told: dict[str, object],
) -> None:
    from rayswift.cluster import submit

    dashboard = _Dashboard(status, driver_exit_code)
    monkeypatch.setattr(submit, "_connect", lambda _: dashboard)
    found, out, err = call(capsys, "submit", job, "train.lr=1e-3", "--json", *extra)
    assert (found, json.loads(out)) == (code, {"submission": "raysubmit_1", **told})
    assert ("step 1" in err) == (not extra)
    assert dashboard.entrypoint.endswith(f"train {job} train.lr=1e-3")
    found, out, err = call(capsys, "submit", job, *extra)
    assert (found, err) == (code, "")
    assert out == "submitted raysubmit_1\n" + ("" if extra else "step 1\n")


@pytest.mark.parametrize("script", ["sft", "pt", "export", "serve"])
def test_a_job_script_is_the_command(script: str, job: str) -> None:
    done = subprocess.run(
        [sys.executable, f"jobs/{script}.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=False,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0
    assert "Usage: rayswift" in done.stdout


def test_a_job_script_refuses_another_method(job: str) -> None:
    done = subprocess.run(
        [sys.executable, "jobs/pt.py", job, "method.name=sft"], cwd=ROOT, capture_output=True, text=True, check=False,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: method.name=sft is not the method of this script, pretrain;")


def test_a_command_that_is_interrupted_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C goes through typer, which has a code for it and no words."""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rayswift.api.export", interrupted)
    with pytest.raises(SystemExit) as caught:
        cli.main(["export", "models/base", "exports/base"])
    assert (caught.value.code, capsys.readouterr()) == (130, ("", "interrupted\n"))
