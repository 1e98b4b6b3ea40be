"""What vLLM's processes are given to run is found by the names the package is installed with."""

from __future__ import annotations

import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from rayswift.serving.vllm import plugin

_PROJECT = Path(__file__).parents[2] / "pyproject.toml"


def test_the_package_is_installed_with_what_vllm_is_to_run() -> None:
    entries = tomllib.loads(_PROJECT.read_text())["project"]["entry-points"][plugin.GROUP]
    assert set(entries) == plugin.NAMES
    for entry in entries.values():
        assert callable(EntryPoint(name="", value=entry, group=plugin.GROUP).load())


def test_an_installation_from_older_code_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    old = [EntryPoint(name="rayswift-end", value="rayswift.serving.vllm.plugin:end_with_parent", group=plugin.GROUP)]
    monkeypatch.setattr(plugin, "entry_points", lambda group: old)
    assert plugin.missing() == {"rayswift-reason", "rayswift-sleep"}
    both = [EntryPoint(name=name, value="x:y", group=plugin.GROUP) for name in plugin.NAMES]
    monkeypatch.setattr(plugin, "entry_points", lambda group: both)
    assert plugin.missing() == frozenset()
