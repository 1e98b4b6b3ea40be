"""The quickstart as a new user runs it, into a folder with a space: the promise of the README, kept or failed."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.ray]


def test_the_quickstart_keeps_its_promise(
    rayswift: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    folder = tmp_path / "my quickstart"
    done = rayswift("quickstart", "text", "--output", str(folder), "--json", timeout=900)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["succeeded"]
    assert result["held_out_after"] < 0.5 * result["held_out_before"]
    assert result["num_exact"] >= 0.8 * len(result["asked"]) >= 32
    for path in result["curves"].values():
        assert Path(path).stat().st_size > 5_000
    assert (folder / "exports" / "assistant" / "rayswift.json").is_file()
    assert "Traceback" not in done.stderr


@pytest.mark.long
def test_the_vision_quickstart_keeps_its_promise(
    rayswift: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """Real digits, held out, sent as data URIs to the served export through the OpenAI client."""
    folder = tmp_path / "my digits"
    done = rayswift("quickstart", "vision", "--output", str(folder), "--json", timeout=900)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["accuracy_before"] < 0.3
    assert result["accuracy_after"] >= 0.9
    assert len(result["after"]) == 297
    assert (folder / "exports" / "digits" / "preprocessor_config.json").is_file()
    assert "Traceback" not in done.stderr
