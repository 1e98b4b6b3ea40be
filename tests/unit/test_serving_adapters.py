"""Adapters by name: only what lies below their folder, only safetensors, and a 404 that tells nothing of the disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rayswift.models import adapters as trained
from rayswift.serving.adapters import CONFIG, WEIGHTS, find_adapter
from rayswift.serving.api_errors import ApiError


def _adapter(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 8, "auto_mapping": None}))
    (folder / WEIGHTS).write_bytes(b"weights")
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "adapters"
    _adapter(root / "good")
    _adapter(tmp_path / "outside")
    return root


def test_an_adapter_is_found_by_its_name(root: Path) -> None:
    assert find_adapter(root, "good") == (root / "good").resolve()
    nested = _adapter(root / "team" / "a@2" / "x.1")
    assert find_adapter(root, "team/a@2/x.1") == nested.resolve()
    (root / "latest").symlink_to(nested)  # links inside are fine
    assert find_adapter(root, "latest") == nested.resolve()
    link = root.parent / "link"
    link.symlink_to(root)
    assert find_adapter(link, "good") == (root / "good").resolve()


def test_the_files_are_those_that_training_writes() -> None:
    assert (CONFIG, WEIGHTS) == (trained.ADAPTER_CONFIG, trained.ADAPTER_WEIGHTS)


def _not_found(root: Path, name: str) -> None:
    with pytest.raises(ApiError) as caught:
        find_adapter(root, name)
    error = caught.value
    assert (error.status, error.code, error.param) == (404, "model_not_found", "model")
    assert str(root.parent) not in str(error)
    assert error.body()["error"]["message"].count("/") == name[:80].count("/") + 2  # those of "GET /v1/models"


_NAMES = [
    "", ".", "..", "../outside", "good/..", "good/../good", "good/../../outside", "/", "/etc", "good/", "/good",
    "//good", "good//", "a\\..\\good", "..\\outside", "good\0", "\0", "good\n", " good", "good ", ".hidden", "~",
    "~root", "%2e%2e", "%2e%2e/outside", "\u2025", "\uff0e\uff0e", "g\u00f6\u00f6d", "\ud800", "x" * 101, "a/b/c/d/e",
    "absent", "good/adapter_config.json", "GOOD?", "good;ls", "$(ls)", "CON:", "C:\\good",
]  # fmt: skip


@pytest.mark.parametrize("name", _NAMES, ids=ascii)
def test_no_name_leads_out(root: Path, name: str) -> None:
    _adapter(root / ".hidden")
    _not_found(root, name)


def test_an_absolute_path_is_no_name(root: Path) -> None:
    with pytest.raises(ApiError, match="does not exist"):
        find_adapter(root, str(root / "good"))


def _write(name: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(content)


def _link(name: str, to: str) -> Callable[[Path], object]:
    def link(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(folder.parent.parent / "outside" / to)

    return link


def _replaced_by_pipe(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


_SPOILT: dict[str, Callable[[Path], object]] = {
    "link to the outside": _link(WEIGHTS, WEIGHTS),
    "adapter_config.json is a link to the outside": _link(CONFIG, CONFIG),
    "no file": _replaced_by_pipe,
    "has adapter_model.bin beside": _write("adapter_model.bin", "pickle"),
    "has adapter_model.pt beside": _write("adapter_model.pt", "pickle"),
    "is not JSON": _write(CONFIG, "{"),
    "adapter_config.json is not JSON": _write(CONFIG, "[" * 100_000),
    "more than 1048576 bytes": _write(CONFIG, " " * 2**20 + "{}"),
    "another peft_type": _write(CONFIG, json.dumps({"peft_type": "PROMPT_TUNING"})),
    "json has another peft_type": _write(CONFIG, "[]"),
    "auto_mapping": _write(CONFIG, json.dumps({"peft_type": "LORA", "auto_mapping": {"parent_library": "evil"}})),
}


@pytest.mark.parametrize("reason", _SPOILT)
def test_a_folder_that_is_no_safe_adapter_is_not_found_and_the_log_says_why(
    root: Path, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    _SPOILT[reason](root / "good")
    _not_found(root, "good")
    assert reason in caplog.text


def test_other_files_of_a_training_do_not_matter(root: Path) -> None:
    (root / "good" / "training_args.bin").write_bytes(b"pickle")
    (root / "good" / "optimizer.pt").write_bytes(b"pickle")
    assert find_adapter(root, "good")


def test_links_out_links_in_a_circle_and_missing_files(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    (root / "out").symlink_to(root.parent / "outside")
    (root / "up").symlink_to("..")
    (root / "self").symlink_to(".")
    (root / "circle").symlink_to("circle")
    (root / "empty").mkdir()
    (root / "file").write_text("x")
    pickled = _adapter(root / "pickled")
    (pickled / WEIGHTS).rename(pickled / "adapter_model.bin")
    for name in ("out", "up", "up/outside", "self", "circle", "empty", "file", "pickled"):
        _not_found(root, name)
    assert "the adapter out is not served: it is a link to the outside" in caplog.text
    _not_found(root.parent / "absent", "good")
