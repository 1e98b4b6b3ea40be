"""What several unit suites start from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def plain(tmp_path: Path, tiny_model_dir: Path) -> dict[str, Any]:
    """A job that is right, as plain data."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"query": f"q{i}", "response": f"r{i}"}) + "\n" for i in range(20)))
    return {
        "name": "run",
        "output": str(tmp_path / "runs"),
        "model": {"path": str(tiny_model_dir)},
        "data": {"train": [{"path": str(rows)}]},
    }
