"""A report that is put into an export: in its manifest and on its card, whole whenever somebody is killed or reads."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rayswift import api, cli
from rayswift.errors import ExportError
from rayswift.evaluation.report import EvalReport, Target, report_names, text_of
from rayswift.export import kept, manifest
from rayswift.export.adapter import export_adapter
from rayswift.export.adapter_record import read as read_adapter
from rayswift.export.manifest import MANIFEST, Evaluation, read, read_valid
from rayswift.export.pipeline import export
from rayswift.models.adapters import load_base
from rayswift.serving.versions import version_of
from tests.export_cases import shake, write_lora_run, write_run

CHAT = {"messages": [{"role": "user", "content": "Two?"}, {"role": "assistant", "content": "It is 2, and no more."}]}
NUM_WRITERS = 6


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "held_out.jsonl"
    path.write_text(json.dumps(CHAT) + "\n")
    return path


@pytest.fixture
def out(tmp_path: Path, tiny_model_dir: Path) -> Path:
    export(str(tiny_model_dir), str(tmp_path / "out"), verify=False, engine="none")
    return tmp_path / "out"


def report_of(folder: Path, loss: float = 0.5) -> EvalReport:
    """A report as an evaluation of an export leaves it, nothing of it measured."""
    file = {"path": "held_out.jsonl", "sha256": "a" * 64, "num_rows": 3}
    return EvalReport.model_validate(
        {
            "target": Target(path=str(folder), kind="export", model=str(folder), version=version_of(folder)),
            "rows": {"files": [file], "format": "messages", "read": 3, "used": 3, "refused": 0, "cut": 0,
                     "reasons": []},
            "loss": loss, "perplexity": 1.5, "loss_reason": None, "tokens": 9, "trained_tokens": 5, "answers": None,
            "answers_reason": "not asked", "settings": {}, "versions": {}, "seconds": 1.0,
        }
    )  # fmt: skip


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def in_another_process(work: Callable[[], None]) -> int:
    """The process that does it; it ends with 0, with 1 for an error, or as `work` ends it."""
    if child := os.fork():
        return child
    try:
        work()
        os._exit(0)
    except BaseException:
        os._exit(1)


def code_of(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def test_an_evaluated_export_says_so_in_manifest_and_card_and_keeps_its_version(
    tmp_path: Path, tiny_model_dir: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run and its quantized export on the same rows: the card has both, by the commands that users type."""
    run, out = tmp_path / "runs" / "full", tmp_path / "out"
    weights = dict(load_base(str(tiny_model_dir)).state_dict())
    shake(weights, 0.05)
    write_run(run, tiny_model_dir, weights, None)
    options = ["--rows", str(rows), "--max-new-tokens", "2", "--json"]
    commands = [
        ["eval", str(run), *options],
        ["export", str(run), str(out), "--quantizer", "fp8", "--calibration", str(rows), "--engine", "none",
         "--max-perplexity", "2", "--min-agreement", "0.1", "--json"],
        ["eval", str(out), *options],
    ]  # fmt: skip
    said = []
    for command in commands:
        with pytest.raises(SystemExit) as caught:
            cli.main(command)
        captured = capsys.readouterr()
        assert caught.value.code == 0, captured.err
        said.append((json.loads(captured.out), captured.err))
        if command[0] == "export":
            version, weight = version_of(out), (out / "model.safetensors").read_bytes()
    of_run, of_export = said[0][0], said[2][0]
    assert f"note: kept as {out}/eval-held_out.json, in its manifest too" in said[2][1]
    assert (of_export["target"]["kind"], of_export["target"]["version"]) == ("export", version)
    assert of_export["loss"] != of_run["loss"]

    made = read_valid(out)
    assert version_of(out) == made.version == version
    assert (out / "model.safetensors").read_bytes() == weight
    trained, own = made.evaluations
    assert (trained.of, trained.loss, trained.sha256) == ("run", of_run["loss"], None)
    assert (own.of, own.loss, own.report) == ("export", of_export["loss"], "eval-held_out.json")
    file = (out / own.report).read_bytes()
    assert own.sha256 == made.files[own.report].sha256 == hashlib.sha256(file).hexdigest()
    assert json.loads(file) == of_export
    card = (out / "README.md").read_text()
    for model, loss in (("as trained, in float32", of_run["loss"]), ("these files", of_export["loss"])):
        assert f"| {model} | `held_out.jsonl` (1) | {loss:.4g} |" in card
    assert made.rewriting == {}
    assert not list(out.glob(".*"))


def test_the_newest_evaluation_on_the_same_rows_takes_the_place_of_the_older(out: Path) -> None:
    version = version_of(out)
    for name, loss in (("eval-b.json", 0.1), ("eval-a.json", 0.2), ("eval-b.json", 0.3)):
        kept.keep(report_of(out, loss), str(out), name)
    found = read_valid(out).evaluations
    assert [(one.report, one.loss) for one in found] == [("eval-a.json", 0.2), ("eval-b.json", 0.3)]
    assert version_of(out) == version


def test_other_rows_of_the_same_name_are_kept_and_shown_beside_the_first(out: Path) -> None:
    def of(path: str, sha256: str, loss: float) -> str:
        report = report_of(out, loss)
        assert report.rows is not None
        file = report.rows.files[0].model_copy(update={"path": path, "sha256": sha256 * 64})
        report = report.model_copy(update={"rows": report.rows.model_copy(update={"files": (file,)})})
        return kept.keep(report, str(out), *report_names(path))

    first, second = of("gsm8k/test.jsonl", "a", 0.1), of("mmlu/test.jsonl", "b", 0.2)
    assert first == "eval-test.json"
    assert re.fullmatch(r"eval-test-[0-9a-f]{8}\.json", second)
    assert (of("gsm8k/test.jsonl", "c", 0.3), of("mmlu/test.jsonl", "b", 0.4)) == (first, second)
    found = read_valid(out).evaluations
    assert {one.report: (*one.rows, one.loss) for one in found} == {
        first: ("gsm8k/test.jsonl", 0.3), second: ("mmlu/test.jsonl", 0.4)
    }  # fmt: skip
    card = (out / "README.md").read_text()
    assert "| `gsm8k/test.jsonl` (3) | 0.3 |" in card
    assert "| `mmlu/test.jsonl` (3) | 0.4 |" in card


@pytest.mark.parametrize("step", range(1, 7))
def test_whenever_it_is_killed_the_export_is_whole_and_the_next_evaluation_mends_it(out: Path, step: int) -> None:
    """Killed before the `step`-th rename or write: announced, then two files, then listed; nothing is left behind."""
    version, before = version_of(out), files_of(out)
    kept.keep(report_of(out, 0.1), str(out), "eval-a.json")

    def killed() -> None:
        calls = iter(range(1, 100))

        def counted(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any) -> Any:
                if next(calls) == step:
                    os._exit(9)
                return real(*args)

            return call

        os.replace, kept._write = counted(os.replace), counted(kept._write)  # in this process alone
        kept.keep(report_of(out, 0.2), str(out), "eval-a.json")

    assert code_of(in_another_process(killed)) == 9
    found = read_valid(out)
    assert version_of(out) == version
    kept.keep(report_of(out, 0.4), str(out), "eval-b.json")
    mended = read_valid(out)
    # what had been put there is taken as it is: the report of that name is the older one or the newer
    (first, second) = mended.evaluations
    assert first.loss == json.loads((out / "eval-a.json").read_text())["loss"] == (0.2 if step > 4 else 0.1)
    assert first.sha256 == mended.files["eval-a.json"].sha256
    assert (second.report, second.loss, mended.rewriting, version_of(out)) == ("eval-b.json", 0.4, {}, version)
    assert bool(found.rewriting) == (step > 3)
    assert not list(out.glob(".*"))
    assert all(files_of(out)[name] == content for name, content in before.items() if name not in (
        MANIFEST, "README.md"))  # fmt: skip


def test_evaluations_at_the_same_time_lose_nothing_and_nobody_reads_half_of_one(out: Path) -> None:
    reports = [report_of(out, 0.1 * number) for number in range(NUM_WRITERS)]
    version, ended, failures = version_of(out), threading.Event(), list[str]()

    def reading() -> None:
        while not ended.is_set():
            try:
                read_valid(out)
                assert version_of(out) == version
            except (ExportError, AssertionError) as error:
                failures.append(str(error))

    writers = [
        in_another_process(lambda n=n, report=report: [kept.keep(report, str(out), f"eval-{n}.json") for _ in range(5)])  # type: ignore[misc]
        for n, report in enumerate(reports)
    ]
    reader = threading.Thread(target=reading)
    reader.start()
    codes = [code_of(writer) for writer in writers]
    ended.set()
    reader.join()
    assert codes == [0] * NUM_WRITERS
    assert failures == []
    found = {one.report: one.loss for one in read_valid(out).evaluations}
    assert found == {f"eval-{n}.json": report.loss for n, report in enumerate(reports)}


def _entry_of(content: bytes) -> manifest.FileEntry:
    return manifest.FileEntry(size=len(content), sha256=hashlib.sha256(content).hexdigest())


def test_a_card_that_is_put_there_while_it_is_looked_at_is_the_one_that_was_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card, old, new = tmp_path / "README.md", b"old", b"newer"
    is_as, sha256 = manifest.is_as, manifest.file_sha256

    def put_behind(file: Path, entry: manifest.FileEntry) -> bool:
        found = is_as(file, entry)
        card.write_bytes(new)
        return found

    def put_before(file: Path) -> str:
        card.write_bytes(new)
        return sha256(file)

    for name, put in (("is_as", put_behind), ("file_sha256", put_before)):
        card.write_bytes(old)
        with monkeypatch.context() as patched:
            patched.setattr(manifest, name, put)
            manifest._check_file(tmp_path, card.name, _entry_of(old), _entry_of(new))
    card.write_bytes(b"another")
    with pytest.raises(ExportError, match="with 7 bytes instead of 3"):
        manifest._check_file(tmp_path, card.name, _entry_of(old), _entry_of(new))


def test_an_export_that_cannot_be_written_is_told_and_the_report_is_printed(
    out: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    before = files_of(out)
    monkeypatch.setattr(kept, "_write", refuse)
    with pytest.raises(SystemExit) as caught:
        cli.main(["eval", str(out), "--rows", str(rows), "--max-new-tokens", "0", "--json"])
    said = capsys.readouterr()
    assert caught.value.code == 0
    assert json.loads(said.out)["loss"] > 0
    assert f"warning: TARGET={out} does not keep the report of its evaluation: Read-only file system; " in said.err
    assert "--output FILE" in said.err
    assert files_of(out) == before
    read_valid(out)


def test_who_is_held_up_says_by_whom(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "_WAIT_S", 0.2)
    with kept._sole_writer(out), pytest.raises(ExportError, match="another evaluation has held it for 0 s"):
        kept.keep(report_of(out), str(out), "eval-a.json")
    kept.keep(report_of(out), str(out), "eval-a.json")


def test_a_report_of_what_was_replaced_meanwhile_is_not_kept(out: Path, tiny_model_dir: Path) -> None:
    report = report_of(out)
    export(str(tiny_model_dir), str(out), dtype="bfloat16", engine="none", force=True)
    with pytest.raises(ExportError, match=r"is version \w{12} now, and \w{12} was evaluated"):
        kept.keep(report, str(out), "eval-a.json")
    assert read_valid(out).evaluations == ()


def test_a_file_that_nobody_announced_is_refused_as_before(out: Path) -> None:
    kept.keep(report_of(out), str(out), "eval-a.json")
    for name in ("eval-a.json", "README.md"):
        content = (out / name).read_bytes()
        (out / name).write_bytes(content + b" ")
        with pytest.raises(ExportError, match=f"has {name} with"):
            read_valid(out)
        (out / name).write_bytes(content)
    (out / "eval-b.json").write_text(text_of(report_of(out)))
    with pytest.raises(ExportError, match=r"holds eval-b\.json, which its manifest does not list"):
        read_valid(out)
    announced = read(out).model_copy(update={"rewriting": {"eval-b.json": kept._entry(b"another")}})
    manifest.write(announced, out)
    with pytest.raises(ExportError, match=r"has eval-b\.json with"):
        read_valid(out)


def test_an_adapter_exported_alone_keeps_its_evaluation(tmp_path: Path, tiny_model_dir: Path, rows: Path) -> None:
    run, out = tmp_path / "runs" / "lora", tmp_path / "adapter"
    write_lora_run(run, tiny_model_dir, 0.1)
    export_adapter(str(run), str(out))
    version = kept.version_evaluated(out)
    report = api.evaluate(str(out), str(rows), max_new_tokens=0)
    assert (report.target.kind, report.target.version) == ("adapter", version)
    made = read_adapter(str(out))
    (own,) = made.evaluations
    assert isinstance(own, Evaluation)
    assert (own.of, own.loss, own.report) == ("export", report.loss, "eval-held_out.json")
    assert (made.version, kept.version_evaluated(out)) == (version, version)
    assert made.files == manifest.describe_files(out, "rayswift_adapter.json")
    assert not (out / "README.md").is_file() or "README.md" in made.files


def test_of_a_folder_that_is_no_export_it_is_told_that_nothing_is_kept(
    tiny_model_dir: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_of(tiny_model_dir)
    api.evaluate(str(tiny_model_dir), str(rows), max_new_tokens=0)
    said = capsys.readouterr().err
    assert f"note: {tiny_model_dir} has no {MANIFEST}, so no report is kept with it; --output FILE keeps one" in said
    api.evaluate(str(tiny_model_dir), str(rows), max_new_tokens=0, output=str(tmp_path / "report.json"))
    assert "no report is kept" not in capsys.readouterr().err
    assert files_of(tiny_model_dir) == before
