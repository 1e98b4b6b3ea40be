"""The doctor's findings, and that each problem comes with a fix."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rayswift import doctor
from rayswift.doctor import Checkup, Finding, examine


def test_this_machine_can_train() -> None:
    checkup = examine(start_ray=False)
    assert checkup.healthy, checkup.summary()
    assert {"python", "packages", "extras", "cpus", "memory"} <= {finding.what for finding in checkup.findings}
    assert checkup.to_plain()["healthy"] is True


def test_a_version_that_was_not_tested_is_a_warning(tmp_path: Path) -> None:
    pins = tmp_path / "constraints.txt"
    pins.write_text("# comment\nray==1.2.3\n")
    checkup = examine(start_ray=False, constraints=pins)
    found = next(f for f in checkup.findings if f.what == "packages")
    assert found.status == "warning"
    assert "tested: 1.2.3" in found.found
    assert "make setup" in found.fix
    assert checkup.healthy


def test_too_little_room_is_told_with_a_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    disks = [f for f in examine(start_ray=False).findings if f.what.startswith(("disk", "/dev/shm"))]
    assert disks
    assert all(f.status == "warning" and f.fix for f in disks)


def test_a_temporary_folder_that_is_not_there_is_a_finding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "absent"))
    checkup = examine(start_ray=False)
    [found] = [finding for finding in checkup.findings if "No such file" in finding.found]
    assert (found.status, found.fix) == ("problem", "make that folder, or unset TMPDIR")
    assert not checkup.healthy


def test_a_missing_package_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_requirements", lambda extra=None: ["surely-not-installed"])
    checkup = examine(start_ray=False)
    assert not checkup.healthy
    assert "missing: surely-not-installed" in checkup.summary()
    assert "mend the lines marked FAIL" in checkup.summary()


def test_a_fix_is_shown_below_its_finding() -> None:
    lines = Checkup((Finding("disk", "problem", "full", "make room"),)).summary().splitlines()
    assert lines[0].startswith("FAIL  disk")
    assert lines[1].strip() == "-> make room"
