"""`rayswift serve` and the commands about versions, without an endpoint: what is listed, and what is refused."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from pathlib import Path

import pytest

from rayswift import cli
from rayswift.serving import boards, questions, registry, rollout
from rayswift.serving.promotion import Policy
from rayswift.serving.questions import Question
from rayswift.serving.registry import EndpointRecord, ModelVersions

_A, _B = "a" * 12, "b" * 12


def _call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        cli.main(["serve", *arguments])
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


@pytest.fixture
def exports(tmp_path: Path) -> Path:
    registry.record(tmp_path, "m", _A, tmp_path / "v1", "live")
    registry.record(tmp_path, "m", _B, tmp_path / "v2", "rolled-back", "1 of its 4 answers failed")
    return tmp_path


def test_versions_are_listed(
    exports: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = _call(capsys, "versions", str(exports))
    assert code == 0
    assert [line.split() for line in out.splitlines()] == [
        ["m", _A, "live", "v1"],
        ["m", _B, "rolled-back", "v2", "(1", "of", "its", "4", "answers", "failed)"],
    ]
    monkeypatch.setattr(boards, "running_shares", lambda home: {"m": {_A: 0.75}})
    assert "live 75%" in _call(capsys, "versions", str(exports))[1]
    code, out, _ = _call(capsys, "versions", str(exports), "--json")
    assert code == 0
    found = json.loads(out)
    assert found["shares"] == {"m": {_A: 0.75}}
    assert found["registry"]["models"]["m"]["live"] == _A


def test_a_folder_without_versions_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _call(capsys, "versions", str(tmp_path))
    assert (code, out) == (0, f"{tmp_path} has no version that was served with --promotable\n")


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [("--steps", "half", "--steps=half is no list of numbers; write 0.05"), ("--steps", "0.5", "growing shares"),
     ("--min-agreement", "90", "min_agreement=90.0 is out of bounds; write a number from 0 to 1"),
     ("--min-token-agreement", "25", "min_token_agreement=25.0 is out of bounds; write a number from 0 to 1")],
)  # fmt: skip
def test_wrong_bounds_are_refused_before_anything_is_done(
    exports: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, told: str
) -> None:
    code, _, err = _call(capsys, "promote", str(exports / "v2"), option, value)
    assert code == 2
    assert told in err


def test_the_prompts_are_of_a_kind_that_the_live_version_can_answer(
    exports: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compared, promoted = [], []

    class Running:
        live_export = "the live one"

        def promote(self, export: str, policy: Policy, asked: list[Question], *, keep_old: bool) -> ModelVersions:
            promoted.append((export, asked))
            return ModelVersions()

    def kind_of(*folders: str) -> str:
        compared.append(folders)
        return "text"

    (rows := exports / "rows.jsonl").write_text('{"text": "a b c d"}\n{"text": "d e f g"}\n')
    monkeypatch.setattr(rollout, "opened", lambda *_: nullcontext(Running()))
    monkeypatch.setattr(questions, "kind_of", kind_of)
    code, _, err = _call(capsys, "promote", "the new one", "--prompts", str(rows), "--max-new-tokens", "8")
    assert (code, compared) == (0, [("the new one", "the live one")])
    assert promoted == [("the new one", [Question("a b", None, 8), Question("d e", None, 8)])]
    assert f"2 verification prompts: {rows}" in err


def test_without_an_endpoint_nothing_is_promoted_or_taken_back(
    exports: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command, argument in (("promote", exports / "v2"), ("rollback", exports)):
        code, _, err = _call(capsys, command, str(argument))
        assert code == 2
        assert f"exports={exports} has no endpoint that says it serves exports from here; start it with" in err


def test_an_endpoint_that_was_killed_is_told_of(
    exports: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rayswift.cluster.session._KNOCK_TIMEOUT_S", 0.2)
    registry.write_endpoint(
        exports, EndpointRecord(id="e", address="127.0.0.1:1", url="http://127.0.0.1:8000/v1", pid=os.getpid())
    )
    code, _, err = _call(capsys, "rollback", str(exports))
    assert code == 1
    assert "the endpoint at http://127.0.0.1:8000/v1" in err
    assert "does not run any more; start it again" in err
    code, out, _ = _call(capsys, "versions", str(exports), "--json")
    assert (code, json.loads(out)["shares"]) == (0, {})


def test_the_folder_of_a_link_is_that_of_the_export(tmp_path: Path) -> None:
    (tmp_path / "exports" / "v2").mkdir(parents=True)
    (tmp_path / "latest").symlink_to(tmp_path / "exports" / "v2")
    assert registry.home_of(str(tmp_path / "latest")) == str((tmp_path / "exports").resolve())


def test_serving_is_what_serve_does_where_nothing_else_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = _call(capsys, "exports/absent")
    assert code == 2
    assert "serve=exports/absent is neither an export folder nor a YAML file" in err
    assert "FOLDER" in _call(capsys, "--help")[1]
    assert _call(capsys)[0] == 2
