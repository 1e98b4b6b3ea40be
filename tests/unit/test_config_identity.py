"""Which changes make another run of a job: the hash that a resume compares."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.job_cases import make_job


def job_hash(path: str) -> str:
    return make_job(**{"model.path": path}).job_hash()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("orgA/Llama", "orgB/Llama"),
        ("org/name@v1", "org/name@v2"),
        ("org/name@v1", "org/name"),
        ("org/name@refs/pr/1", "org/other@refs/pr/1"),
        ("gpt2@v1", "gpt2"),
        ("/a/base", "/a/other"),
    ],
)
def test_another_base_is_another_run(one: str, other: str) -> None:
    assert job_hash(one) != job_hash(other)


def test_a_local_base_may_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert job_hash("models/base") == job_hash("/elsewhere/base") == job_hash("./models/base/")
